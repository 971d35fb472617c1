"""Flags of the command: config files, overridden fields, the folder of a run, one-sentence errors."""

import os
import sys
from pathlib import Path

import pandas as pd
import pytest
from absl import flags

from experiments.sweeps import runs
from imp_jax import cli
from imp_jax import config as configs
from tests.helpers import ROOT
from tests.helpers.commands import CONFIG, QUICK, run

W = "--workdir=W"  # the test replaces each value W by a temporary folder


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
def test_find_workdir_uses_the_flag_or_the_name_that_sweeps_use(monkeypatch, arguments, workdir):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["main", *arguments])  # ml_collections looks for overrides in it
    values = flags.FlagValues()
    config = cli.define_config(values)
    folder = flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(["main", *arguments])
    assert cli.find_workdir(folder.value, config.value, values["config"]) == Path(workdir)
    if "workdir" not in arguments[-1]:
        base = arguments[0].removeprefix("--config=")
        fields = [argument.removeprefix("--config.").split("=")[0] for argument in arguments[1:]]
        sweep = runs.make_run(
            Path(base).stem, {field: configs.flatten(config.value)[field] for field in fields}
        )
        assert f"runs/{sweep.name}" == workdir


def test_argument_of_a_config_file_cannot_leave_the_runs_folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("from imp_jax.config import default\ndef get_config(_): return default()")
    arguments = ["main", f"--config={tmp_path}/own.py:../../a b"]
    monkeypatch.setattr(sys, "argv", arguments)
    values = flags.FlagValues()
    config = cli.define_config(values)
    values(arguments)
    assert cli.find_workdir(None, config.value, values["config"]) == Path("runs/own-..-..-a-b")


def test_ascii_terminal_gets_question_marks_for_other_characters(tmp_path, data_dir):
    """The command has no --workdir, so the run is in runs/."""
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


@pytest.fixture
def config_file(tmp_path):
    """Return a function that writes a config file and returns the flag that names it."""

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
        ([CONFIG, "--workdir=~no_such_user/w"], "there is no home directory to replace ~ with"),
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
def test_bad_input_prints_one_sentence_and_fails(tmp_path, arguments, sentence):
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
def test_bad_config_file_prints_one_sentence(tmp_path, config_file, body, sentence):
    code, _, err = run(config_file(body), f"--workdir={tmp_path / 'run'}")
    assert code != 0
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_overrides_may_set_fields_that_are_none():
    config = configs.default()
    arguments = ["--config.dataset.data_dir=/data", "--config.optimizer.momentum=0.5", "--config.epochs=3"]
    parsed = cli.parse_overrides(arguments, config.copy_and_resolve_references())
    assert parsed == {"dataset.data_dir": "/data", "optimizer.momentum": 0.5, "epochs": 3}
    assert config.dataset.data_dir is None
    assert cli.parse_overrides(["--config.dataset.augmentation=('crop',)"], config) == {
        "dataset.augmentation": ("crop",)
    }
