"""Whole runs, most of them on mnist5k: training into a workdir, stopping and resuming."""

import contextlib
import json
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from imp_jax import analysis, imp, runs, training
from imp_jax.errors import UserError
from imp_jax.experiment import setup
from imp_jax.round_end import reset
from imp_jax.round_state import RoundPlan
from imp_jax.runtime.signals import GracefulStop, Stopped
from imp_jax.workdir import checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset, quick_config
from tests.helpers import folders
from tests.helpers.checkpoints import forget_definition
from tests.helpers.rounds import assert_trees_equal, initial_weights, run


class KilledError(Exception):
    """Stands for the end of a process that was killed."""


def run_one_round(config, workdir):
    """Train one more round, as if the process were killed after the round was recorded."""

    def kill(_):
        raise KilledError

    with pytest.raises(KilledError):
        run(config, workdir, on_round=[kill])


def test_rounds_in_memory_equal_those_of_a_workdir(tmp_path):
    """Bit for bit, with twins, repulsion and rewinding."""
    config = make_tiny_config(rewind_step=3, **{"repulsion.strength": 2.0, "instability.rounds": (1,)})
    ends = list(imp.rounds(setup(config, make_tiny_dataset())))
    recorded = []
    run(config, tmp_path, dataset=make_tiny_dataset(), on_round=[recorded.append])
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as stored:
        assert stored.rounds() == [end.round for end in ends] == [0, 1, 2]
        rows = [row for end in ends for row in end.rows]
        assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in stored.rows(2)]
        for end, recorded_end in zip(ends, recorded, strict=True):
            assert_trees_equal(end.networks, stored.restore(end.round))
            assert_trees_equal(end.next_masks, stored.next_masks(end.round))
            assert_trees_equal(end.next_optima, recorded_end.next_optima)
            assert (end.members, end.next_members) == (recorded_end.members, recorded_end.next_members)


def test_resuming_restores_the_saved_masks(tmp_path, monkeypatch):
    """It does not compute scores again, which may take long."""
    config = make_tiny_config(**{"pruning.score": "random"})
    run(config, tmp_path / "whole", dataset=make_tiny_dataset())
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for number in (1, 2):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / str(number))
    monkeypatch.setattr(runs, "prune", None)  # `resume` would call it for the last finished round
    run(config, tmp_path / "resumed", dataset=make_tiny_dataset())
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")


def test_resuming_restores_dense_tickets(data_dir, tmp_path):
    """An arm whose mask differs from imp's needs initial weights that imp has pruned."""
    config = quick_config(data_dir, rounds=2, **{"pruning.fraction": 0.9})
    run(config, tmp_path)
    experiment = setup(config)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as stored:
        rows = stored.rows(1)
        state = runs.resume(experiment, stored, rows)
        tickets = state.tickets
        survivors = stored.restore(1).initial
    dense = initial_weights(experiment)
    assert_trees_equal(tickets, dense)
    assert np.count_nonzero(survivors["params"]["Dense_0"]["kernel"]) < 0.2 * np.count_nonzero(
        tickets["params"]["Dense_0"]["kernel"]
    )
    end = imp.train(experiment, 1, state._replace(masks=load_mask(tmp_path, 1)))
    assert_trees_equal(reset(state, end, RoundPlan()), dense)


def load_mask(workdir, number):
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as stored:
        return stored.restore(number).mask


def read_results_without_seconds(workdir):
    return pd.read_csv(workdir / "results.csv").drop(columns="seconds")


