"""What is written while a run trains, and in which order."""

import contextlib
import errno
import re
import shutil
import threading
import time
import traceback
import warnings

import jax
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from imp_jax import analysis, divergence, experiment, figures, imp, masking, runs
from imp_jax.arms import Member, take_members
from imp_jax.errors import UserError
from imp_jax.round_state import EpochEnd, RoundEnd
from imp_jax.training import Metrics
from imp_jax.workdir import recorder
from imp_jax.workdir.checkpoints import Checkpoints, MidRoundState, RoundNetworks
from imp_jax.workdir.recorder import Recorder
from imp_jax.workdir.results import FIELDS
from tests.conftest import make_tiny_config, quick_config
from tests.helpers import workdirs


def test_a_row_is_there_only_once_its_round_is_on_disk(data_dir, tmp_path, monkeypatch):
    """And a round that could not be recorded is said before what went wrong after it."""
    save = Checkpoints.save

    def look_and_save(self, number, *args, **kwargs):
        assert (tmp_path / "results.csv").read_text().count("\n") == 1 + 2 * number
        if number == 1:
            raise OSError("disk full")
        save(self, number, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", look_and_save)
    with pytest.raises(
        UserError, match=r"cannot record round \d in .*disk full; the rounds before it are kept"
    ):
        runs.run(quick_config(data_dir), tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0, 0]


def test_the_state_is_saved_as_often_as_the_config_says(data_dir, tmp_path, monkeypatch):
    saved = []
    save = Checkpoints.save_progress

    def note_and_save(self, number, progress, steps):
        saved.append((number, progress.step))
        save(self, number, progress, steps)

    monkeypatch.setattr(Checkpoints, "save_progress", note_and_save)
    monkeypatch.setattr(
        "imp_jax.workdir.recorder.Future.done", lambda future: True
    )  # a disk as fast as any training
    runs.run(quick_config(data_dir, rounds=2, epochs=5, checkpoint_every_epochs=2), tmp_path / "run")
    assert saved == [(0, 16), (0, 32), (1, 16), (1, 32)]


def open_recorder(config, workdir):
    return Recorder(experiment.setup(config), config, workdir)


def epoch_end(number, diverged=None):
    """The end of an epoch of one step of two members."""
    progress = MidRoundState(1, None, None, divergence.init_history(2), 0.1)
    metrics = Metrics(np.zeros((1, 2)), np.zeros((1, 2)))
    return EpochEnd(number, (), progress, metrics, 0.1, 0.0, diverged or {})


BROKEN = {Member("imp", 0): (1, "it broke")}


def test_after_a_failure_nothing_is_written_and_leaving_says_so(data_dir, tmp_path):
    in_the_way = tmp_path / "divergences.csv"

    def fail_and_go_on():
        with open_recorder(quick_config(data_dir), tmp_path) as recorder:
            recorder.begin(3, 0)
            in_the_way.mkdir()
            with pytest.raises(UserError, match="cannot record round 3"):
                recorder.on_epoch(epoch_end(3, BROKEN))
            in_the_way.rmdir()
            with pytest.raises(UserError, match="cannot record round 3"):
                recorder.on_epoch(epoch_end(3, BROKEN))

    with pytest.raises(
        UserError, match=r"cannot record round 3 in .*IsADirectoryError.*the same command continues"
    ):
        fail_and_go_on()
    assert not in_the_way.exists()


def test_a_divergence_that_ends_a_run_is_recorded_or_said_and_the_workdir_released(data_dir, tmp_path):
    def diverge():
        with open_recorder(quick_config(data_dir), tmp_path) as recorder:
            recorder.begin(3, 0)
            raise divergence.DivergedError("round 3 diverged", 3, BROKEN)

    path = tmp_path / "divergences.csv"
    path.mkdir()
    with pytest.raises(UserError, match="cannot record round 3"):
        diverge()
    assert is_free(tmp_path)
    path.rmdir()
    with pytest.raises(divergence.DivergedError, match="round 3 diverged"):
        diverge()
    assert is_free(tmp_path)
    assert path.read_text() == "replicate,arm,round,step,what\n0,imp,3,1,it broke\n"


def test_a_divergence_is_there_before_its_round(tiny_experiment, tmp_path, monkeypatch):
    """A process that goes on after the round would not find it out again."""
    save = Checkpoints.save

    def look_and_save(self, number, *args, **kwargs):
        assert "reinit,0,10,it fell" in (tmp_path / "divergences.csv").read_text()
        save(self, number, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", look_and_save)
    with Recorder(tiny_experiment(), make_tiny_config(), tmp_path) as recorder:
        recorder.begin(0, 0)
        recorder.on_round(round_end(tiny_experiment(), 0, {Member("reinit", 1): (10, "it fell")}))
        recorder.wait()


def round_end(trained, number, diverged=None):
    """The end of a round whose networks are their initialisations."""
    state = imp.init_state(trained)
    members = tuple(member for member in trained.members if member not in (diverged or {}))
    networks = RoundNetworks(state.tickets, state.tickets, masking.ones_like(state.tickets["params"]))
    row = dict.fromkeys(FIELDS, 0.5)
    rows = [row | member._asdict() | {"round": number} for member in members]
    networks = take_members(jax.tree.map(np.asarray, networks), trained.members, members)
    return RoundEnd(number, members, networks, rows, None, members, None, diverged or {})


def test_a_divergence_is_recorded_once(data_dir, tmp_path):
    for _ in range(2):
        with open_recorder(quick_config(data_dir), tmp_path) as recorder:
            recorder.begin(0, 0)
            recorder.on_epoch(epoch_end(0, {Member("reinit", 2): (7, "it broke")}))
    assert (
        tmp_path / "divergences.csv"
    ).read_text() == "replicate,arm,round,step,what\n2,reinit,0,7,it broke\n"


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (TypeError("a bug"), TypeError, "a bug"),
        (SystemExit(1), RuntimeError, "SystemExit: 1"),
        (
            OSError(errno.ENOSPC, "full"),
            UserError,
            "cannot record round 1 in .*full; the rounds before it are kept",
        ),
        (
            ValueError("UNKNOWN: Error [os_error_code='28']"),
            UserError,
            "cannot record round 1 .*: No space left",
        ),
        (FileNotFoundError(errno.ENOENT, "a bug", "/elsewhere/file"), FileNotFoundError, "a bug"),
    ],
)
def test_only_errors_of_the_file_system_are_the_users(tiny_experiment, tmp_path, error, raised, words):
    """Whatever else the recording thread raises is a bug: it keeps its traceback, and tells of the round."""

    def fail():
        try:
            raise OSError("handled, and no cause")
        except OSError:
            raise error from None

    def record():
        with Recorder(tiny_experiment(), make_tiny_config(), tmp_path) as opened:
            opened.begin(1, 0)
            opened._submit(1, fail)
            opened._thread.shutdown()
            opened.on_epoch(epoch_end(1))

    with pytest.raises(raised, match=words) as caught:
        record()
    at_fault = caught.value if caught.value is error else caught.value.__cause__
    assert traceback.extract_tb(at_fault.__traceback__)[-1].name == "fail"
    if raised is not UserError:
        assert caught.value.__notes__ == [
            f"while recording round 1 in {tmp_path}; the rounds before it are kept"
        ]


