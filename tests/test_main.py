"""The command as a user types it, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from absl import flags

from experiments.sweeps import runs
from imp_jax import analysis, cli, main
from imp_jax import config as configs
from imp_jax import runs as imp_runs
from imp_jax.divergence import DivergedError

ROOT = Path(__file__).parent.parent
CONFIG = "--config=configs/mnist5k.py"
W = "--workdir=W"  # W stands for a folder of the test's own


def run(*arguments, cwd=ROOT, env=None):
    command = [sys.executable, "-m", "imp_jax.main", *arguments]
    env = {**(env or os.environ), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def at_home(path):
    """The environment of a user whose caches are in a folder, with no setting of JAX."""
    return {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"XDG_CACHE_HOME": str(path)}


QUICK = ("rounds=1", "epochs=1", "batch_size=500", "replicates=1")
QUICK = [CONFIG, *(f"--config.{override}" for override in QUICK)]


def test_help_needs_no_jax():
    code = (
        "import runpy, sys; sys.argv = ['main', '--help']\n"
        "try: runpy.run_module('imp_jax.main', run_name='__main__')\n"
        "except SystemExit: sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--workdir" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "workdir"),
    [
        (["--config=configs/resnet20.py"], "runs/resnet20"),
        (
            ["--config=configs/resnet20.py", "--config.batch_size=1024", "--config.seed=0"],
            "runs/resnet20,batch_size=1024",
        ),
        (["--config=configs/lenet.py", "--config.pruning.fraction=0.5", "--config.arms=('imp',)"],
         "runs/lenet,arms=imp,pruning.fraction=0.5"),
        (["--config=configs/lenet.py", "--workdir=~/w,~"], "/home/me/w,~"),
    ],
)  # fmt: skip
def test_where_a_run_lies(monkeypatch, arguments, workdir):
    """By the name that sweeps use, unless the user says."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["main", *arguments])  # where ml_collections looks for overrides
    values = flags.FlagValues()
    config = cli.define_config(values)
    folder = flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(["main", *arguments])
    assert cli.find_workdir(folder.value, config.value, values["config"]) == Path(workdir)
    if "workdir" not in arguments[-1]:
        base, *overrides = (argument.partition("=")[2] for argument in arguments)
        fields = [argument.removeprefix("--config.").split("=")[0] for argument in arguments[1:]]
        assert len(overrides) == len(fields)
        sweep = runs.make_run(
            Path(base).stem, {field: configs.flatten(config.value)[field] for field in fields}
        )
        assert f"runs/{sweep.name}" == workdir


