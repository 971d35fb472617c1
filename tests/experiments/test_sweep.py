"""Sweeps: names, states and estimated costs of runs, and the command `experiments.run`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from absl import flags
from filelock import FileLock
from ml_collections import config_flags

from experiments import run as run_command
from experiments.paper.catalogue import FIGURES, list_runs
from experiments.paper.scales import MINI, PAPER, SCALES, SMOKE
from experiments.sweeps import cost, launchers, pack
from experiments.sweeps.runs import Branch, Run, RunPack, make_run, pack_runs
from experiments.sweeps.sweep import Sweep
from imp_jax import __version__, config_files
from imp_jax.errors import UserError
from imp_jax.runtime.distributed import visible_gpus
from imp_jax.runtime.signals import GracefulStop
from imp_jax.workdir.checkpoints import versions
from tests.helpers import ROOT
from tests.helpers.tables import tables

ALL_RUNS = {run for scale in SCALES.values() for run in list_runs(FIGURES.values(), scale)}
MAIN_RUNS = [run for run in ALL_RUNS if isinstance(run, Run)]


def test_names_of_runs_are_unique_and_valid_names_of_folders():
    assert len({run.name for run in ALL_RUNS}) == len(ALL_RUNS)
    for run in ALL_RUNS:
        assert len(f"{run.name}.failed") < 255
        assert not set(run.name) & set(" /\\'\"()*?$&;|<>")
    assert PAPER.make_resnet20_run(128) == PAPER.resnet20  # values of the base config are not part of the name
    assert PAPER.make_resnet20_run(1024, optimizer__warmup_epochs=10.0).name == (
        "resnet20,batch_size=1024,optimizer.warmup_epochs=10"
    )


def test_the_command_of_a_run_makes_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for run in MAIN_RUNS:
        parsed = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=parsed, lock_config=False)
        flags.DEFINE_string("workdir", None, "", flag_values=parsed)
        _, *command = run.command(tmp_path)
        assert command[:2] == ["-m", "imp_jax.main"]
        monkeypatch.setattr(sys, "argv", command[1:])  # from which ml_collections reads the overrides
        parsed(command[1:])
        assert parsed.config.on_divergence == "drop"
        assert config_files.differences(parsed.config, json.loads(config_files.to_json(run.config))) == []
        assert parsed.workdir == str(tmp_path)


def test_figures_share_their_runs():
    runs = list_runs((FIGURES[f"fig{n}"] for n in (1, 2, 4, 5, 6, 8)), PAPER)
    assert len(runs) == 12
    assert sum(run.trainings for run in runs) == 1800 + 12 * 9  # section A.2, and twins


def test_an_unknown_field_raises_a_user_error():
    with pytest.raises(UserError, match="there is no config field batch"):
        make_run("lenet", {"batch": 3})


def test_costs_follow_from_the_throughput():
    device = {"images_per_second": {"lenet": {"60": 100.0, "100": 200.0}}, "repulsion": {"lenet": 1.5}}
    plain = Run("mnist5k", (("batch_size", 80), ("replicates", 1), ("rounds", 2), ("instability.rounds", ())))
    images = 2 * 2 * 10 * 50 * 80  # arms, rounds, epochs, steps of a batch
    assert cost.estimate_seconds(plain, device) == images / 150
    repelled = Run("mnist5k", (*plain.overrides, ("repulsion.strength", 2.0)))
    assert cost.estimate_seconds(repelled, device | {"besides": {"lenet": 7}}) == 1.5 * images / 150 + 7
    assert cost.estimate_seconds(PAPER.conv4, device) is None
    assert cost.format_duration(None) == "not measured"
    assert [cost.format_duration(s) for s in (0, 119, 120, 7199, 7200, 3 * 86400, 1e7)] == [
        *("0 s", "119 s", "2 min", "120 min", "2 h", "3 days", "116 days"),
    ]


def test_list_prints_one_row_per_figure(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # has no effect, as the output is not a terminal
    run_experiments("list")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == [*FIGURES, "together"]
    (fig14,) = (row for row in rows if "fig14" in row)
    assert "LeNet-300-100" in fig14
    assert "318" in fig14  # 2 × (25 rounds × 2 arms × 3 replicates + 9 twins)


def run_experiments(*arguments):
    """Run `python -m experiments.run` with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run", *map(str, arguments)])
        run_command.main()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["list", "fig24"], "the figure is 'fig24'; it should be one of fig1, fig2"),
        (["list", "--scale=large"], "--scale is 'large'; it should be one of paper, midi, mini, smoke"),
        (["run", "--launcher=cloud"], "--launcher is 'cloud'; it should be one of local, slurm"),
        (["figure", "fig1", "--scale=mini"], "nothing of fig1 at scale mini has been run in"),
        (["figure", "--scale=mini", "fig1", "fig2"], "nothing of fig1, fig2 at scale mini has been run in"),
        (["run", "--launcher=slurm", "--timeout_min=0"], "--timeout_min is 0; it should be at least 1"),
        (["run", "--data_dir="], "--data_dir is empty; it should be the path of a folder"),
        (["run", "--data_dir=~no_such_user/x"], "--data_dir is '~no_such_user/x', and there is no home"),
        (["run", "fig1", "--data_dir=ROOT"], "cifar-10-binary.tar.gz: "),  # the tests have no network
    ],
)
def test_bad_input_exits_with_one_line(arguments, sentence, tmp_path, capsys):
    arguments = [argument.replace("ROOT", str(tmp_path)) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        run_experiments(*arguments, f"--root={tmp_path / 'sweep'}")
    assert str(error.value).startswith("error: ")
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_a_root_that_is_no_path_is_refused():
    for root, sentence in (("", "--root is empty"), ("~no_such_user/x", "--root is '~no_such_user/x'")):
        with pytest.raises(SystemExit, match=f"error: {sentence}"):
            run_experiments("status", "fig18", f"--root={root}")


@pytest.mark.parametrize("action", ["status", "run", "figure"])
def test_a_root_that_is_a_file_is_refused(action, tmp_path, data_dir):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: cannot use .*/file.*: Not a directory"):
        run_experiments(
            action, "fig18", "--scale=smoke", f"--root={tmp_path / 'file'}", f"--data_dir={data_dir}"
        )


def test_missing_slurm_is_reported(tmp_path, monkeypatch, data_dir):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="there is no Slurm here: sbatch is not found; use --launcher=local"):
        run_experiments(
            "run", "fig18", "--scale=smoke", "--launcher=slurm", f"--root={tmp_path}", f"--data_dir={data_dir}"
        )


