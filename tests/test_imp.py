"""The rounds: tickets, masks, rewinding, replicates, twins. A tiny network stands in for LeNet."""

import itertools
import subprocess
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from imp_jax import connectivity, imp, masking, pruning, repulsion, training
from imp_jax.arms import ARMS, member_keys
from imp_jax.divergence import DivergedError
from imp_jax.experiment import setup
from tests.conftest import quick_config
from tests.helpers import ROOT, folders
from tests.helpers.epochs import train_epoch
from tests.helpers.rounds import assert_trees_close, assert_trees_equal, initial_weights, member, train_all


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
