"""What is written while a run trains, and in which order."""

import pandas as pd
import pytest

from imp_jax import experiment, imp
from imp_jax.config import UserError
from imp_jax.members import Member
from imp_jax.recorder import Recorder
from tests.conftest import quick_config


def test_a_row_is_there_only_once_its_round_is_on_disk(data_dir, tmp_path, monkeypatch):
    """And a round that could not be recorded is said before what went wrong after it."""
    save = imp.Checkpoints.save

    def look_and_save(self, number, *args):
        assert (tmp_path / "results.csv").read_text().count("\n") == 1 + 2 * number
        if number == 1:
            raise OSError("disk full")
        save(self, number, *args)

    monkeypatch.setattr(imp.Checkpoints, "save", look_and_save)
    with pytest.raises(
        UserError, match=r"cannot record round \d in .*disk full; the rounds before it are kept"
    ):
        imp.run(quick_config(data_dir), tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0, 0]


def test_the_state_is_saved_as_often_as_the_config_says(data_dir, tmp_path, monkeypatch):
    saved = []
    save = imp.Checkpoints.save_progress

    def note_and_save(self, number, progress, steps):
        saved.append((number, progress.step))
        save(self, number, progress, steps)

    monkeypatch.setattr(imp.Checkpoints, "save_progress", note_and_save)
    monkeypatch.setattr("imp_jax.recorder.Future.done", lambda future: True)  # a disk as fast as any training
    imp.run(quick_config(data_dir, rounds=2, epochs=5, checkpoint_every_epochs=2), tmp_path / "run")
    assert saved == [(0, 16), (0, 32), (1, 16), (1, 32)]


def test_after_a_failure_nothing_is_written_and_leaving_says_so(data_dir, tmp_path):
    in_the_way = tmp_path / "divergences.csv"

    def fail_and_go_on():
        with Recorder(experiment.setup(quick_config(data_dir)), tmp_path) as recorder:
            recorder.begin(3, 0)
            in_the_way.mkdir()
            with pytest.raises(UserError, match="cannot record round 3"):
                recorder.divergence(3, Member("imp", 0), 1, "it broke")
            in_the_way.rmdir()
            with pytest.raises(UserError, match="cannot record round 3"):
                recorder.divergence(3, Member("imp", 0), 1, "it broke")

    with pytest.raises(
        UserError, match=r"cannot record round 3 in .*IsADirectoryError.*the same command goes on"
    ):
        fail_and_go_on()
    assert not in_the_way.exists()


def test_a_divergence_is_recorded_once(data_dir, tmp_path):
    for _ in range(2):
        with Recorder(experiment.setup(quick_config(data_dir)), tmp_path) as recorder:
            recorder.divergence(0, Member("reinit", 2), 7, "it broke")
    assert (
        tmp_path / "divergences.csv"
    ).read_text() == "replicate,arm,round,step,what\n2,reinit,0,7,it broke\n"