def test_figures_and_event_files_are_not_needed_to_go_on(tiny_experiment, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("latex could not be found\n" + 50 * "Traceback ")

    monkeypatch.setattr(figures, "to_bytes", fail)
    (tmp_path / "events").touch()  # a file where the folder should be
    trained = tiny_experiment()
    with Recorder(trained, make_tiny_config(), tmp_path) as opened:
        opened.begin(0, 0)
        for number in range(2):
            opened.on_round(round_end(trained, number))
        opened.wait()
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0] * 4 + [1] * 4
    events, figure = sorted(capsys.readouterr().err.splitlines())
    assert events.startswith(f"{tmp_path} is without event files, which cannot be written: NotADirectoryError")
    assert f"{tmp_path} is without figures/accuracy.png, which cannot be written: RuntimeError: la" in figure


@pytest.mark.parametrize("timeout", [300.0, 0.05])
def test_the_workdir_is_held_while_anything_is_written(tiny_experiment, tmp_path, monkeypatch, timeout):
    """Also where the main thread has failed on a device, and no longer waits."""
    monkeypatch.setattr(recorder, "_RECORDING_TIMEOUT_S", timeout)
    end, held = threading.Event(), []

    def write():
        end.wait(0.3 if timeout > 1 else 60)
        held.append((tmp_path / ".holder").exists() and not is_free(tmp_path))

    def fail_on_a_device():
        with Recorder(tiny_experiment(), make_tiny_config(), tmp_path) as opened:
            opened.begin(0, 0)
            opened._submit(0, write)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(jax.errors.JaxRuntimeError):
        fail_on_a_device()
    if timeout < 1:
        assert not held
        assert not is_free(tmp_path)
        end.set()
        for _ in range(500):
            if is_free(tmp_path):
                break
            time.sleep(0.01)
    assert held == [True]
    assert is_free(tmp_path)


