"""The rounds: tickets, masks, rewinding, replicates, resuming. A tiny network stands in for LeNet."""

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from imp_jax import analysis, connectivity, imp, masking, pruning, repulsion, runs, training
from imp_jax.arms import ARMS, Member, member_keys
from imp_jax.divergence import DivergedError
from imp_jax.errors import UserError
from imp_jax.experiment import setup
from imp_jax.runtime.signals import GracefulStop, Stopped
from imp_jax.workdir import checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset, quick_config
from tests.helpers import ROOT, folders
from tests.helpers.epochs import train_epoch
from tests.workdir.test_checkpoints import forget_definition


def train_all(experiment, rounds=3):
    """The rounds in memory: what each left behind, and its thresholds."""
    for end in imp.rounds(experiment._replace(rounds=rounds)):
        yield end.networks, [row["threshold"] for row in end.rows]


def initial_weights(experiment):
    return imp.init_state(experiment).tickets


def member(tree, i):
    return jax.tree.map(lambda x: np.asarray(x[i]), tree)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b):
    """To rounding: XLA may sum in another order where another number of members or steps is compiled."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a, b)


def test_survivors_start_each_round_from_their_initial_values(tiny_experiment):
    experiment = tiny_experiment()
    initial = initial_weights(experiment)["params"]
    for networks, _ in train_all(experiment):
        assert_trees_equal(networks.initial["params"], masking.apply(initial, networks.mask))
        pruned = jax.tree.map(jnp.logical_not, networks.mask)
        assert not any(np.any(x) for x in jax.tree.leaves(masking.apply(networks.trained["params"], pruned)))


def test_masks_shrink_by_exact_counts_and_are_shared_by_the_arms(tiny_experiment):
    experiment = tiny_experiment()
    rounds = [networks for networks, _ in train_all(experiment, rounds=4)]
    expected = 16 * 6 + 6 * 5 + 5 * 3
    for networks in rounds:
        counts = jax.vmap(masking.survivors)(networks.mask)
        np.testing.assert_array_equal(counts, expected)
        expected -= round(0.2 * expected)
        for replicate in range(2):
            assert_trees_equal(member(networks.mask, replicate), member(networks.mask, 2 + replicate))
        assert all(np.all(layer["bias"]) for layer in networks.mask.values())
    for one, other in itertools.pairwise(rounds):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a & b, b), one.mask, other.mask)


def test_the_mask_is_magnitude_pruning_of_imps_trained_weights(tiny_experiment):
    experiment = tiny_experiment()
    first, second = (networks for networks, _ in train_all(experiment, rounds=2))
    for i in range(4):
        mask, _ = pruning.prune_by_magnitude(member(first.trained["params"], i % 2), member(first.mask, i % 2))
        assert_trees_equal(member(second.mask, i), mask)


def test_thresholds_are_each_members_own_largest_removed_magnitude(tiny_experiment):
    experiment = tiny_experiment()
    networks, thresholds = next(train_all(experiment))
    for i in range(4):
        kernels = [layer["kernel"].ravel() for layer in member(networks.trained["params"], i).values()]
        magnitudes = np.sort(np.abs(np.concatenate(kernels)))
        assert thresholds[i] == magnitudes[round(0.2 * len(magnitudes)) - 1]


def test_arms_and_replicates_all_start_and_train_differently(tiny_experiment):
    networks, _ = next(train_all(tiny_experiment()))
    for tree in (networks.initial, networks.trained):
        kernels = tree["params"]["Dense_0"]["kernel"]
        for i, j in itertools.combinations(range(4), 2):
            assert not np.array_equal(kernels[i], kernels[j])


def test_replicate_0_of_3_is_the_run_of_1(tiny_experiment):
    """And no arm depends on which others there are."""
    three, one, alone = (
        tiny_experiment(**overrides)
        for overrides in ({"replicates": 3}, {"replicates": 1}, {"replicates": 1, "arms": ("imp",)})
    )
    for (a, _), (b, _), (c, _) in zip(train_all(three), train_all(one), train_all(alone), strict=True):
        for of_three, of_one in ((0, 0), (3, 1)):  # imp, reinit
            assert_trees_equal(member(a.mask, of_three), member(b.mask, of_one))
            assert_trees_close(member(a.trained, of_three), member(b.trained, of_one))
        assert_trees_close(member(b.trained, 0), member(c.trained, 0))


def test_same_seed_same_bits_other_seed_other_bits(tiny_experiment):
    a, b, c = (next(train_all(tiny_experiment(seed=seed)))[0] for seed in (1, 1, 2))
    assert_trees_equal(a, b)
    assert not np.array_equal(
        a.trained["params"]["Dense_0"]["kernel"], c.trained["params"]["Dense_0"]["kernel"]
    )


@pytest.mark.parametrize(
    "rewind_step", [3, 5, 7]
)  # inside the first epoch of 5 steps, at its end, in the second
def test_rewinding_to_step_k(tiny_experiment, rewind_step):
    """Round 0 notes imp's weights at step k; later rounds train them from k on, with a fresh optimizer."""
    experiment = tiny_experiment(
        rewind_step=rewind_step, **{"optimizer.schedule": "cosine", "optimizer.learning_rate": 0.01}
    )
    plain = tiny_experiment(**{"optimizer.schedule": "cosine", "optimizer.learning_rate": 0.01})
    (first, _), (second, _) = train_all(experiment, rounds=2)
    (plain_first, _), (plain_second, _) = train_all(plain, rounds=2)
    assert_trees_close(first.trained, plain_first.trained)  # noting changes nothing

    def train(states, mask, number, first_step):
        keys = member_keys(experiment.members, experiment.seed, lambda m: ["data", ARMS[m.arm].number, number])
        for step in range(first_step, 10 if number else rewind_step):
            states, _ = train_epoch(
                states,
                mask,
                experiment.dataset.train,
                keys,
                step // 5,
                step % 5,
                experiment.learning_rates[step // 5, step % 5 : step % 5 + 1],
                spec=experiment.spec,
            )
        return states

    tickets = initial_weights(experiment)
    start = training.init_states(tickets, first.mask, spec=experiment.spec)
    at_k = train(start, first.mask, number=0, first_step=0).variables
    ticket = masking.apply(first.initial["params"], second.mask)
    for i in range(2):  # imp
        assert_trees_close(member(first.initial, i), member(at_k, i))
        assert_trees_equal(member(second.initial["params"], i), member(ticket, i))
    start = training.init_states(at_k, second.mask, spec=experiment.spec)
    expected = train(start, second.mask, number=1, first_step=rewind_step).variables
    for i in range(2):
        assert_trees_close(member(second.trained, i), member(expected, i))
    control = masking.apply(tickets["params"], second.mask)  # reinit starts from its random initialisation
    assert_trees_equal(member(second.initial["params"], 2), member(control, 2))
    assert_trees_close(member(second.trained, 2), member(plain_second.trained, 2))


def test_no_reset_goes_on_from_the_trained_weights(tiny_experiment):
    """rewind_step=None; the control is still reset."""
    experiment = tiny_experiment(rewind_step=None)
    initial = initial_weights(experiment)["params"]
    (first, _), (second, _) = train_all(experiment, rounds=2)
    goes_on = masking.apply(first.trained["params"], second.mask)
    control = masking.apply(initial, second.mask)
    for i in range(2):
        assert_trees_equal(member(second.initial["params"], i), member(goes_on, i))
        assert_trees_equal(member(second.initial["params"], 2 + i), member(control, 2 + i))


def test_one_shot_pruning_to_30_percent(tiny_experiment):
    experiment = tiny_experiment(**{"pruning.fraction": 0.7})
    *_, (last, _) = train_all(experiment, rounds=2)
    np.testing.assert_array_equal(jax.vmap(masking.survivors)(last.mask), 141 - round(0.7 * 141))


def test_random_score_ignores_magnitude(tiny_experiment):
    by_chance, by_magnitude = (
        [networks for networks, _ in train_all(tiny_experiment(**{"pruning.score": score}), rounds=2)][1]
        for score in ("random", "magnitude")
    )
    np.testing.assert_array_equal(
        jax.vmap(masking.survivors)(by_chance.mask), jax.vmap(masking.survivors)(by_magnitude.mask)
    )
    assert not np.array_equal(by_chance.mask["Dense_0"]["kernel"], by_magnitude.mask["Dense_0"]["kernel"])
    assert_trees_equal(member(by_chance.mask, 0), member(by_chance.mask, 2))  # still shared by the arms


@pytest.fixture
def compilations():
    """The programs XLA has compiled so far, counted from here on."""
    seconds = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(seconds)
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("execution", ["scan_vmap", "scan_unroll", "step_unroll"])
def test_rounds_share_one_compilation(tiny_experiment, compilations, execution):
    experiment = tiny_experiment(execution=execution, batch_size=10)  # compiled by no other test
    counts = []
    for _ in imp.rounds(experiment._replace(rounds=4), on_round=[lambda end: counts.append(compilations())]):
        pass
    assert counts[0] > 3  # programs were seen
    assert counts[1] == counts[3]


def test_compilation_is_no_training(tiny_experiment, monkeypatch):
    """Each chunk reads the clock of compilation twice; here it is 100 s later each time."""
    clock, seen = itertools.count(0, 100), []
    monkeypatch.setattr(imp, "compile_seconds", lambda: next(clock))
    experiment = tiny_experiment()
    state = imp.init_state(experiment)
    start = time.perf_counter()
    end = imp.train(
        experiment, 0, state, on_epoch=[lambda end: seen.append((end.seconds, end.compile_seconds))]
    )
    taken = time.perf_counter() - start
    training, compiling = zip(*seen, strict=True)
    assert compiling == (100, 100)  # two epochs
    assert sum(training) == end.seconds
    assert 0 < end.seconds + 200 < taken


def test_measured_rows(tiny_experiment):
    experiment = tiny_experiment()
    state = imp.init_state(experiment)
    for number in range(2):
        progress = imp.train(experiment, number, state)._replace(seconds=1.23456)
        networks = imp.copy_networks(state, progress)
        masks, thresholds = imp.prune(experiment, number, state.members, progress.states.variables, state.masks)
        rows = imp.measure(experiment, number, state, progress, networks, thresholds)
        tickets = imp.reset(experiment, progress)
        _, state = imp.end_round(experiment, number, state, {}, networks, rows, tickets, masks)
    assert [(row["arm"], row["replicate"], row["round"]) for row in rows] == [
        ("imp", 0, 1), ("imp", 1, 1), ("reinit", 0, 1), ("reinit", 1, 1),
    ]  # fmt: skip
    for i, row in enumerate(rows):
        dataset = experiment.dataset
        for split, (images, labels) in (("train", dataset.train), ("test", dataset.test)):
            logits = np.asarray(experiment.spec.model.apply(member(networks.trained, i), images / 255))
            labels = np.asarray(labels)
            assert row[f"{split}_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
            losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
            assert row[f"{split}_loss"] == pytest.approx(losses.mean(), rel=1e-4)
        assert row["density"] == pytest.approx((141 - 28) / 141)
        assert row["threshold"] == pytest.approx(float(thresholds[i]))
        assert row["seconds"] == 1.235


def test_the_step_of_a_broken_loss_counts_from_the_start_of_the_training(tiny_experiment):
    experiment = tiny_experiment()
    experiment.learning_rates[1] = np.inf  # the second epoch of 5 steps
    with pytest.raises(DivergedError) as error:
        imp.train(experiment, 0, imp.init_state(experiment))
    assert error.value.round == 0
    assert {m: step for m, (step, _) in error.value.diverged.items()} == dict.fromkeys(experiment.members, 6)


def test_data_order_differs_between_rounds_arms_and_replicates(tiny_experiment):
    experiment = tiny_experiment()
    keys = [
        member_keys(experiment.members, experiment.seed, lambda m, n=n: ["data", ARMS[m.arm].number, n])
        for n in range(2)
    ]
    orders = {tuple(np.asarray(jax.random.permutation(key, 46))) for of_round in keys for key in of_round}
    assert len(orders) == 8


def test_random_pruning_draws_anew_each_round(tiny_experiment):
    experiment = tiny_experiment(**{"pruning.score": "random", "pruning.fraction": 0.5})
    networks, _ = next(train_all(experiment))
    (one, _), (other, _) = (
        imp.prune(experiment, number, experiment.members, networks.trained, networks.mask) for number in (0, 1)
    )
    assert not np.array_equal(one["Dense_0"]["kernel"], other["Dense_0"]["kernel"])


@pytest.mark.parametrize("execution", ["scan_unroll", "step_vmap", "step_unroll"])
def test_every_execution_gives_the_same_rounds(tiny_experiment, execution):
    for (one, thresholds), (other, expected) in zip(
        train_all(tiny_experiment(execution=execution)), train_all(tiny_experiment()), strict=True
    ):
        assert_trees_close(one.trained, other.trained)
        np.testing.assert_allclose(thresholds, expected, rtol=1e-4)


def test_excluded_layers_stay_dense(tiny_experiment):
    experiment = tiny_experiment(**{"pruning.exclude": ("Dense_0",), "pruning.fraction": 0.5})
    _, end = imp.rounds(experiment._replace(rounds=2))
    assert end.networks.mask["Dense_0"]["kernel"].all()
    assert end.rows[0]["density"] == pytest.approx((45 - 22) / 45)  # of the 6 · 5 + 5 · 3 others


def test_few_frames_lie_between_a_training_and_its_loss(tiny_experiment, monkeypatch):
    """While it is traced: who steps through the code comes to the loss soon."""
    loss_fn, between = training.loss_fn, []

    def look(*args, **kwargs):
        package = str(ROOT / "imp_jax")
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
        (train,) = (i for i, f in enumerate(frames) if f.name == "train" and f.filename.endswith("/imp.py"))
        between.append([frame.name for frame in frames[train + 1 :]])
        return loss_fn(*args, **kwargs)

    monkeypatch.setattr(training, "loss_fn", look)
    experiment = tiny_experiment(batch_size=9)  # not traced before
    imp.train(experiment, 0, imp.init_state(experiment))
    assert between
    assert max(map(len, between)) <= 5, between


# --- whole runs, on mnist5k ---


class KilledError(Exception):
    """The end of a process, so to speak."""


def run(config, workdir, *args, **options):
    runs.run(config, workdir, *args, analyses=analysis, **options)


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
    assert "has rounds 0 to 0; continuing with round 1" in capsys.readouterr().out
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


def test_a_stream_trains_on_the_batches_it_serves(tmp_path):
    """Against `train_step` of each member on the batches, read apart."""
    folders.write_imagenet(tmp_path)
    config = quick_config(str(tmp_path), epochs=2, batch_size=4, execution="step_vmap")
    config.update_from_flattened_dict(
        {
            "dataset.name": "imagenet2012",
            "dataset.image_side": 8,
            "dataset.workers": 0,
            "optimizer.name": "momentum",
            "model.width": 0.1,
            "repulsion.strength": 2.0,
        }
    )
    experiment = setup(config)
    begun = imp.init_state(experiment)
    optima = repulsion.add_optimum(
        None, jax.tree.map(jnp.cos, begun.tickets["params"]), begun.masks, max_optima=1
    )
    trained = imp.train(experiment, 0, begun._replace(optima=optima)).states.params
    keys = member_keys(experiment.members, experiment.seed, lambda m: ["data", ARMS[m.arm].number, 0])
    states = training.init_states(begun.tickets, begun.masks, spec=experiment.spec)
    for i in range(2):
        state, mask, known = (member(tree, i) for tree in (states, begun.masks, optima))
        batches = experiment.dataset.train.training_batches(jax.random.key_data(keys)[i : i + 1], 2, 4)
        for (images, labels), rate in zip(batches, experiment.learning_rates.ravel(), strict=True):
            state, _ = training.train_step(state, mask, images[0], labels[0], rate, known, spec=experiment.spec)
        assert_trees_close(member(trained, i), state.params)


def break_in_round_1(monkeypatch, broken, value=np.nan):
    """The weights of members in round 1 become `value` after its first epoch."""
    train_steps = training.train_steps
    calls = itertools.count()

    def break_some(states, *args, **kwargs):
        states, metrics = train_steps(states, *args, **kwargs)
        members = len(metrics.loss[0])
        if next(calls) == 3:  # after the three epochs of round 0
            hit = jnp.isin(jnp.arange(members), jnp.array(broken))
            states = states._replace(
                params=jax.tree.map(
                    lambda p: jnp.where(hit.reshape(-1, *[1] * (p.ndim - 1)), value, p), states.params
                )
            )
        return states, metrics

    monkeypatch.setattr(training, "train_steps", break_some)


def test_divergence_stops_the_run_and_is_recorded(data_dir, tmp_path, monkeypatch):
    config = quick_config(data_dir, epochs=3, replicates=2)
    break_in_round_1(monkeypatch, [1, 2])
    with pytest.raises(
        UserError, match=r"nan or infinite in round 1, arm imp, replicate 1, at step 8 .* rounds 0 to 0 on disk"
    ):
        run(config, tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0] * 4
    lines = (tmp_path / "divergences.csv").read_text().splitlines()
    broken = ["1,imp,1,8,the loss became nan or infinite", "0,reinit,1,8,the loss became nan or infinite"]
    assert lines == ["replicate,arm,round,step,what", *broken]


@pytest.mark.parametrize(
    ("broken", "in_round_1", "in_round_2"),
    [
        ([1], [("imp", 0), ("reinit", 0), ("reinit", 1)], [("imp", 0), ("reinit", 0)]),  # imp, replicate 1
        ([2, 4], [("imp", 0), ("imp", 1), ("reinit", 1), ("twin", 1)], [("imp", 0), ("imp", 1), ("reinit", 1)]),
    ],
)
def test_a_member_that_diverges_is_dropped(data_dir, tmp_path, monkeypatch, broken, in_round_1, in_round_2):
    """With its replicate if it is the imp, whose masks all use; the others go on as without it."""
    config = quick_config(data_dir, epochs=3, replicates=2, on_divergence="drop")
    config.model.width, config.analysis.path_points = 0.1, 3
    config.instability.rounds = (1,) if 4 in broken else ()
    config.repulsion.strength = 2.0 if 4 in broken else 0.0
    run(config, tmp_path / "healthy")
    break_in_round_1(monkeypatch, broken)
    run(config, tmp_path / "run")
    results = pd.read_csv(tmp_path / "run" / "results.csv")
    members = {
        n: list(zip(rows["arm"], rows["replicate"], strict=True)) for n, rows in results.groupby("round")
    }
    assert members[1] == in_round_1
    assert members[2] == in_round_2
    keys = ["arm", "replicate", "round"]
    healthy = pd.read_csv(tmp_path / "healthy" / "results.csv").merge(results[keys], on=keys)
    columns = ["density", "threshold", "test_loss", *(["repulsion"] if config.repulsion.strength else [])]
    np.testing.assert_allclose(results[columns], healthy[columns], rtol=2e-3)
    divergences = pd.read_csv(tmp_path / "run" / "divergences.csv")
    assert len(divergences) == len(broken)
    assert (divergences["step"] == 8).all()

    analysis.run(tmp_path / "run")
    analysed = analysis.load(tmp_path / "run")
    assert analysed.members(1) == tuple(in_round_1)
    rounds = analysed.distances.groupby(["arm", "replicate"])["round_a"].unique()
    for member_ in members[0]:
        assert rounds[member_].tolist() == [-1, *(n for n in range(3) if member_ in members[n])]
    successive = analysed.barriers.query("kind == 'successive' and split == 'test'").groupby("round")[
        "replicate"
    ]
    assert successive.unique().map(list).to_dict() == {
        n: [r for arm, r in members[n] if arm == "imp"] for n in (1, 2)
    }

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")  # to go on without the member
    ends = []
    run(config, tmp_path / "run", on_round=[ends.append])
    (again,) = ends
    assert [(row["arm"], row["replicate"]) for row in again.rows] == in_round_2
    resumed = pd.read_csv(tmp_path / "run" / "results.csv")
    np.testing.assert_allclose(resumed[columns], results[columns], rtol=1e-4)


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


def test_a_member_that_falls_to_chance_is_dropped(data_dir, tmp_path, monkeypatch):
    config = quick_config(data_dir, epochs=3, on_divergence="drop", rounds=2, replicates=2)
    break_in_round_1(monkeypatch, [3], value=0.0)  # all weights 0: they stay there
    run(config, tmp_path)
    (line,) = pd.read_csv(tmp_path / "divergences.csv").to_dict("records")
    assert (line["arm"], line["replicate"], line["round"], line["step"]) == ("reinit", 1, 1, 24)
    assert line["what"].startswith("the accuracy fell to ")


def test_a_run_without_any_ticket_left_ends(data_dir, tmp_path, monkeypatch):
    config = quick_config(data_dir, epochs=3, on_divergence="drop")
    break_in_round_1(monkeypatch, [0])
    with pytest.raises(UserError, match=r"no ticket is left: all have diverged, the last in round 1; see div"):
        run(config, tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0, 0]


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
    assert "has rounds 0 to 1; continuing with round 2" in said.out
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


def test_imp_beats_its_control_on_mnist5k(optimised, data_dir, tmp_path):
    """The lottery ticket itself, cut to 7 rounds: at a density of 1.6 % the ticket wins."""
    fields = {"rounds": 7, "epochs": 8, "replicates": 2, "pruning.fraction": 0.5, "instability.rounds": "()"}
    fields |= {"dataset.normalize": False, "dataset.data_dir": data_dir, "analysis.path_points": 2}
    command = [sys.executable, "-m", "imp_jax.main", "--config=configs/mnist5k.py", f"--workdir={tmp_path}"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    last = pd.read_csv(tmp_path / "results.csv").query("round == 6").groupby("arm")
    assert last["density"].mean()["imp"] == pytest.approx(0.5**6, abs=1e-5)
    assert last["test_accuracy"].mean()["imp"] > last["test_accuracy"].mean()["reinit"] + 0.01
    assert last["threshold"].mean()["imp"] > last["threshold"].mean()["reinit"]


# --- twins ---


def train_with_twins(experiment, number=1):
    """What rounds 0 to `number` leave, twins in the last."""
    return list(rounds_with_twins(experiment, number + 1))[number]


def rounds_with_twins(experiment, rounds):
    for end in imp.rounds(experiment._replace(rounds=rounds)):
        assert len(end.rows) == len(end.members) == len(end.networks.mask["Dense_0"]["kernel"])
        yield end.networks


def test_a_twin_is_the_ticket_trained_with_other_noise(tiny_experiment):
    experiment = tiny_experiment(**{"instability.rounds": (1,)})
    _, end = imp.rounds(experiment._replace(rounds=2))
    members = end.members
    assert members == (*experiment.members, ("twin", 0), ("twin", 1))
    networks = end.networks
    for replicate in range(2):
        ticket, twin = (members.index(Member(arm, replicate)) for arm in ("imp", "twin"))
        assert_trees_equal(member(networks.initial, ticket), member(networks.initial, twin))
        assert_trees_equal(member(networks.mask, ticket), member(networks.mask, twin))
        a, b = (member(networks.trained, i)["params"]["Dense_0"]["kernel"] for i in (ticket, twin))
        assert np.abs(a - b).max() > 1e-3
        np.testing.assert_array_equal(a == 0, b == 0)


def test_a_twin_differs_in_its_data_keys_only(tiny_experiment, monkeypatch):
    monkeypatch.setitem(ARMS, "twin", ARMS["imp"])
    networks = train_with_twins(tiny_experiment(**{"instability.rounds": (1,)}))
    for replicate in range(2):
        assert_trees_equal(member(networks.trained, replicate), member(networks.trained, 4 + replicate))


def test_without_order_and_augmentation_there_is_no_instability(tiny_experiment):
    """All images in one batch: the order is that of a sum."""
    experiment = tiny_experiment(**{"instability.rounds": (1,), "batch_size": 46})
    networks = train_with_twins(experiment)
    assert_trees_close(member(networks.trained, 0), member(networks.trained, 4))
    ends = (member(networks.trained, i) for i in (0, 4))
    _, errors = connectivity.path_metrics(*ends, experiment.dataset.train, spec=experiment.spec)
    assert connectivity.error_barrier(errors) == 0


@pytest.mark.parametrize("rewind_step", [None, 3])
def test_twins_leave_no_trace_in_the_others(tiny_experiment, rewind_step):
    """But for rounding, as another number of members is another program."""
    plain, twins = (
        list(rounds_with_twins(tiny_experiment(**{"instability.rounds": r, "rewind_step": rewind_step}), 3))
        for r in ((), (0, 1))
    )
    for a, b in zip(plain, twins, strict=True):
        b = jax.tree.map(lambda leaf: leaf[:4], b)
        assert_trees_close(tuple(a[:2]), tuple(b[:2]))
        assert_trees_equal(a.mask, b.mask)


@pytest.mark.parametrize("number", [0, 1])
def test_a_twin_of_a_rewound_ticket_parts_at_the_rewind_step(tiny_experiment, number):
    """With nothing left to train after it, it ends where imp does."""
    steps = 2 * (46 // 8)
    apart, together = (
        train_with_twins(tiny_experiment(**{"instability.rounds": (number,), "rewind_step": step}), number)
        for step in (steps - 2, steps - 1)
    )
    # of the last step only the batch differs: the difference is that of one step, and smaller than of two
    one, two = (
        np.abs(
            member(n.trained, 0)["params"]["Dense_0"]["kernel"]
            - member(n.trained, 4)["params"]["Dense_0"]["kernel"]
        )
        for n in (together, apart)
    )
    assert 0 < one.max() <= 2 * 12e-4 * 1.01  # Adam moves a weight by at most about the learning rate
    assert one.max() < two.max() <= 4 * 12e-4 * 1.5
    for networks in (apart, together):
        assert_trees_equal(member(networks.initial, 0), member(networks.initial, 4))


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
