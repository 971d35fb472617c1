"""The command from parsed flags to the exit status, mostly in separate processes."""

import os
import subprocess
import sys

import pandas as pd
import pytest
from absl import flags

from imp_jax import analysis, main
from imp_jax import runs as imp_runs
from imp_jax.divergence import DivergedError
from tests.helpers import ROOT
from tests.helpers.commands import CONFIG, QUICK, run


def user_environment(cache_dir):
    """Return the environment of a user with this cache folder, without the JAX_ variables of the tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {
        "XDG_CACHE_HOME": str(cache_dir)
    }


OWN_CONFIG = """
import flax.linen as nn
from imp_jax import config as configs, models

class Patches(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(3, (7, 7), strides=(7, 7), padding="VALID")(x))
        return nn.Dense(self.num_classes)(x.reshape(len(x), 4 * 4 * 3))  # works for 28 × 28 pixels only

models.register("patches", Patches)

def get_config():
    with open("executed", "a") as file:
        file.write("x")
    config = configs.default()
    config.update({"rounds": 1, "epochs": 1, "batch_size": 500, "replicates": 1})
    config.model.name = "patches"
    return config
"""


def test_run_continues_after_the_reader_of_its_output_has_closed(tmp_path, data_dir):
    """As with `| head -1`. The config file has a user's model and is executed once per command."""
    (tmp_path / "own.py").write_text(OWN_CONFIG)
    command = f"{sys.executable} -m imp_jax.main --config=own.py --config.dataset.data_dir={data_dir}"
    for number, line in enumerate(("workdir: runs/own", "runs/own is finished"), 1):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} | head -1"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(line)
        assert (tmp_path / "executed").read_text() == "x" * number
    assert len(pd.read_csv(tmp_path / "runs/own/results.csv")) == 2
    assert (tmp_path / "runs/own/report.html").exists()


def test_debug_flag_shows_the_traceback_of_a_user_error(tmp_path):
    code, _, err = run(CONFIG, "--debug", f"--workdir={tmp_path}", "--config.rounds=0")
    assert code != 0
    assert "Traceback" in err
    assert err.strip().endswith("rounds is 0; it should be at least 1")


def test_second_run_compiles_nothing(tmp_path, data_dir):
    results, programs = [], []
    for workdir in (tmp_path / "first", tmp_path / "second"):
        arguments = [*QUICK, f"--config.dataset.data_dir={data_dir}", f"--workdir={workdir}"]
        code, _, stderr = run(*arguments, env=user_environment(tmp_path))
        assert (code, stderr) == (0, "")
        results.append(pd.read_csv(workdir / "results.csv").drop(columns="seconds"))
        programs.append(sorted(path.name for path in (tmp_path / "imp_jax").glob("*/*-cache")))
    assert programs[0] == programs[1]
    assert len(programs[0]) > 20
    pd.testing.assert_frame_equal(*results, check_exact=True)


def test_finished_rounds_of_a_diverged_run_are_analysed(tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise DivergedError("it diverged in round 3")

    analysed_workdirs = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(imp_runs, "run", diverge)
    monkeypatch.setattr(analysis, "run", analysed_workdirs.append)
    flags.FLAGS(["main", CONFIG, f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit, match="error: it diverged in round 3"):
        main.main(["main"])
    assert analysed_workdirs == [tmp_path]


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        (
            {"JAX_PLATFORMS": "cuda"},
            "JAX has no device: JAX_PLATFORMS is 'cuda', which cannot be used on this machine; it should be "
            "cpu, or unset",
        ),
        (
            {"JAX_ENABLE_X64": "1"},
            "JAX_ENABLE_X64 is set; training is in single precision, so it should be unset",
        ),
    ],
)
def test_unusable_environment_prints_one_sentence(tmp_path, variable, sentence):
    code, out, err = run(*QUICK, f"--workdir={tmp_path / 'run'}", env=os.environ | variable)
    assert (code, out) == (1, "")
    assert err == f"error: {sentence}\n"
    assert not (tmp_path / "run").exists()