def test_the_argument_of_a_config_file_stays_within_the_name(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("from imp_jax.config import default\ndef get_config(_): return default()")
    arguments = ["main", f"--config={tmp_path}/own.py:../../a b"]
    monkeypatch.setattr(sys, "argv", arguments)
    values = flags.FlagValues()
    config = cli.define_config(values)
    values(arguments)
    assert cli.find_workdir(None, config.value, values["config"]) == Path("runs/own-..-..-a-b")


def test_a_run_without_workdir_on_a_terminal_of_ascii(tmp_path, data_dir):
    """Signs that the encoding lacks are replaced."""
    fields = [*QUICK[1:], "--config.model.width=0.1", f"--config.dataset.data_dir={data_dir}"]
    code, out, err = run(
        f"--config={ROOT / 'configs/mnist5k.py'}",
        *fields,
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (code, err) == (0, "")
    workdir = "runs/mnist5k,batch_size=500,epochs=1,model.width=0.1,replicates=1,rounds=1"
    assert out.startswith(f"workdir: {workdir}\n")
    assert "(28 ? 28 ? 1)" in out
    assert len(pd.read_csv(tmp_path / workdir / "results.csv")) == 2


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


@pytest.fixture
def config_file(tmp_path):
    def write(body):
        path = tmp_path / "config.py"
        path.write_text("from imp_jax.config import default\n\n" + body)
        return f"--config={path}"

    return write


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--config is missing"),
        ([CONFIG, "--workdir="], "--workdir is empty; it should be the path of a folder"),
        ([CONFIG, "--workdir=~no_such_user/w"], "there is no home directory to replace ~"),
        ([W, CONFIG, "--flagfile=missing"], "Unable to open flagfile: [Errno 2] No such file"),
        ([CONFIG, "--config.optimizer.schedule=step"], "optimizer.milestones is (); the schedule step divides"),
        ([W, CONFIG, "extra"], "'extra' is not a flag"),
        ([W, CONFIG, "--nosuch=1"], "Unknown command line flag 'nosuch'"),
        ([W, CONFIG, "--rounds=1"], "flag 'rounds'; the config field is set by --config.rounds"),
        ([W, CONFIG, "--config.optimiser.name=adam"], "did you mean optimizer.name?"),
        ([W, "--config=configs/none.py"], "No such file or directory: 'configs/none.py'"),
        ([W, "--config=configs/none.py", "--config.rounds=3"], "No such file or directory"),
        ([W, "--config=configs"], "Is a directory: 'configs'"),
        ([W, CONFIG, "--config.rounds=abc"], "rounds is 'abc'; it should be of type int, like 25"),
        ([W, CONFIG, "--config.roundz=3"], "no config field roundz "),
        ([W, CONFIG, "--config.no.such=3"], "there is no config field no.such"),
        ([W, CONFIG, "--config.dataset=mnist"], "dataset is 'mnist'; it should be a group of fields"),
        ([W, CONFIG, "--config.pruning.fraction=1.5"], "pruning.fraction is 1.5; it should be"),
        ([W, CONFIG, "--config.rewind_step=x"], "rewind_step is 'x'; it should be of type int or None"),
        ([W, CONFIG, "--processes=0"], "flag --processes=0: 0 is not a positive integer"),
        ([W, CONFIG, "--processes=2", "--process=0", "--coordinator=node"], "it should be HOST:PORT"),
        ([W, CONFIG, "--config.dataset.name=food101", "--config.dataset.data_dir=W"], "imp_jax.data prepare"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_a_failure(tmp_path, arguments, sentence):
    workdir = tmp_path / "run"
    code, out, err = run(*[argument.replace("=W", f"={workdir}") for argument in arguments])
    assert code != 0
    assert sentence in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert not out
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def get_config(: x", "SyntaxError"),
        ("get = 1", "no attribute 'get_config'"),
        ("def get_config():\n    return 1", "get_config() returned int"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
        ("def get_config():\n    c = default()\n    c.rounds = 'five'\n    return c", "TypeError"),
    ],
)
def test_a_bad_config_file_is_one_sentence(tmp_path, config_file, body, sentence):
    code, _, err = run(config_file(body), f"--workdir={tmp_path / 'run'}")
    assert code != 0
    assert sentence in err
    assert len(err.splitlines()) == 1


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


def test_fields_are_overridden_from_the_command_line(tmp_path, data_dir):
    code, out, err = run(
        CONFIG,
        f"--workdir={tmp_path}",
        f"--config.dataset.data_dir={data_dir}",
        "--config.rounds=2",
        "--config.epochs=1",
        "--config.batch_size=1000",
        "--config.replicates=1",
        "--config.arms=imp",
        "--config.rewind_step=None",
        "--config.optimizer.name=momentum",
        "--config.optimizer.schedule=step",
        "--config.optimizer.milestones=(0.5,)",
        "--config.optimizer.warmup_epochs=1",
    )
    assert code == 0, err
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2
    assert "Test accuracy in %" in out
    assert f"report:  {tmp_path / 'report.html'}" in out  # the analyses follow by themselves
    assert set(pd.read_csv(tmp_path / "analysis" / "barriers.csv")["round"]) == {1}