def is_free(workdir):
    try:
        with FileLock(workdir / ".lock", thread_local=False).acquire(timeout=0):
            return True
    except TimeoutError:
        return False


def compute(workdir, config):
    """The tables, without figures and report."""
    results = pd.read_csv(workdir / "results.csv")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        analysis.compute(checkpoints, config, lambda: experiment.setup(config), workdir, results)


@pytest.mark.parametrize("commit", workdirs.EARLIER)
def test_a_workdir_of_an_earlier_version_is_usable(data_dir, tmp_path, capsys, commit):
    """It is loaded, analysed and gone on with; and what was deleted of it by hand is said."""
    workdir = workdirs.unpack(commit, tmp_path / "run")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        before = analysis.load(workdir)
    assert [re.search(r"(\w+)\.csv was computed by an earlier", str(w.message))[1] for w in warned] == list(
        workdirs.EARLIER[commit]
    )
    config = before.config
    config.dataset.data_dir = data_dir
    assert before.round(1).mask["Dense_0"]["kernel"].shape[0] == len(before.members(1)) == 3
    for name in ("histograms", "weights", "layers"):
        (workdir / "analysis" / f"{name}.csv").unlink()
    compute(workdir, config)
    after = analysis.load(workdir)
    pd.testing.assert_frame_equal(after.histograms, before.histograms, rtol=1e-5)
    pd.testing.assert_series_equal(after.layers["survivors"], before.layers["survivors"])
    moved = set(workdirs.EARLIER[commit]) - {"layers"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(moved)
    for name, line in zip(moved, said, strict=True):
        assert line.startswith(f"{workdir / 'analysis' / name}.csv was computed by an earlier version")
        assert (workdir / "set-aside" / f"analysis-{name}.csv").exists()
    assert len(after.distances) == len(before.distances)

    first = (workdir / "checkpoints" / "0").rename(tmp_path / "0")
    runs.run(config, workdir)
    said = capsys.readouterr()
    lost = f"{workdir} has no checkpoint of round 0, which is in results.csv; analyses leave it out\n"
    assert said.err == lost
    assert "is finished: all 2 rounds are trained, nothing to do" in said.out
    after.weights.query("round == 1").to_csv(workdir / "analysis" / "weights.csv", index=False)
    compute(workdir, config)
    assert capsys.readouterr().err == f"{workdir} has no checkpoint of round 0; the analyses leave it out\n"
    assert set(analysis.load(workdir).weights["round"]) == {1}
    first.rename(workdir / "checkpoints" / "0")

    shutil.rmtree(workdir / "checkpoints" / "1")
    runs.run(config, workdir)
    again = f"{workdir} has no checkpoint of round 1, which is in results.csv; it is trained again\n"
    assert capsys.readouterr().err == again
    after = analysis.load(workdir)
    columns = ["replicate", "arm", "round", "density"]
    pd.testing.assert_frame_equal(after.results[columns], before.results[columns])
    np.testing.assert_allclose(after.results["test_loss"], before.results["test_loss"], rtol=0.02)

    results = (workdir / "results.csv").read_bytes()
    for number in (0, 1):
        shutil.rmtree(workdir / "checkpoints" / str(number))
    for _ in range(2):
        with pytest.raises(UserError, match=r"has results\.csv and no rounds in its folder checkpoints; put"):
            runs.run(config, workdir)
    assert (workdir / "results.csv").read_bytes() == results
