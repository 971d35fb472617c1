"""The command that trains and analyses, in processes of its own."""

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


def at_home(path):
    """The environment of a user whose caches are in a folder, with no setting of JAX."""
    return {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"XDG_CACHE_HOME": str(path)}


OWN_CONFIG = """
import flax.linen as nn
from imp_jax import config as configs, models

class Patches(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(3, (7, 7), strides=(7, 7), padding="VALID")(x))
        return nn.Dense(self.num_classes)(x.reshape(len(x), 4 * 4 * 3))  # of 28 × 28 pixels alone

models.register("patches", Patches)

def get_config():
    with open("executed", "a") as file:
        file.write("x")
    config = configs.default()
    config.update({"rounds": 1, "epochs": 1, "batch_size": 500, "replicates": 1})
    config.model.name = "patches"
    return config
"""


def test_a_run_of_ones_own_model_outlives_the_reader_of_its_output(tmp_path, data_dir):
    """As of `| head -1`; without --workdir too, the config file is executed once; the same command goes on."""
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


def test_debug_shows_the_traceback_of_a_user_error(tmp_path):
    code, _, err = run(CONFIG, "--debug", f"--workdir={tmp_path}", "--config.rounds=0")
    assert code != 0
    assert "Traceback" in err
    assert err.strip().endswith("rounds is 0; it should be at least 1")


def test_a_second_start_compiles_nothing(tmp_path, data_dir):
    results, programs = [], []
    for workdir in (tmp_path / "first", tmp_path / "second"):
        arguments = [*QUICK, f"--config.dataset.data_dir={data_dir}", f"--workdir={workdir}"]
        code, _, stderr = run(*arguments, env=at_home(tmp_path))
        assert (code, stderr) == (0, "")
        results.append(pd.read_csv(workdir / "results.csv").drop(columns="seconds"))
        programs.append(sorted(path.name for path in (tmp_path / "imp_jax").glob("*/*-cache")))
    assert programs[0] == programs[1]
    assert len(programs[0]) > 20
    pd.testing.assert_frame_equal(*results, check_exact=True)


def test_a_run_that_diverged_is_analysed_as_far_as_it_came(tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise DivergedError("it broke in round 3")

    analysed = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(imp_runs, "run", diverge)
    monkeypatch.setattr(analysis, "run", analysed.append)
    flags.FLAGS(["main", CONFIG, f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit, match="error: it broke in round 3"):
        main.main(["main"])
    assert analysed == [tmp_path]


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
def test_an_environment_that_does_not_suit_is_one_sentence(tmp_path, variable, sentence):
    code, out, err = run(*QUICK, f"--workdir={tmp_path / 'run'}", env=os.environ | variable)
    assert (code, out) == (1, "")
    assert err == f"error: {sentence}\n"
    assert not (tmp_path / "run").exists()