@pytest.mark.parametrize("action", ["status", "run", "figure"])
def test_a_run_of_another_config_or_version_under_a_name_is_refused(action, tmp_path):
    workdir = tmp_path / MINI.lenet.name
    version = workdir / "checkpoints" / "0" / "version" / "metadata"
    version.parent.mkdir(parents=True)
    same = json.loads(config_files.to_json(MINI.lenet.config))
    for stored, written_by, difference in (
        (same | {"seed": 1}, __version__, "seed is 1 there and 0 here"),
        (same | {"lookahead": 3}, __version__, "lookahead is 3 there and absent here"),
        (same, "0.0.7", "it was written by imp_jax 0.0.7"),
    ):
        (workdir / "config.json").write_text(json.dumps(stored))
        version.write_text(json.dumps({"imp_jax": written_by}))
        with pytest.raises(SystemExit) as error:
            run_experiments(action, "fig18", "--scale=mini", f"--root={tmp_path}")
        assert (
            f"holds a run of another config or version (this is imp_jax {__version__}): {difference}; give"
            in (str(error.value))
        )


def test_figure_reports_missing_runs_and_diverged_members(tmp_path, capsys):
    plain, repelled = FIGURES["fig14"].runs(MINI)
    workdir = tmp_path / plain.name
    workdir.mkdir()
    (workdir / "config.json").write_text(config_files.to_json(plain.config))
    tables(plain, rounds=9).results.to_csv(workdir / "results.csv", index=False)
    (workdir / "divergences.csv").write_text("replicate,arm,round,step,what\n2,reinit,7,40,loss is nan\n")
    with pytest.raises(SystemExit, match="error: nothing of fig17 at scale mini has been run"):
        run_experiments("figure", "fig14", "fig17", "table1", "--scale=mini", f"--root={tmp_path}")
    out = capsys.readouterr().out
    assert f"fig14: {tmp_path / 'figures' / 'fig14.png'}" in out
    assert f"lacks {plain.name}: missing, 9 of 25 rounds" in out
    assert f"without reinit 2 from round 7 of {plain.name}, which diverged" in out
    assert f"lacks {repelled.name}: missing, 0 of 25 rounds" in out
    assert "266,610" in out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"fig14.png", "fig14.pdf", "table1.md"}


