"""Whole runs on mnist5k: training into a workdir, stopping and resuming."""

import contextlib
import json
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from imp_jax import analysis, imp, runs
from imp_jax.errors import UserError
from imp_jax.experiment import setup
from imp_jax.runtime.signals import GracefulStop, Stopped
from imp_jax.workdir import checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset, quick_config
from tests.helpers import folders
from tests.helpers.rounds import assert_trees_equal, initial_weights, run
from tests.helpers.workdirs import forget_definition


class KilledError(Exception):
    """The end of a process, so to speak."""


def run_one_round(config, workdir):
    """Train one round more, as if killed after it was recorded."""

    def kill(_):
        raise KilledError

    with pytest.raises(KilledError):
        run(config, workdir, on_round=[kill])


def test_rounds_in_memory_are_those_of_a_workdir(tmp_path):
    """To the bit, with twins, repulsion and rewinding."""
    config = make_tiny_config(rewind_step=3, **{"repulsion.strength": 2.0, "instability.rounds": (1,)})
    ends = list(imp.rounds(setup(config, make_tiny_dataset())))
    recorded = []
    run(config, tmp_path, dataset=make_tiny_dataset(), on_round=[recorded.append])
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as kept:
        assert kept.rounds() == [end.round for end in ends] == [0, 1, 2]
        rows = [row for end in ends for row in end.rows]
        assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in kept.rows(2)]
        for end, of_run in zip(ends, recorded, strict=True):
            assert_trees_equal(end.networks, kept.restore(end.round))
            assert_trees_equal(end.next_masks, kept.next_masks(end.round))
            assert_trees_equal(end.next_optima, of_run.next_optima)
            assert (end.members, end.next_members) == (of_run.members, of_run.next_members)


def test_a_resumed_run_takes_the_masks_that_were_saved(tmp_path, monkeypatch):
    """Without the score, which may take long."""
    config = make_tiny_config(**{"pruning.score": "random"})
    run(config, tmp_path / "whole", dataset=make_tiny_dataset())
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for number in (1, 2):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(number))
    monkeypatch.setattr(runs, "prune", None)  # of rounds before the first that is trained here
    run(config, tmp_path / "cut", dataset=make_tiny_dataset())
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_tickets_stay_whole_for_arms_with_other_masks_than_imps(data_dir, tmp_path):
    """What a round starts from is θ⊙m of the initialisation, not of what survived the rounds before."""
    config = quick_config(data_dir, rounds=2, **{"model.width": 0.1, "pruning.fraction": 0.9})
    run(config, tmp_path)
    experiment = setup(config)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as kept:
        rows = kept.rows(1)
        state = runs.resume(experiment, kept, rows)
        tickets = state.tickets
        survivors = kept.restore(1).initial
    dense = initial_weights(experiment)
    assert_trees_equal(tickets, dense)
    assert np.count_nonzero(survivors["params"]["Dense_0"]["kernel"]) < 0.2 * np.count_nonzero(
        tickets["params"]["Dense_0"]["kernel"]
    )
    end = imp.train(experiment, 1, state._replace(masks=kept_mask(tmp_path, 1)))
    assert_trees_equal(imp.reset(experiment, end), dense)


def kept_mask(workdir, number):
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as kept:
        return kept.restore(number).mask


def without_seconds(workdir):
    return pd.read_csv(workdir / "results.csv").drop(columns="seconds")


