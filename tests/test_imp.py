"""Rounds of pruning with a tiny network: masks, tickets, rewinding, replicates, twins."""

import itertools
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from imp_jax import connectivity, imp, masking, pruning, repulsion, training
from imp_jax.arms import ARMS
from imp_jax.divergence import DivergedError
from imp_jax.experiment import setup
from imp_jax.members import member_keys
from imp_jax.next_masks import prune
from imp_jax.round_state import default_plan
from tests.conftest import quick_config
from tests.helpers import ROOT, folders
from tests.helpers.epochs import train_epoch
from tests.helpers.rounds import (
    assert_trees_close,
    assert_trees_equal,
    initial_weights,
    take_member,
    train_rounds,
)


def test_masks_shrink_by_exact_counts_and_are_shared_by_the_arms(tiny_experiment):
    experiment = tiny_experiment()
    rounds = [networks for networks, _ in train_rounds(experiment, rounds=4)]
    expected = 16 * 6 + 6 * 5 + 5 * 3
    for networks in rounds:
        counts = jax.vmap(masking.survivors)(networks.mask)
        np.testing.assert_array_equal(counts, expected)
        expected -= round(0.2 * expected)
        for replicate in range(2):
            assert_trees_equal(take_member(networks.mask, replicate), take_member(networks.mask, 2 + replicate))
        assert all(np.all(layer["bias"]) for layer in networks.mask.values())
    for earlier, later in itertools.pairwise(rounds):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a & b, b), earlier.mask, later.mask)


def test_next_mask_prunes_the_trained_weights_of_imp_by_magnitude(tiny_experiment):
    experiment = tiny_experiment()
    first, second = (networks for networks, _ in train_rounds(experiment, rounds=2))
    for i in range(4):
        mask, _ = pruning.prune_by_magnitude(
            take_member(first.trained["params"], i % 2), take_member(first.mask, i % 2)
        )
        assert_trees_equal(take_member(second.mask, i), mask)


def test_threshold_is_the_largest_magnitude_that_pruning_removes(tiny_experiment):
    experiment = tiny_experiment()
    networks, thresholds = next(train_rounds(experiment))
    for i in range(4):
        kernels = [layer["kernel"].ravel() for layer in take_member(networks.trained["params"], i).values()]
        magnitudes = np.sort(np.abs(np.concatenate(kernels)))
        assert thresholds[i] == magnitudes[round(0.2 * len(magnitudes)) - 1]


def test_replicates_do_not_depend_on_their_number(tiny_experiment):
    """An arm does not depend on the other arms either."""
    three, one, only_imp = (
        tiny_experiment(**overrides)
        for overrides in ({"replicates": 3}, {"replicates": 1}, {"replicates": 1, "arms": ("imp",)})
    )
    for (a, _), (b, _), (c, _) in zip(
        train_rounds(three), train_rounds(one), train_rounds(only_imp), strict=True
    ):
        for i_of_three, i_of_one in ((0, 0), (3, 1)):  # imp, reinit
            assert_trees_equal(take_member(a.mask, i_of_three), take_member(b.mask, i_of_one))
            assert_trees_close(take_member(a.trained, i_of_three), take_member(b.trained, i_of_one))
        assert_trees_close(take_member(b.trained, 0), take_member(c.trained, 0))


def test_networks_are_reproducible_from_the_seed(tiny_experiment):
    first, same_seed, other_seed = (next(train_rounds(tiny_experiment(seed=seed)))[0] for seed in (1, 1, 2))
    assert_trees_equal(first, same_seed)
    assert not np.array_equal(
        first.trained["params"]["Dense_0"]["kernel"], other_seed.trained["params"]["Dense_0"]["kernel"]
    )


# within the first epoch of 5 steps, at its end, and within the second
@pytest.mark.parametrize("rewind_step", [3, 5, 7])
def test_imp_rewinds_to_step_k(tiny_experiment, rewind_step):
    """Round 0 stores imp's weights at step k; later rounds train them from step k, with a fresh optimizer."""
    experiment = tiny_experiment(
        rewind_step=rewind_step, **{"optimizer.schedule": "cosine", "optimizer.learning_rate": 0.01}
    )
    plain = tiny_experiment(**{"optimizer.schedule": "cosine", "optimizer.learning_rate": 0.01})
    (first, _), (second, _) = train_rounds(experiment, rounds=2)
    (plain_first, _), (plain_second, _) = train_rounds(plain, rounds=2)
    assert_trees_close(first.trained, plain_first.trained)  # storing the ticket does not change the training

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
        assert_trees_close(take_member(first.initial, i), take_member(at_k, i))
        assert_trees_equal(take_member(second.initial["params"], i), take_member(ticket, i))
    start = training.init_states(at_k, second.mask, spec=experiment.spec)
    expected = train(start, second.mask, number=1, first_step=rewind_step).variables
    for i in range(2):
        assert_trees_close(take_member(second.trained, i), take_member(expected, i))
    control = masking.apply(tickets["params"], second.mask)  # reinit starts from its random initialisation
    assert_trees_equal(take_member(second.initial["params"], 2), take_member(control, 2))
    assert_trees_close(take_member(second.trained, 2), take_member(plain_second.trained, 2))


