"""`execution=tune`: the modes that are timed, the choice, and where it is kept."""

import json
from types import SimpleNamespace

import jax
import pytest

from imp_jax import runs, tuning
from imp_jax.errors import UserError
from imp_jax.runtime.execution import ExecutionMode
from tests.conftest import make_tiny_config, make_tiny_dataset


@pytest.mark.parametrize(
    ("chosen", "others"),
    [
        (ExecutionMode(), [(True, True, "flax")]),
        (ExecutionMode(unroll=True), [(True, False, "flax")]),
        (ExecutionMode(scan=False, unroll=True), []),
        (ExecutionMode(unroll=True, convolutions="onednn"), [(False, True, "onednn")]),
        (
            ExecutionMode(convolutions="per_member"),
            [(True, False, "grouped"), (True, True, "per_member")],
        ),
    ],
)
def test_the_modes_of_a_device_begin_with_the_default(chosen, others):
    assert tuning.list_modes(chosen) == [chosen, *others]


@pytest.fixture
def time_by_table(monkeypatch, tmp_path):
    """Replace the clock: return the timed modes, and a function that sets the seconds of unrolled modes."""
    timed, seconds = [], {True: 1.0}

    def time_mode(experiment, mode):
        timed.append(mode)
        return seconds[True] if mode.unroll else 2.0

    monkeypatch.setattr(tuning, "time_mode", time_mode)
    monkeypatch.setattr(tuning, "_times_file", lambda: tmp_path / "cache" / "times.json")
    (tmp_path / "cache").mkdir()
    return timed, lambda value: seconds.update({True: value})


def train(workdir, **overrides):
    runs.run(make_tiny_config(**{"execution": "tune", **overrides}), workdir, dataset=make_tiny_dataset())
    return ExecutionMode(**json.loads((workdir / "execution.json").read_text()))


def test_the_fastest_mode_is_used_stored_and_kept(tmp_path, time_by_table, capsys):
    timed, set_seconds = time_by_table
    assert train(tmp_path / "a", rounds=1) == (True, True, "flax")
    assert timed == [(True, False, "flax"), (True, True, "flax")]
    out = capsys.readouterr().out
    assert "milliseconds per step: scan_vmap 2,000.00, scan_unroll 1,000.00; scan_unroll is used" in out
    set_seconds(3.0)
    assert train(tmp_path / "b", rounds=1) == (True, True, "flax")  # the same setting: not timed again
    assert len(timed) == 2
    assert train(tmp_path / "c", rounds=1, batch_size=4) == (True, False, "flax")  # another setting
    assert len(timed) == 4
    (tmp_path / "cache" / "times.json").unlink()
    assert train(tmp_path / "a", rounds=2) == (True, True, "flax")  # a resumed run keeps its mode
    assert len(timed) == 4


def test_results_are_those_of_the_mode_and_times_are_of_a_step(tmp_path, capsys):
    def read(workdir):
        return [row.rsplit(",", 1)[0] for row in (workdir / "results.csv").read_text().splitlines()]

    mode = train(tmp_path / "tuned", rounds=2)
    assert 0 < float(capsys.readouterr().out.split("scan_vmap ")[1].split(",")[0]) < 1000
    assert train(tmp_path / "same", rounds=2, execution=mode.mode) == mode
    assert read(tmp_path / "tuned") == read(tmp_path / "same")


def test_several_processes_and_streamed_sets_are_refused(monkeypatch, tiny_experiment):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"several processes train together, .* should be auto or the name"):
        tuning.tune_execution(tiny_experiment())
    monkeypatch.undo()
    streamed = tiny_experiment()
    train = SimpleNamespace(in_memory=False)
    with pytest.raises(UserError, match="are streamed, so that the times are those of decoding"):
        tuning.tune_execution(streamed._replace(dataset=streamed.dataset._replace(train=train)))


def test_a_locked_or_wrong_workdir_is_refused_before_modes_are_timed(tmp_path, time_by_table):
    timed, _ = time_by_table
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.csv").write_text("replicate,arm,round\n0,imp,0\n")
    with pytest.raises(UserError):
        train(tmp_path / "run")
    assert not timed