def test_a_failing_run_is_tried_twice_and_reported(tmp_path, monkeypatch, capsys, data_dir):
    command = [sys.executable, "-c", "print('error: no such luck'); raise SystemExit(3)"]
    monkeypatch.setattr(Run, "command", lambda *_: command)
    arguments = ("fig18", "--scale=smoke", f"--root={tmp_path}", f"--data_dir={data_dir}")
    with pytest.raises(SystemExit, match="error: 1 runs failed; what they printed is in"):
        run_experiments("run", *arguments)
    out = capsys.readouterr().out
    assert out.count("exit status 3: no such luck") == 2
    assert out.count("trying again") == 1
    (state,) = Sweep(tmp_path).read_states([SMOKE.lenet]).values()
    assert state == ("failed", 0, "exit status 3: no such luck")
    run_experiments("status", *arguments)
    assert "1 failed" in capsys.readouterr().out


def test_the_reason_of_a_failure_is_taken_from_the_last_attempt(tmp_path):
    sweep = Sweep(tmp_path)
    sweep.logs.mkdir()
    sweep.log_path(SMOKE.lenet).write_text("$ train\nerror: no such luck\n$ train\ngoing on\n")
    assert launchers.note_failure(sweep, SMOKE.lenet, -9) == "killed by SIGKILL: going on"
    with open(sweep.log_path(SMOKE.lenet), "a") as log:
        log.write("$ train\n")
    assert launchers.note_failure(sweep, SMOKE.lenet, 1) == "exit status 1: it printed nothing"


def test_a_run_whose_job_left_the_queue_has_failed(tmp_path, monkeypatch, capsys):
    sweep = Sweep(tmp_path)
    sweep.logs.mkdir()
    sweep.log_path(SMOKE.lenet, "job").write_text("12_3")
    squeue = tmp_path / "squeue"
    squeue.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    squeue.write_text("#!/bin/sh\necho 12_2 12_3")
    assert sweep.read_states([SMOKE.lenet])[SMOKE.lenet].status == "queued"
    squeue.write_text("#!/bin/sh\necho 12_2")
    assert sweep.read_states([SMOKE.lenet])[SMOKE.lenet].status == "failed"
    run_experiments("status", "fig18", "--scale=smoke", f"--root={tmp_path}")
    assert "failed: job 12_3 is gone; its log is in" in capsys.readouterr().out
    squeue.write_text("#!/bin/sh\necho '[timed out]' >&2; exit 1")
    with pytest.raises(SystemExit, match=r"which jobs are in Slurm's queue: \[timed out\]"):
        run_experiments("run", "fig18", "--scale=smoke", f"--root={tmp_path}")