def test_a_run_resumes_to_the_same_results(data_dir, tmp_path, capsys):
    config = quick_config(data_dir)
    run(config, tmp_path / "whole")
    run_one_round(config, tmp_path / "cut")
    capsys.readouterr()
    run(config, tmp_path / "cut")
    assert "has rounds 0 to 0; going on with round 1" in capsys.readouterr().out
    pd.testing.assert_frame_equal(without_seconds(tmp_path / "whole"), without_seconds(tmp_path / "cut"))
    assert (tmp_path / "cut" / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    before = (tmp_path / "cut" / "results.csv").read_bytes()
    (tmp_path / "cut" / "figures" / "accuracy.png").unlink()  # as if killed just before it was drawn
    run(config, tmp_path / "cut")
    assert (tmp_path / "cut" / "figures" / "accuracy.png").exists()
    assert "is finished: all 3 rounds are trained" in capsys.readouterr().out
    assert (tmp_path / "cut" / "results.csv").read_bytes() == before


class StopsAfter(GracefulStop):
    """A signal that comes during a training, which has looked for it so many times before."""

    def __init__(self, looks):
        super().__init__()
        self._looks = looks

    @property
    def requested(self):
        self._looks -= 1
        return signal.SIGTERM if self._looks < 0 else 0

    @requested.setter
    def requested(self, _):
        pass


def run_with_stops(config, workdir, looks):
    """Run to the end in as many processes as it takes, so to speak; returns where it went on."""
    said = []
    while True:
        try:
            run(config, workdir, StopsAfter(looks))
        except Stopped as stopped:
            said.append(str(stopped))
            # an analysis under way holds the workdir, and would end with a process
            FileLock(workdir / ".lock").acquire(timeout=120).lock.release()
        else:
            return said


def assert_same_runs(one, other):
    """To the bit."""
    pd.testing.assert_frame_equal(without_seconds(one), without_seconds(other), check_exact=True)
    with (
        contextlib.closing(checkpoints.Checkpoints(one)) as a,
        contextlib.closing(checkpoints.Checkpoints(other)) as b,
    ):
        assert a.rounds() == b.rounds()
        for number in a.rounds():
            assert_trees_equal(a.restore(number), b.restore(number))


@pytest.mark.parametrize("rewind_step", [None, 3, 8])
def test_a_run_stopped_within_its_rounds_ends_in_the_same_bits(data_dir, tmp_path, rewind_step):
    config = quick_config(data_dir, rounds=2, epochs=3, rewind_step=rewind_step)
    run(config, tmp_path / "whole")
    said = run_with_stops(config, tmp_path / "cut", 0)
    cuts = {8, 16, 24, *([rewind_step] if rewind_step else [])}  # epochs have 8 steps
    places = [f"in round {number} at step {step} of 24" for number in (0, 1) for step in sorted(cuts)]
    assert [
        sentence[len("stopped by SIGTERM ") :].split(";")[0] for sentence in said if "step" in sentence
    ] == places
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert not any((tmp_path / "cut" / "progress").iterdir())


def test_a_convolutional_network_on_grey_images(data_dir, tmp_path, capsys):
    config = quick_config(data_dir, rounds=2, batch_size=100, **{"model.name": "resnet8", "model.width": 0.25})
    config.update_from_flattened_dict(
        {
            "arms": ("imp",),
            "dataset.normalize": True,
            "dataset.augmentation": ("crop",),
            "optimizer.learning_rate": 1e-2,
        }
    )
    begun_with = '{"scan": true, "unroll": true, "convolutions": "xla"}'  # and not the fastest of this machine
    (tmp_path / "execution.json").write_text(begun_with)
    run(config, tmp_path)
    weights = 9 * (4 + 2 * 4 * 4 + 4 * 8 + 8 * 8 + 8 * 16 + 16 * 16) + 16 * 10
    said = f"(28 × 28 × 1): {weights + 10:,} parameters, {weights:,} of them weights to prune; 1 member"
    out = capsys.readouterr().out
    assert f"resnet8 on mnist5k {said}" in out
    assert "\nconvolutions by XLA in forms for a CPU; execution scan_unroll\n" in out
    assert json.loads((tmp_path / "execution.json").read_text()) == json.loads(begun_with)
    results = pd.read_csv(tmp_path / "results.csv")
    assert results["density"][1] == pytest.approx(1 - round(0.2 * weights) / weights)
    assert (results["test_accuracy"] > 0.2).all()  # chance is 0.1


def test_a_streamed_run(tmp_path):
    """ImageNet in small, the output layer unpruned; a run that was cut off goes on to the same results."""
    folders.write_imagenet(tmp_path / "data")
    config = quick_config(str(tmp_path / "data"), rounds=2, epochs=2, batch_size=4, rewind_step=4)
    config.update_from_flattened_dict(
        {
            "checkpoint_every_steps": 3,
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
        run(config, tmp_path / "cut", StopsAfter(0))
    config.checkpoint_every_steps = 2  # which may change while the run is stopped, though 3 is not a multiple
    said = ["", *run_with_stops(config, tmp_path / "cut", 0)]
    assert "in round 0 at step 4 of" in said[1]  # the rewind step
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    results = without_seconds(tmp_path / "whole")
    assert results["density"].round(2).tolist() == [1, 1, 0.8, 0.8]
    assert np.isfinite(results["train_loss"]).all()


def test_one_round_with_repulsion(data_dir, tmp_path):
    run(quick_config(data_dir, rounds=1, **{"repulsion.strength": 2.0, "model.width": 0.1}), tmp_path)
    assert list(without_seconds(tmp_path)["repulsion"]) == [0, 0]


def test_what_is_kept_may_change_while_a_run_is_stopped(data_dir, tmp_path):
    """With repulsion, for which the rounds that are gone are needed in another form."""
    config = quick_config(data_dir, rounds=6, **{"repulsion.strength": 2.0, "model.width": 0.1})
    run(config, tmp_path / "whole")
    for keep in ("all", "ends", "ends", "ends", "all"):
        config.keep_checkpoints = keep
        run_one_round(config, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "2", "3", "4"]
    run(config, tmp_path / "run")
    pd.testing.assert_frame_equal(
        without_seconds(tmp_path / "whole"), without_seconds(tmp_path / "run"), check_exact=True
    )
    (tmp_path / "run" / "progress" / "7").mkdir(parents=True)  # as if killed after the last round
    config.keep_checkpoints = "ends"
    run(config, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "4", "5"]
    assert not any((tmp_path / "run" / "progress").iterdir())

    with contextlib.closing(checkpoints.Checkpoints(tmp_path / "run")) as kept:
        assert set(kept.optima(5).count) == {6}
    config.rounds = 7  # a finished run may grow, also one whose earlier optima are in the last round only
    run(config, tmp_path / "run")
    config.keep_checkpoints = "all"
    run(config, tmp_path / "whole")
    # the store of optima has other shapes, and so another order of sums
    columns = ["round", "density", "train_loss", "repulsion", "cosine"]
    grown, whole = (without_seconds(tmp_path / name)[columns].query("round > 0") for name in ("run", "whole"))
    assert len(grown) == 13
    np.testing.assert_allclose(grown, whole, rtol=1e-2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rounds"] == 7
    config.rounds = 5
    with pytest.raises(UserError, match="rounds is 7 there and 5 here"):
        run(config, tmp_path / "run")


def test_a_damaged_round_is_set_aside_and_trained_again(data_dir, tmp_path, capsys):
    config = quick_config(data_dir, epochs=2)
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    largest = max((tmp_path / "run" / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    capsys.readouterr()
    run(config, tmp_path / "run")
    said = capsys.readouterr()
    assert f"{tmp_path / 'run' / 'checkpoints' / '2'} is damaged" in said.err
    assert "has rounds 0 to 1; going on with round 2" in said.out
    assert_same_runs(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "set-aside" / "checkpoints-2").is_dir()

    config.repulsion.strength = 2.0  # which needs all rounds before
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


def test_a_run_with_twins_resumes_to_the_same_results(data_dir, tmp_path):
    """With repulsion from the optima of the rounds before the stop too."""
    config = quick_config(data_dir, rounds=4, epochs=2)
    config.instability.rounds = (1, 9)
    config.repulsion.strength = 2.0
    run(config, tmp_path / "whole")
    run_with_stops(config, tmp_path / "cut", 3)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    config.keep_checkpoints = "ends"
    run_with_stops(config, tmp_path / "ends", 3)
    results = without_seconds(tmp_path / "whole")
    pd.testing.assert_frame_equal(results, without_seconds(tmp_path / "ends"), check_exact=True)
    assert sorted(path.name for path in (tmp_path / "ends" / "checkpoints").iterdir()) == ["0", "2", "3"]
    analysis.run(tmp_path / "whole")
    analysis.run(tmp_path / "ends")
    whole, ends = analysis.load(tmp_path / "whole"), analysis.load(tmp_path / "ends")
    for table in set(whole.tables) - {"distances"}:  # computed before the rounds went
        pd.testing.assert_frame_equal(getattr(whole, table), getattr(ends, table), check_exact=True)
    pairs = {(-1, n) for n in range(4)} | {(0, 1), (0, 2), (1, 2), (0, 3), (2, 3)}
    keys = ["replicate", "arm", "metric", "round_a", "round_b"]
    both = ends.distances.merge(whole.distances, on=keys)
    np.testing.assert_allclose(both["distance_x"], both["distance_y"], atol=1e-6)
    assert {(a, b) for a, b in zip(both["round_a"], both["round_b"], strict=True) if a < b} == pairs
    assert len(both) == len(ends.distances)
    assert list(results[results["arm"] == "twin"]["round"].unique()) == [1]
    assert (results[results["round"] == 0]["repulsion"] == 0).all()
    assert (results[results["round"] > 0]["repulsion"] > 0).all()
    assert results["cosine"].isna().tolist() == (results["round"] == 0).tolist()
    of_round = results[results["round"] == 1].set_index(["arm", "replicate"])
    assert of_round.loc[("twin", 0), "density"] == of_round.loc[("imp", 0), "density"]
    assert of_round.loc[("twin", 0), "test_loss"] != of_round.loc[("imp", 0), "test_loss"]