def test_resumed_run_has_the_results_of_an_uninterrupted_one(data_dir, tmp_path, capsys):
    config = quick_config(data_dir)
    run(config, tmp_path / "whole")
    run_one_round(config, tmp_path / "resumed")
    capsys.readouterr()
    run(config, tmp_path / "resumed")
    assert "has rounds 0 to 0; continuing with round 1" in capsys.readouterr().out
    pd.testing.assert_frame_equal(
        read_results_without_seconds(tmp_path / "whole"), read_results_without_seconds(tmp_path / "resumed")
    )
    assert (tmp_path / "resumed" / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    results = (tmp_path / "resumed" / "results.csv").read_bytes()
    # as if the process were killed before it drew the figure
    (tmp_path / "resumed" / "figures" / "accuracy.png").unlink()
    run(config, tmp_path / "resumed")
    assert (tmp_path / "resumed" / "figures" / "accuracy.png").exists()
    assert "is finished: all 3 rounds are trained" in capsys.readouterr().out
    assert (tmp_path / "resumed" / "results.csv").read_bytes() == results


EVALUATED = {"evaluate_epochs": True, "dataset.validation": 0.2}


def test_members_are_evaluated_after_every_epoch():
    """With twins, and with a rewind step within an epoch; twins train in round 1 only."""
    config = make_tiny_config(rewind_step=3, **EVALUATED, **{"instability.rounds": (1,)})
    experiment = setup(config, make_tiny_dataset())
    seen = []

    def evaluate(end):
        if end.progress.step % 4:  # a pause within an epoch
            assert not end.rows
            return
        splits = (experiment.dataset.test, experiment.dataset.validation)
        (loss, correct), (held_out_loss, held_out_correct) = (
            training.evaluate(end.progress.states.variables, split, spec=experiment.spec) for split in splits
        )
        for i, (member, row) in enumerate(zip(end.members, end.rows, strict=True)):
            assert (row["arm"], row["replicate"], row["round"]) == (*member, end.round)
            assert row["epoch"] == end.progress.step / 4
            assert row["test_loss"] == pytest.approx(float(loss[i]), rel=1e-5)
            assert row["test_accuracy"] == pytest.approx(correct[i] / 13)
            assert row["validation_loss"] == pytest.approx(float(held_out_loss[i]), rel=1e-5)
            assert row["validation_accuracy"] == pytest.approx(held_out_correct[i] / 9)
        seen.extend(end.rows)

    ends = list(imp.rounds(experiment, on_epoch=[evaluate]))
    assert [len(end.epoch_rows) for end in ends] == [8, 12, 8]
    assert [row for end in ends for row in end.epoch_rows] == seen


def test_one_program_trains_and_evaluates_all_rounds():
    programs = training.programs(False)
    for program in (programs.scan_and_evaluate, programs.scan_steps):
        program.clear_cache()
    list(imp.rounds(setup(make_tiny_config(**EVALUATED), make_tiny_dataset())))
    assert (programs.scan_and_evaluate._cache_size(), programs.scan_steps._cache_size()) == (1, 0)


@pytest.mark.parametrize("rewind_step", [3, 4])
def test_evaluation_after_epochs_changes_no_bit_of_a_run(tmp_path, rewind_step):
    config = make_tiny_config(rewind_step=rewind_step, **EVALUATED)
    run(config, tmp_path / "with", dataset=make_tiny_dataset())
    config.evaluate_epochs = False
    run(config, tmp_path / "without", dataset=make_tiny_dataset())
    assert_same_runs(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without" / "epochs.csv").exists()


def test_a_changed_evaluation_takes_effect_in_the_next_round(tmp_path):
    config, whole = make_tiny_config(epochs=3, **EVALUATED), tmp_path / "whole"
    run(config, whole, dataset=make_tiny_dataset())
    expected = pd.read_csv(whole / "epochs.csv")
    for evaluate, rounds in ((True, {0}), (False, {1, 2})):
        workdir = tmp_path / f"{evaluate}"
        config.evaluate_epochs = evaluate
        with pytest.raises(Stopped, match="in round 0 at step 8 of 12"):
            run(config, workdir, StopsAfter(1), dataset=make_tiny_dataset())
        config.evaluate_epochs = not evaluate
        run(config, workdir, dataset=make_tiny_dataset())
        pd.testing.assert_frame_equal(
            pd.read_csv(workdir / "epochs.csv"),
            expected[expected["round"].isin(rounds)].reset_index(drop=True),
            check_exact=True,
        )


class StopsAfter(GracefulStop):
    """Simulates a signal that arrives after `checks` checks for signals."""

    def __init__(self, checks):
        super().__init__()
        self._checks = checks

    @property
    def requested(self):
        self._checks -= 1
        return signal.SIGTERM if self._checks < 0 else 0

    @requested.setter
    def requested(self, _):
        pass


def run_with_stops(config, workdir, checks):
    """Stop after every `checks` checks and resume, until the run is finished; return the messages."""
    messages = []
    while True:
        try:
            run(config, workdir, StopsAfter(checks))
        except Stopped as stopped:
            messages.append(str(stopped))
            # wait for a running analysis, which keeps the workdir locked; the end of a process would end it too
            FileLock(workdir / ".lock").acquire(timeout=120).lock.release()
        else:
            return messages


def assert_same_runs(one, other):
    """Compare the results and the networks of two workdirs bit for bit."""
    pd.testing.assert_frame_equal(
        read_results_without_seconds(one), read_results_without_seconds(other), check_exact=True
    )
    with (
        contextlib.closing(checkpoints.Checkpoints(one)) as a,
        contextlib.closing(checkpoints.Checkpoints(other)) as b,
    ):
        assert a.rounds() == b.rounds()
        for number in a.rounds():
            assert_trees_equal(a.restore(number), b.restore(number))


@pytest.mark.parametrize("rewind_step", [None, 3, 8])
def test_run_stopped_within_rounds_resumes_to_the_same_bits(data_dir, tmp_path, rewind_step):
    config = quick_config(data_dir, rounds=2, epochs=3, rewind_step=rewind_step, evaluate_epochs=True)
    run(config, tmp_path / "whole")
    messages = run_with_stops(config, tmp_path / "resumed", 0)
    stops = {8, 16, 24, *([rewind_step] if rewind_step else [])}  # epochs have 8 steps
    places = [f"in round {number} at step {step} of 24" for number in (0, 1) for step in sorted(stops)]
    assert [
        message[len("stopped by SIGTERM ") :].split(";")[0] for message in messages if "step" in message
    ] == places
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")
    epochs = [(tmp_path / name / "epochs.csv").read_bytes() for name in ("whole", "resumed")]
    assert epochs[0] == epochs[1]
    assert epochs[0].count(b"\n") == 1 + 2 * 3 * 2
    assert not any((tmp_path / "resumed" / "progress").iterdir())


def test_convolutional_network_trains_on_grey_images(data_dir, tmp_path, capsys):
    config = quick_config(data_dir, rounds=2, batch_size=100, **{"model.name": "resnet8", "model.width": 0.25})
    config.update_from_flattened_dict(
        {
            "arms": ("imp",),
            "dataset.normalize": True,
            "dataset.augmentation": ("crop",),
            "optimizer.learning_rate": 1e-2,
        }
    )
    # the execution that the run began with, which may not be the fastest one on this machine
    stored_execution = '{"scan": true, "unroll": true, "convolutions": "xla"}'
    (tmp_path / "execution.json").write_text(stored_execution)
    run(config, tmp_path)
    weights = 9 * (4 + 2 * 4 * 4 + 4 * 8 + 8 * 8 + 8 * 16 + 16 * 16) + 16 * 10
    description = f"(28 × 28 × 1): {weights + 10:,} parameters, {weights:,} of them weights to prune; 1 member"
    out = capsys.readouterr().out
    assert f"resnet8 on mnist5k {description}" in out
    assert "\nconvolutions by XLA in forms for a CPU; execution scan_unroll\n" in out
    assert json.loads((tmp_path / "execution.json").read_text()) == json.loads(stored_execution)
    results = pd.read_csv(tmp_path / "results.csv")
    assert results["density"][1] == pytest.approx(1 - round(0.2 * weights) / weights)
    assert (results["test_accuracy"] > 0.2).all()  # chance is 0.1


def test_streamed_run_resumes_to_the_same_results(tmp_path):
    """On a small ImageNet, without pruning the output layer."""
    folders.write_imagenet(tmp_path / "data")
    config = quick_config(str(tmp_path / "data"), rounds=2, epochs=2, batch_size=4, rewind_step=4)
    config.update_from_flattened_dict(
        {
            "checkpoint_every_steps": 3,
            "evaluate_epochs": True,
            "dataset.name": "imagenet2012",
            "dataset.image_side": 32,
            "dataset.workers": 0,
            "dataset.normalize": True,
            "model.width": 0.1,
            "pruning.exclude": ("Dense_2",),
        }
    )
    run(config, tmp_path / "whole")
    with pytest.raises(Stopped, match="in round 0 at step 3 of"):
        run(config, tmp_path / "resumed", StopsAfter(0))
    config.checkpoint_every_steps = 2  # may change while the run is stopped, even if 3 is not a multiple of it
    messages = run_with_stops(config, tmp_path / "resumed", 0)
    assert "in round 0 at step 4 of" in messages[0]  # the rewind step
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")
    epochs = [(tmp_path / name / "epochs.csv").read_bytes() for name in ("whole", "resumed")]
    assert epochs[0] == epochs[1]
    assert epochs[0].count(b"\n") == 1 + 2 * 2 * 2
    results = read_results_without_seconds(tmp_path / "whole")
    assert results["density"].round(2).tolist() == [1, 1, 0.8, 0.8]
    assert np.isfinite(results["train_loss"]).all()


def test_repulsion_of_a_single_round_is_0(data_dir, tmp_path):
    run(quick_config(data_dir, rounds=1, **{"repulsion.strength": 2.0}), tmp_path)
    assert list(read_results_without_seconds(tmp_path)["repulsion"]) == [0, 0]


def test_keep_checkpoints_may_change_while_a_run_is_stopped(data_dir, tmp_path):
    """With repulsion, which needs the optima of deleted rounds too."""
    config = quick_config(data_dir, rounds=6, **{"repulsion.strength": 2.0})
    run(config, tmp_path / "whole")
    for keep in ("all", "ends", "ends", "ends", "all"):
        config.keep_checkpoints = keep
        run_one_round(config, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "2", "3", "4"]
    run(config, tmp_path / "run")
    pd.testing.assert_frame_equal(
        read_results_without_seconds(tmp_path / "whole"),
        read_results_without_seconds(tmp_path / "run"),
        check_exact=True,
    )
    # as if the process were killed after the last round
    (tmp_path / "run" / "progress" / "7").mkdir(parents=True)
    config.keep_checkpoints = "ends"
    run(config, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "4", "5"]
    assert not any((tmp_path / "run" / "progress").iterdir())

    with contextlib.closing(checkpoints.Checkpoints(tmp_path / "run")) as stored:
        assert set(stored.optima(5).count) == {6}
    # a finished run may get more rounds, even if only the last checkpoint has the earlier optima
    config.rounds = 7
    run(config, tmp_path / "run")
    config.keep_checkpoints = "all"
    run(config, tmp_path / "whole")
    # the store of optima has other shapes, which changes the order of sums
    columns = ["round", "density", "train_loss", "repulsion", "cosine"]
    extended, whole = (
        read_results_without_seconds(tmp_path / name)[columns].query("round > 0") for name in ("run", "whole")
    )
    assert len(extended) == 13
    np.testing.assert_allclose(extended, whole, rtol=1e-2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rounds"] == 7
    config.rounds = 5
    with pytest.raises(UserError, match="rounds is 7 there and 5 here"):
        run(config, tmp_path / "run")


def test_damaged_round_is_moved_away_and_trained_again(data_dir, tmp_path, capsys):
    config = quick_config(data_dir, epochs=2)
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    largest = max((tmp_path / "run" / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    capsys.readouterr()
    run(config, tmp_path / "run")
    captured = capsys.readouterr()
    assert f"{tmp_path / 'run' / 'checkpoints' / '2'} is damaged" in captured.err
    assert "has rounds 0 to 1; continuing with round 2" in captured.out
    assert_same_runs(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "set-aside" / "checkpoints-2").is_dir()

    config.repulsion.strength = 2.0  # needs all earlier rounds
    run(config, tmp_path / "repelled")
    shutil.rmtree(tmp_path / "repelled" / "checkpoints" / "2")
    shutil.copytree(tmp_path / "repelled", tmp_path / "older")
    forget_definition(tmp_path / "older" / "checkpoints" / "1")
    with pytest.raises(UserError, match="earlier version, whose J_r counted biases"):
        run(config, tmp_path / "older")
    with pytest.warns(UserWarning, match="columns repulsion and cosine of .* count biases too"):
        analysis.load(tmp_path / "older")
    shutil.rmtree(tmp_path / "repelled" / "checkpoints" / "0" / "networks")
    with pytest.raises(UserError, match="checkpoints/0 is damaged"):
        run(config, tmp_path / "repelled")


def test_run_with_twins_and_repulsion_resumes_to_the_same_results(data_dir, tmp_path, one_figure):
    """Repulsion needs the optima of rounds before the stop."""
    config = quick_config(data_dir, rounds=4, epochs=2)
    config.instability.rounds = (1, 9)
    config.repulsion.strength = 2.0
    run(config, tmp_path / "whole")
    run_with_stops(config, tmp_path / "resumed", 3)
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")
    config.keep_checkpoints = "ends"
    run_with_stops(config, tmp_path / "ends", 3)
    results = read_results_without_seconds(tmp_path / "whole")
    pd.testing.assert_frame_equal(results, read_results_without_seconds(tmp_path / "ends"), check_exact=True)
    assert sorted(path.name for path in (tmp_path / "ends" / "checkpoints").iterdir()) == ["0", "2", "3"]
    analysis.run(tmp_path / "whole")
    analysis.run(tmp_path / "ends")
    whole, ends = analysis.load(tmp_path / "whole"), analysis.load(tmp_path / "ends")
    # `ends` does not compare rounds 1 and 3, because keep_checkpoints=ends deletes round 1
    whole.tables["agreement"] = whole.agreement.query("not (round_a == 1 and round_b == 3)").reset_index(
        drop=True
    )
    for table in set(whole.tables) - {"distances"}:
        pd.testing.assert_frame_equal(getattr(whole, table), getattr(ends, table), check_exact=True)
    pairs = {(-1, n) for n in range(4)} | {(0, 1), (0, 2), (1, 2), (0, 3), (2, 3)}
    keys = ["replicate", "arm", "metric", "round_a", "round_b"]
    merged = ends.distances.merge(whole.distances, on=keys)
    np.testing.assert_allclose(merged["distance_x"], merged["distance_y"], atol=1e-6)
    assert {(a, b) for a, b in zip(merged["round_a"], merged["round_b"], strict=True) if a < b} == pairs
    assert len(merged) == len(ends.distances)
    assert list(results[results["arm"] == "twin"]["round"].unique()) == [1]
    assert (results[results["round"] == 0]["repulsion"] == 0).all()
    assert (results[results["round"] > 0]["repulsion"] > 0).all()
    assert results["cosine"].isna().tolist() == (results["round"] == 0).tolist()
    round_1 = results[results["round"] == 1].set_index(["arm", "replicate"])
    assert round_1.loc[("twin", 0), "density"] == round_1.loc[("imp", 0), "density"]
    assert round_1.loc[("twin", 0), "test_loss"] != round_1.loc[("imp", 0), "test_loss"]
