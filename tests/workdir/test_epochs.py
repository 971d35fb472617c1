"""epochs.csv: written round by round, and repaired from checkpoints when a workdir is opened."""

import shutil

import pandas as pd
import pytest

from imp_jax import runs
from imp_jax.workdir.checkpoints import Checkpoints
from imp_jax.workdir.epochs import FIELDS, EpochResults, read_epochs
from imp_jax.workdir.recorder import Recorder
from tests.conftest import make_tiny_config, make_tiny_dataset, make_tiny_experiment
from tests.workdir.test_tensorboard import read_events

CONFIG = {"evaluate_epochs": True, "dataset.validation": 0.2, "instability.rounds": (1,)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the workdir of a run of three rounds with two epochs, and a twin in round 1."""
    workdir = tmp_path_factory.mktemp("epochs") / "run"
    runs.run(make_tiny_config(**CONFIG), workdir, dataset=make_tiny_dataset())
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """Return a copy of the workdir."""
    return shutil.copytree(finished, tmp_path / "run")


def reopen(workdir):
    """Open a workdir as a resumed run does."""
    with Recorder(make_tiny_experiment(**CONFIG), make_tiny_config(**CONFIG), workdir):
        pass


def remove_round(workdir, number):
    shutil.rmtree(workdir / "checkpoints" / str(number))


def test_each_member_has_a_row_per_epoch_and_the_last_one_is_that_of_its_results(finished):
    epochs, results = read_epochs(finished), pd.read_csv(finished / "results.csv")
    assert tuple(epochs) == FIELDS
    keys = ["replicate", "arm", "round"]
    members = results[keys].itertuples(index=False, name=None)
    expected = sorted((*member, epoch) for member in members for epoch in (1, 2))
    assert sorted(epochs[[*keys, "epoch"]].itertuples(index=False, name=None)) == expected
    last = epochs[epochs["epoch"] == 2].set_index(keys)
    columns = list(FIELDS[4:])
    pd.testing.assert_frame_equal(last[columns], results.set_index(keys).loc[last.index, columns], rtol=1e-5)


def test_rows_of_a_crash_between_checkpoint_and_file_are_restored(workdir):
    """Also those of a lost or damaged file."""
    path = workdir / "epochs.csv"
    content = path.read_bytes()
    rounds_0_and_1 = pd.read_csv(path).query("round < 2").to_csv(index=False, float_format="%.9g").encode()
    assert content.startswith(rounds_0_and_1)
    for damaged in (rounds_0_and_1, content[:100], b"", None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        reopen(workdir)
        assert path.read_bytes() == content


def test_rows_of_rounds_that_are_trained_again_are_dropped(workdir):
    remove_round(workdir, 2)
    before = read_epochs(workdir)
    reopen(workdir)
    pd.testing.assert_frame_equal(read_epochs(workdir), before[before["round"] < 2])


def test_rows_of_deleted_and_damaged_rounds_are_kept(workdir):
    content = (workdir / "epochs.csv").read_bytes()
    remove_round(workdir, 0)
    (workdir / "checkpoints" / "1" / "epoch_rows" / "metadata").write_text("[]")
    reopen(workdir)
    assert (workdir / "epochs.csv").read_bytes() == content


def test_rows_of_a_later_round_come_later_whenever_they_are_written(finished, tmp_path):
    checkpoints = Checkpoints(finished)
    results = EpochResults(tmp_path, checkpoints, [])
    assert not (tmp_path / "epochs.csv").exists()
    results.append([])
    assert not (tmp_path / "epochs.csv").exists()
    for number in (2, 0, 1):
        results.append(checkpoints.epoch_rows(number))
    checkpoints.close()
    assert (tmp_path / "epochs.csv").read_bytes() == (finished / "epochs.csv").read_bytes()


def test_rows_are_written_after_the_checkpoint_of_their_round(tmp_path, monkeypatch):
    save, seen = Checkpoints.save, []

    def record_and_save(self, number, *args):
        seen.append(set(read_epochs(tmp_path)["round"]))
        save(self, number, *args)

    monkeypatch.setattr(Checkpoints, "save", record_and_save)
    runs.run(make_tiny_config(**CONFIG), tmp_path, dataset=make_tiny_dataset())
    assert seen == [set(), {0}, {0, 1}]


def test_event_files_have_the_evaluation_of_every_epoch(finished):
    rows = read_epochs(finished).query("arm == 'reinit' and replicate == 1").set_index(["round", "epoch"])
    found = {
        event.step: value.simple_value
        for event in read_events(finished / "events" / "reinit-1")
        for value in event.summary.value
        if value.tag == "epoch_validation_loss"
    }
    assert found == {
        2 * number + epoch: pytest.approx(row["validation_loss"]) for (number, epoch), row in rows.iterrows()
    }


def test_a_run_without_evaluation_has_no_file(tmp_path):
    runs.run(make_tiny_config(rounds=1), tmp_path, dataset=make_tiny_dataset())
    assert not (tmp_path / "epochs.csv").exists()
    assert read_epochs(tmp_path).empty