def test_imp_without_rewinding_continues_from_its_trained_weights(tiny_experiment):
    """The control is still reset."""
    experiment = tiny_experiment(rewind_step=None)
    initial = initial_weights(experiment)["params"]
    (first, _), (second, _) = train_rounds(experiment, rounds=2)
    continued = masking.apply(first.trained["params"], second.mask)
    control = masking.apply(initial, second.mask)
    for i in range(2):
        assert_trees_equal(take_member(second.initial["params"], i), take_member(continued, i))
        assert_trees_equal(take_member(second.initial["params"], 2 + i), take_member(control, 2 + i))


def test_one_shot_pruning_keeps_30_percent_of_the_weights(tiny_experiment):
    experiment = tiny_experiment(**{"pruning.fraction": 0.7})
    *_, (last, _) = train_rounds(experiment, rounds=2)
    np.testing.assert_array_equal(jax.vmap(masking.survivors)(last.mask), 141 - round(0.7 * 141))


def test_random_score_prunes_as_many_weights_as_magnitude_but_others(tiny_experiment):
    by_random_score, by_magnitude = (
        [networks for networks, _ in train_rounds(tiny_experiment(**{"pruning.score": score}), rounds=2)][1]
        for score in ("random", "magnitude")
    )
    np.testing.assert_array_equal(
        jax.vmap(masking.survivors)(by_random_score.mask), jax.vmap(masking.survivors)(by_magnitude.mask)
    )
    assert not np.array_equal(by_random_score.mask["Dense_0"]["kernel"], by_magnitude.mask["Dense_0"]["kernel"])
    imp_mask, reinit_mask = (take_member(by_random_score.mask, i) for i in (0, 2))
    assert_trees_equal(imp_mask, reinit_mask)


@pytest.fixture
def compilations():
    """Return a function that counts the programs compiled, or loaded from the cache, since the test began."""
    seconds = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(seconds)
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("execution", ["scan_vmap", "scan_unroll", "step_unroll"])
def test_rounds_after_the_second_compile_nothing(tiny_experiment, compilations, execution):
    experiment = tiny_experiment(execution=execution, batch_size=10)  # a batch size that no other test compiles
    counts = []
    for _ in imp.rounds(experiment._replace(rounds=4), on_round=[lambda end: counts.append(compilations())]):
        pass
    assert counts[0] > 3  # the count works
    assert counts[1] == counts[3]


def test_training_time_excludes_compilation_time(tiny_experiment, monkeypatch):
    """`train` reads the compile time twice per epoch here; each reading adds 100 s to the fake compile time."""
    compile_clock, epoch_times = itertools.count(0, 100), []
    monkeypatch.setattr(imp, "compile_seconds", lambda: next(compile_clock))
    experiment = tiny_experiment()
    state = imp.init_state(experiment)
    start = time.perf_counter()
    end = imp.train(
        experiment, 0, state, on_epoch=[lambda end: epoch_times.append((end.seconds, end.compile_seconds))]
    )
    elapsed = time.perf_counter() - start
    training_times, compile_times = zip(*epoch_times, strict=True)
    assert compile_times == (100, 100)  # two epochs
    assert sum(training_times) == end.seconds
    assert 0 < end.seconds + 200 < elapsed