def test_run_waits_for_runs_that_another_process_trains(tmp_path, monkeypatch, capsys, data_dir):
    monkeypatch.setattr(Run, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('left to us')"])
    workdir = tmp_path / SMOKE.lenet.name
    workdir.mkdir()
    (workdir / ".holder").write_text("process 1 on elsewhere")
    lock = FileLock(workdir / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(3, lock.release).start()
    start = time.monotonic()
    with pytest.raises(SystemExit, match="1 runs failed"):
        run_experiments("run", "fig18", "--scale=smoke", f"--root={tmp_path}", f"--data_dir={data_dir}")
    assert time.monotonic() - start > 2
    out = capsys.readouterr().out
    assert "0 runs to train, 1 running" in out
    assert f"waiting for another process, which trains {SMOKE.lenet.name}" in out
    assert "left to us; trying again" in out  # after the lock is released, this process trains it


def test_trainings_end_if_their_launcher_fails(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(Run, "command", lambda *_: command)

    def fail_to_print(_):
        raise BrokenPipeError

    start = time.monotonic()
    with pytest.raises(BrokenPipeError):
        launchers.train_locally(Sweep(tmp_path), [SMOKE.lenet], None, fail_to_print)
    assert time.monotonic() - start < 30


def test_each_gpu_has_one_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    command = [
        sys.executable,
        "-c",
        "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)",
    ]
    monkeypatch.setattr(Run, "command", lambda *_: command)
    sweep, runs, lines = Sweep(tmp_path), list_runs(FIGURES.values(), SMOKE)[:3], []
    assert launchers.train_locally(sweep, runs, None, lines.append) == 0
    assert [line.split()[0] for line in lines[:3]] == ["started", "started", "done"]  # two at a time
    gpus = [sweep.log_path(run).read_text().splitlines()[-1] for run in runs]
    assert set(gpus[:2]) == {"3", "5"}
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert visible_gpus(os.environ) == []


def test_a_stopped_sweep_can_be_resumed(tmp_path, data_dir):
    """Ctrl-C stops the first of two runs. The same command then finishes both and draws the figures."""
    sweep, (plain, repelled) = Sweep(tmp_path), FIGURES["fig14"].runs(SMOKE)
    names = ("fig14", "fig18", "fig20")
    command = [sys.executable, "-m", "experiments.run", "run", *names, "--scale=smoke"]
    command += [f"--root={tmp_path}", f"--data_dir={data_dir}"]
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        end = time.monotonic() + 120
        while sweep.read_states([plain])[plain].rounds < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT; the same command continues" in err
    assert f"started {plain.name}" in out
    assert f"started {repelled.name}" not in out
    stopped = sweep.read_states([plain])[plain]
    assert stopped.status == "missing"
    assert stopped.rounds >= 2
    rows = (sweep.workdir(plain) / "results.csv").read_text()

    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert {state.status for state in sweep.read_states([plain, repelled]).values()} == {"done"}
    assert (sweep.workdir(plain) / "results.csv").read_text().startswith(rows)
    for name in names:
        assert f"{name}: {tmp_path / 'figures' / name}.png" in finished.stdout
        assert (tmp_path / "figures" / f"{name}.pdf").stat().st_size > 1000
    assert "lacks" not in finished.stdout
    assert not sweep.log_path(plain, "failed").exists()
    assert versions(sweep.workdir(plain)) == {__version__}


SMALL = {"rounds": 2, "epochs": 2, "replicates": 1, "model.width": 0.1, "instability.rounds": ()}


def test_runs_that_differ_only_in_arguments_of_the_steps_are_packed():
    rates = [make_run("mnist5k", SMALL | {"optimizer.learning_rate": rate}) for rate in (1e-3, 2e-3, 3e-3)]
    decays = [make_run("mnist5k", SMALL | {"optimizer.weight_decay": decay}) for decay in (1e-4, 1e-3)]
    repelled = make_run("mnist5k", SMALL | {"repulsion.strength": 2.0})
    tuned = [make_run("mnist5k", SMALL | {"execution": "tune", "seed": seed}) for seed in (0, 1)]
    other = make_run("mnist5k", SMALL | {"batch_size": 50})
    runs = [rates[0], decays[0], repelled, *tuned, rates[1], decays[1], other, rates[2]]
    packs = pack_runs(runs, 2)
    assert [one.runs for one in packs] == [
        (rates[0], rates[1]),
        (rates[2],),
        tuple(decays),
        (repelled,),
        *((run,) for run in tuned),
        (other,),
    ]
    assert packs[1] == rates[2]
    assert set(pack_runs(runs, 1)) == set(runs)
    branch = next(run for run in ALL_RUNS if isinstance(run, Branch))
    assert pack_runs([branch, branch.trunk], 2) == [branch, branch.trunk]
    _, module, name, root, _, *texts = packs[0].command(Path("/runs"), "/data")
    assert (module, name, root) == ("-m", "experiments.sweeps.pack", "--root=/runs")
    assert tuple(map(pack.parse_run, texts)) == packs[0].runs


def test_packed_runs_are_trained_and_analysed_as_single_ones(tmp_path, data_dir):
    runs = [make_run("mnist5k", SMALL | {"optimizer.learning_rate": rate}) for rate in (1e-3, 2e-3)]
    sweeps, lines = [Sweep(tmp_path / name) for name in ("packed", "single")], []
    assert launchers.train_locally(sweeps[0], runs, data_dir, lines.append, pack=2) == 0
    (packed,) = pack_runs(runs, 2)
    assert lines[0] == f"started {packed.name}: {runs[0].name}; {runs[1].name}"
    assert lines[1].startswith(f"done    {packed.name} after")
    assert not sweeps[0].log_path(packed, "failed").exists()
    assert len(lines) == 2
    assert {state.status for state in sweeps[0].read_states(runs).values()} == {"done"}
    sweeps[0].check_configs_match(runs)
    assert launchers.train_locally(sweeps[1], runs[1:], data_dir, lines.append) == 0
    results = [pd.read_csv(s.workdir(runs[1]) / "results.csv").drop(columns="seconds") for s in sweeps]
    packed_results, results = results
    for name in ("replicate", "arm", "round", "density"):
        pd.testing.assert_series_equal(packed_results[name], results[name])
    pd.testing.assert_series_equal(packed_results["train_loss"], results["train_loss"], rtol=0.02)
    assert (sweeps[0].workdir(runs[1]) / "config_file.py").read_text().count("get_config") == 1


def test_the_runs_of_a_failed_pack_are_trained_one_by_one(tmp_path, monkeypatch):
    fail = [sys.executable, "-c", "print('error: no memory'); raise SystemExit(1)"]
    monkeypatch.setattr(RunPack, "command", lambda *_: fail)
    monkeypatch.setattr(Run, "command", lambda *_: [sys.executable, "-c", ""])
    runs, lines = [make_run("mnist5k", SMALL | {"seed": seed}) for seed in (0, 1)], []
    assert launchers.train_locally(Sweep(tmp_path), runs, None, lines.append, pack=2) == 0
    assert [line.split()[0] for line in lines] == ["started", "failed", "started", "done", "started", "done"]
    assert "exit status 1: no memory; trying again" in lines[1]
    monkeypatch.setattr(Run, "command", lambda *_: fail)
    assert launchers.train_locally(Sweep(tmp_path / "other"), runs, None, lines.append, pack=2) == 2
    states = Sweep(tmp_path / "other").read_states(runs).values()
    assert [state.why for state in states] == ["exit status 1: no memory"] * 2


def test_a_run_of_a_pack_that_cannot_train_is_named(tmp_path, data_dir, capsys):
    runs = [make_run("mnist5k", SMALL | {"seed": seed, "rounds": 1, "epochs": 1}) for seed in (0, 1)]
    (tmp_path / runs[0].name).mkdir()
    (tmp_path / runs[0].name / "config.json").write_text("{}")
    errors = pack.train_runs(runs, Sweep(tmp_path), data_dir, GracefulStop())
    assert errors[1] is None
    assert pack.report_errors(runs, errors) == 1
    assert capsys.readouterr().err.startswith(f"error: {runs[0].name}: ")
    assert pack.report_errors(runs, [None, None]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("list", "--pack=2"), "--pack is 2; it is for run with --launcher=local"),
        (("run", "--pack=2", "--launcher=slurm"), "--pack is 2; it is for run with --launcher=local"),
        (("run", "--pack=0"), "--pack is 0; it should be at least 1"),
    ],
)
def test_pack_is_refused_where_nothing_is_trained_here(arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run_experiments(*arguments, "--scale=smoke")
