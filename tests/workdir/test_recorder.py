"""The recorder: what it writes during a run, in which order, and what it does if a write fails."""

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

from imp_jax import analysis, divergence, figures, imp, masking, runs
from imp_jax.errors import UserError
from imp_jax.experiment import setup
from imp_jax.members import Member, take_members
from imp_jax.round_state import EpochEnd, RoundEnd
from imp_jax.training import Metrics
from imp_jax.workdir.checkpoints import Checkpoints, MidRoundState, RoundNetworks
from imp_jax.workdir.recorder import Recorder
from imp_jax.workdir.results import FIELDS
from tests.conftest import make_tiny_config, quick_config
from tests.helpers import workdirs


def test_rows_are_written_after_the_checkpoint_of_their_round(data_dir, tmp_path, monkeypatch):
    """If the checkpoint cannot be saved, the run ends with an error and the rows are not written."""
    save = Checkpoints.save

    def check_and_save(self, number, *args, **kwargs):
        assert (tmp_path / "results.csv").read_text().count("\n") == 1 + 2 * number
        if number == 1:
            raise OSError("disk full")
        save(self, number, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", check_and_save)
    with pytest.raises(
        UserError, match=r"cannot record round \d in .*disk full; the rounds before it are kept"
    ):
        runs.run(quick_config(data_dir), tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0, 0]


def test_checkpoint_every_epochs_sets_when_the_state_is_saved(data_dir, tmp_path, monkeypatch):
    saved = []
    save = Checkpoints.save_progress

    def record_and_save(self, number, progress, steps):
        saved.append((number, progress.step))
        save(self, number, progress, steps)

    monkeypatch.setattr(Checkpoints, "save_progress", record_and_save)
    # otherwise a save is skipped while an earlier one is still being written
    monkeypatch.setattr("imp_jax.workdir.recorder.Future.done", lambda future: True)
    runs.run(quick_config(data_dir, rounds=2, epochs=5, checkpoint_every_epochs=2), tmp_path / "run")
    assert saved == [(0, 16), (0, 32), (1, 16), (1, 32)]


def open_recorder(config, workdir):
    return Recorder(setup(config), config, workdir)


def make_epoch_end(number, diverged=None):
    """Make the end of an epoch of one step and two members."""
    progress = MidRoundState(1, None, None, divergence.init_history(2), 0.1)
    metrics = Metrics(np.zeros((1, 2)), np.zeros((1, 2)))
    return EpochEnd(number, (), progress, metrics, 0.1, 0.0, diverged or {}, 2)


DIVERGED = {Member("imp", 0): (1, "it broke")}


def test_after_a_failed_write_nothing_is_written_and_closing_raises(data_dir, tmp_path):
    blocking_folder = tmp_path / "divergences.csv"

    def fail_and_continue():
        with open_recorder(quick_config(data_dir), tmp_path) as recorder:
            recorder.begin(3, 0)
            blocking_folder.mkdir()
            with pytest.raises(UserError, match="cannot record round 3"):
                recorder.on_epoch(make_epoch_end(3, DIVERGED))
            blocking_folder.rmdir()
            with pytest.raises(UserError, match="cannot record round 3"):
                recorder.on_epoch(make_epoch_end(3, DIVERGED))

    with pytest.raises(
        UserError, match=r"cannot record round 3 in .*IsADirectoryError.*the same command continues"
    ):
        fail_and_continue()
    assert not blocking_folder.exists()


def test_a_divergence_that_ends_a_run_is_recorded_and_the_workdir_unlocked(data_dir, tmp_path):
    def diverge():
        with open_recorder(quick_config(data_dir), tmp_path) as recorder:
            recorder.begin(3, 0)
            raise divergence.DivergedError("round 3 diverged", 3, DIVERGED)

    path = tmp_path / "divergences.csv"
    path.mkdir()
    with pytest.raises(UserError, match="cannot record round 3"):
        diverge()
    assert is_unlocked(tmp_path)
    path.rmdir()
    with pytest.raises(divergence.DivergedError, match="round 3 diverged"):
        diverge()
    assert is_unlocked(tmp_path)
    assert path.read_text() == "replicate,arm,round,step,what\n0,imp,3,1,it broke\n"


def test_a_divergence_is_recorded_before_its_round(tiny_experiment, tmp_path, monkeypatch):
    """A process that resumes after this round would not detect the divergence."""
    save = Checkpoints.save

    def check_and_save(self, number, *args, **kwargs):
        assert "reinit,0,10,it fell" in (tmp_path / "divergences.csv").read_text()
        save(self, number, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", check_and_save)
    with Recorder(tiny_experiment(), make_tiny_config(), tmp_path) as recorder:
        recorder.begin(0, 0)
        recorder.on_round(make_round_end(tiny_experiment(), 0, {Member("reinit", 1): (10, "it fell")}))
        recorder.wait()


def make_round_end(experiment, number, diverged=None):
    """Make the end of a round whose networks are their initialisations."""
    state = imp.init_state(experiment)
    members = tuple(member for member in experiment.members if member not in (diverged or {}))
    networks = RoundNetworks(state.tickets, state.tickets, masking.ones_like(state.tickets["params"]))
    row = dict.fromkeys(FIELDS, 0.5)
    rows = [row | member._asdict() | {"round": number} for member in members]
    networks = take_members(jax.tree.map(np.asarray, networks), experiment.members, members)
    return RoundEnd(number, members, networks, rows, None, members, None, diverged or {})


def test_a_divergence_is_recorded_once(data_dir, tmp_path):
    for _ in range(2):
        with open_recorder(quick_config(data_dir), tmp_path) as recorder:
            recorder.begin(0, 0)
            recorder.on_epoch(make_epoch_end(0, {Member("reinit", 2): (7, "it broke")}))
    assert (
        tmp_path / "divergences.csv"
    ).read_text() == "replicate,arm,round,step,what\n2,reinit,0,7,it broke\n"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
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
def test_only_errors_of_the_file_system_become_user_errors(tiny_experiment, tmp_path, error, raised, message):
    """Any other error of the recording thread is a bug: it keeps its traceback and gets a note on the round."""

    def fail():
        try:
            raise OSError("handled, not the cause")
        except OSError:
            raise error from None

    def record():
        with Recorder(tiny_experiment(), make_tiny_config(), tmp_path) as recorder:
            recorder.begin(1, 0)
            recorder._submit(1, fail)
            recorder._thread.shutdown()
            recorder.on_epoch(make_epoch_end(1))

    with pytest.raises(raised, match=message) as caught:
        record()
    original = caught.value if caught.value is error else caught.value.__cause__
    assert traceback.extract_tb(original.__traceback__)[-1].name == "fail"
    if raised is not UserError:
        assert caught.value.__notes__ == [
            f"while recording round 1 in {tmp_path}; the rounds before it are kept"
        ]


def test_a_run_continues_without_figures_and_event_files(tiny_experiment, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("latex could not be found\n" + 50 * "Traceback ")

    monkeypatch.setattr(figures, "to_bytes", fail)
    (tmp_path / "events").touch()  # a file where the folder should be
    experiment = tiny_experiment()
    with Recorder(experiment, make_tiny_config(), tmp_path) as recorder:
        recorder.begin(0, 0)
        for number in range(2):
            recorder.on_round(make_round_end(experiment, number))
        recorder.wait()
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0] * 4 + [1] * 4
    events, figure = sorted(capsys.readouterr().err.splitlines())
    assert events.startswith(f"{tmp_path} is without event files, which cannot be written: NotADirectoryError")
    assert f"{tmp_path} is without figures/accuracy.png, which cannot be written: RuntimeError: la" in figure


@pytest.mark.parametrize("timeout", [300.0, 0.05])
def test_the_workdir_is_locked_until_everything_is_written(tiny_experiment, tmp_path, monkeypatch, timeout):
    """Also if a device has failed and the main thread stops waiting for the recording thread at the timeout."""
    monkeypatch.setattr("imp_jax.workdir.recorder._RECORDING_TIMEOUT_S", timeout)
    end, locked = threading.Event(), []

    def write():
        end.wait(0.3 if timeout > 1 else 60)
        locked.append((tmp_path / ".holder").exists() and not is_unlocked(tmp_path))

    def fail_on_a_device():
        with Recorder(tiny_experiment(), make_tiny_config(), tmp_path) as recorder:
            recorder.begin(0, 0)
            recorder._submit(0, write)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(jax.errors.JaxRuntimeError):
        fail_on_a_device()
    if timeout < 1:
        assert not locked
        assert not is_unlocked(tmp_path)
        end.set()
        for _ in range(500):
            if is_unlocked(tmp_path):
                break
            time.sleep(0.01)
    assert locked == [True]
    assert is_unlocked(tmp_path)


def is_unlocked(workdir):
    try:
        with FileLock(workdir / ".lock", thread_local=False).acquire(timeout=0):
            return True
    except TimeoutError:
        return False


def compute_tables(workdir, config):
    """Compute the tables, without figures and report."""
    results = pd.read_csv(workdir / "results.csv")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        analysis.compute(checkpoints, config, lambda: setup(config), workdir, results)


@pytest.mark.parametrize("commit", workdirs.EARLIER)
def test_a_workdir_of_an_earlier_version_is_usable(data_dir, tmp_path, capsys, commit):
    """It can be loaded, analysed and resumed. Checkpoints that were deleted by hand are reported."""
    workdir = workdirs.unpack(commit, tmp_path / "run")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        old = analysis.load(workdir)
    assert [re.search(r"(\w+)\.csv was computed by an earlier", str(w.message))[1] for w in warned] == list(
        workdirs.EARLIER[commit]
    )
    config = old.config
    config.dataset.data_dir = data_dir
    assert old.round(1).mask["Dense_0"]["kernel"].shape[0] == len(old.members(1)) == 3
    for name in ("histograms", "weights", "layers"):
        (workdir / "analysis" / f"{name}.csv").unlink()
    compute_tables(workdir, config)
    new = analysis.load(workdir)
    pd.testing.assert_frame_equal(new.histograms, old.histograms, rtol=1e-5)
    pd.testing.assert_series_equal(new.layers["survivors"], old.layers["survivors"])
    moved = set(workdirs.EARLIER[commit]) - {"layers"}
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == len(moved)
    for name, line in zip(moved, messages, strict=True):
        assert line.startswith(f"{workdir / 'analysis' / name}.csv was computed by an earlier version")
        assert (workdir / "set-aside" / f"analysis-{name}.csv").exists()
    assert len(new.distances) == len(old.distances)

    round_0 = (workdir / "checkpoints" / "0").rename(tmp_path / "0")
    runs.run(config, workdir)
    output = capsys.readouterr()
    message = f"{workdir} has no checkpoint of round 0, which is in results.csv; analyses leave it out\n"
    assert output.err == message
    assert "is finished: all 2 rounds are trained, nothing to do" in output.out
    new.weights.query("round == 1").to_csv(workdir / "analysis" / "weights.csv", index=False)
    compute_tables(workdir, config)
    assert capsys.readouterr().err == f"{workdir} has no checkpoint of round 0; the analyses leave it out\n"
    assert set(analysis.load(workdir).weights["round"]) == {1}
    round_0.rename(workdir / "checkpoints" / "0")

    shutil.rmtree(workdir / "checkpoints" / "1")
    runs.run(config, workdir)
    message = f"{workdir} has no checkpoint of round 1, which is in results.csv; it is trained again\n"
    assert capsys.readouterr().err == message
    new = analysis.load(workdir)
    columns = ["replicate", "arm", "round", "density"]
    pd.testing.assert_frame_equal(new.results[columns], old.results[columns])
    np.testing.assert_allclose(new.results["test_loss"], old.results["test_loss"], rtol=0.02)

    results = (workdir / "results.csv").read_bytes()
    for number in (0, 1):
        shutil.rmtree(workdir / "checkpoints" / str(number))
    for _ in range(2):
        with pytest.raises(UserError, match=r"has results\.csv and no rounds in its folder checkpoints; put"):
            runs.run(config, workdir)
    assert (workdir / "results.csv").read_bytes() == results