def test_rows_hold_the_metrics_of_each_member(tiny_experiment):
    experiment = tiny_experiment()
    state = imp.init_state(experiment)
    for number in range(2):
        progress = imp.train(experiment, number, state)._replace(seconds=1.23456)
        networks = imp.copy_networks(state, progress)
        trained, initial = progress.states.variables, progress.tickets["params"]
        masks, thresholds = prune(experiment, number, state.members, trained, state.masks, initial)
        rows = imp.measure(experiment, number, state, progress, networks, thresholds)
        plan = default_plan(experiment, number + 1)
        _, state = imp.end_round(experiment, number, state, progress, {}, networks, rows, masks, plan)
    assert [(row["arm"], row["replicate"], row["round"]) for row in rows] == [
        ("imp", 0, 1), ("imp", 1, 1), ("reinit", 0, 1), ("reinit", 1, 1),
    ]  # fmt: skip
    for i, row in enumerate(rows):
        dataset = experiment.dataset
        for split, (images, labels) in (("train", dataset.train), ("test", dataset.test)):
            logits = np.asarray(experiment.spec.model.apply(take_member(networks.trained, i), images / 255))
            labels = np.asarray(labels)
            assert row[f"{split}_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
            losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
            assert row[f"{split}_loss"] == pytest.approx(losses.mean(), rel=1e-4)
        assert row["density"] == pytest.approx((141 - 28) / 141)
        assert row["threshold"] == pytest.approx(float(thresholds[i]))
        assert row["seconds"] == 1.235


def test_step_of_a_divergence_counts_from_the_start_of_training(tiny_experiment):
    experiment = tiny_experiment()
    experiment.learning_rates[1] = np.inf  # the second epoch of 5 steps
    with pytest.raises(DivergedError) as error:
        imp.train(experiment, 0, imp.init_state(experiment))
    assert error.value.round == 0
    assert {m: step for m, (step, _) in error.value.diverged.items()} == dict.fromkeys(experiment.members, 6)


def test_random_pruning_draws_new_scores_each_round(tiny_experiment):
    experiment = tiny_experiment(**{"pruning.score": "random", "pruning.fraction": 0.5})
    networks, _ = next(train_rounds(experiment))
    (first, _), (second, _) = (
        prune(
            experiment, number, experiment.members, networks.trained, networks.mask, networks.initial["params"]
        )
        for number in (0, 1)
    )
    assert not np.array_equal(first["Dense_0"]["kernel"], second["Dense_0"]["kernel"])


@pytest.mark.parametrize("execution", ["scan_unroll", "step_vmap", "step_unroll"])
def test_execution_modes_train_the_same_networks(tiny_experiment, execution):
    for (networks, thresholds), (default_networks, default_thresholds) in zip(
        train_rounds(tiny_experiment(execution=execution)), train_rounds(tiny_experiment()), strict=True
    ):
        assert_trees_close(networks.trained, default_networks.trained)
        np.testing.assert_allclose(thresholds, default_thresholds, rtol=1e-4)


def test_excluded_layers_stay_dense(tiny_experiment):
    experiment = tiny_experiment(**{"pruning.exclude": ("Dense_0",), "pruning.fraction": 0.5})
    _, end = imp.rounds(experiment._replace(rounds=2))
    assert end.networks.mask["Dense_0"]["kernel"].all()
    # the other layers have 6 · 5 + 5 · 3 weights
    assert end.rows[0]["density"] == pytest.approx((45 - 22) / 45)


def test_train_reaches_the_loss_in_few_stack_frames(tiny_experiment, monkeypatch):
    """A person who steps through the traced code finds the loss after a few calls."""
    loss_fn, stacks = training.loss_fn, []

    def record_stack(*args, **kwargs):
        package = str(ROOT / "imp_jax")
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
        (train,) = (i for i, f in enumerate(frames) if f.name == "train" and f.filename.endswith("/imp.py"))
        stacks.append([frame.name for frame in frames[train + 1 :]])
        return loss_fn(*args, **kwargs)

    monkeypatch.setattr(training, "loss_fn", record_stack)
    experiment = tiny_experiment(batch_size=9)  # a batch size that no other test traces
    imp.train(experiment, 0, imp.init_state(experiment))
    assert stacks
    assert max(map(len, stacks)) <= 5, stacks


def test_streamed_training_applies_train_step_to_each_batch(tmp_path):
    """The expected networks come from `train_step` on separately read batches, one member at a time."""
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
    round_state = imp.init_state(experiment)
    optima = repulsion.add_optimum(
        None, jax.tree.map(jnp.cos, round_state.tickets["params"]), round_state.masks, max_optima=1
    )
    trained = imp.train(experiment, 0, round_state._replace(optima=optima)).states.params
    keys = member_keys(experiment.members, experiment.seed, lambda m: ["data", ARMS[m.arm].number, 0])
    states = training.init_states(round_state.tickets, round_state.masks, spec=experiment.spec)
    for i in range(2):
        state, mask, member_optima = (take_member(tree, i) for tree in (states, round_state.masks, optima))
        batches = experiment.dataset.train.training_batches(jax.random.key_data(keys)[i : i + 1], 2, 4)
        for (images, labels), rate in zip(batches, experiment.learning_rates.ravel(), strict=True):
            state, _ = training.train_step(
                state, mask, images[0], labels[0], rate, member_optima, spec=experiment.spec
            )
        assert_trees_close(take_member(trained, i), state.params)


def test_imp_beats_its_control_on_mnist5k(data_dir):
    """The lottery ticket effect in 6 rounds: at a density of 1 % the ticket is better than its control."""
    fields = {"model.width": 0.5, "pruning.fraction": 0.6, "batch_size": 60, "instability.rounds": ()}
    config = quick_config(data_dir, rounds=6, epochs=5, replicates=2, **fields)
    *_, last = imp.rounds(setup(config))
    rows = pd.DataFrame(last.rows).groupby("arm").mean()
    assert rows["density"]["imp"] == pytest.approx(0.4**5, abs=1e-4)
    assert rows["test_accuracy"]["imp"] > rows["test_accuracy"]["reinit"] + 0.01
    assert rows["threshold"]["imp"] > rows["threshold"]["reinit"]


# --- twins ---


def train_round(experiment, number=1):
    """Train rounds 0 to `number` in memory; return the networks of the last one."""
    return list(train_networks(experiment, number + 1))[number]


def train_networks(experiment, rounds):
    """Train in memory; yield the networks of each round, twins included."""
    for end in imp.rounds(experiment._replace(rounds=rounds)):
        assert len(end.rows) == len(end.members) == len(end.networks.mask["Dense_0"]["kernel"])
        yield end.networks


def test_twin_with_the_random_keys_of_imp_equals_imp(tiny_experiment, monkeypatch):
    monkeypatch.setitem(ARMS, "twin", ARMS["imp"])
    networks = train_round(tiny_experiment(**{"instability.rounds": (1,)}))
    for replicate in range(2):
        assert_trees_equal(
            take_member(networks.trained, replicate), take_member(networks.trained, 4 + replicate)
        )


def test_full_batch_training_has_no_instability(tiny_experiment):
    """If one batch holds all images, their order matters only for the rounding of sums."""
    experiment = tiny_experiment(**{"instability.rounds": (1,), "batch_size": 46})
    networks = train_round(experiment)
    assert_trees_close(take_member(networks.trained, 0), take_member(networks.trained, 4))
    ends = (take_member(networks.trained, i) for i in (0, 4))
    _, errors = connectivity.path_metrics(*ends, experiment.dataset.train, spec=experiment.spec)
    assert connectivity.error_barrier(errors) == 0


@pytest.mark.parametrize("rewind_step", [None, 3])
def test_twins_do_not_change_other_members(tiny_experiment, rewind_step):
    """Up to rounding, because each number of members has its own compiled program."""
    without_twins, with_twins = (
        list(train_networks(tiny_experiment(**{"instability.rounds": r, "rewind_step": rewind_step}), 3))
        for r in ((), (0, 1))
    )
    for a, b in zip(without_twins, with_twins, strict=True):
        b = jax.tree.map(lambda leaf: leaf[:4], b)
        assert_trees_close(tuple(a[:2]), tuple(b[:2]))
        assert_trees_equal(a.mask, b.mask)


@pytest.mark.parametrize("number", [0, 1])
def test_twin_differs_from_imp_only_after_the_rewind_step(tiny_experiment, number):
    """The fewer steps follow the rewind step, the closer the twin ends to imp."""
    steps = 2 * (46 // 8)
    two_steps_left, one_step_left = (
        train_round(tiny_experiment(**{"instability.rounds": (number,), "rewind_step": step}), number)
        for step in (steps - 2, steps - 1)
    )
    # in the last step only the batch differs, so the difference is smaller than after two steps
    one_step, two_steps = (
        np.abs(
            take_member(n.trained, 0)["params"]["Dense_0"]["kernel"]
            - take_member(n.trained, 4)["params"]["Dense_0"]["kernel"]
        )
        for n in (one_step_left, two_steps_left)
    )
    assert 0 < one_step.max() <= 2 * 12e-4 * 1.01  # Adam moves a weight by at most about the learning rate
    assert one_step.max() < two_steps.max() <= 4 * 12e-4 * 1.5
    for networks in (two_steps_left, one_step_left):
        assert_trees_equal(take_member(networks.initial, 0), take_member(networks.initial, 4))
