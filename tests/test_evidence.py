"""Rounds that train and prune as much as the connectivity of their solutions asks for."""

import jax
import numpy as np
import pandas as pd
import pytest

from imp_jax import branch, evidence, imp, masking, optimizers, runs
from imp_jax import config as configs
from imp_jax.errors import UserError
from imp_jax.members import Member
from imp_jax.round_state import RoundPlan, take_images
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.rounds import assert_trees_equal, initial_weights, take_member

EVIDENCE = {"retraining.policy": "evidence", "retraining.epochs": 1, "evidence.images": 40}


def error_of_lenet(params, images, labels):
    """Compute the error of a LeNet in NumPy."""
    outputs = images.reshape(len(images), -1) / 255
    for number, layer in enumerate(sorted(params)):
        outputs = outputs @ np.float64(params[layer]["kernel"]) + params[layer]["bias"]
        outputs = np.maximum(outputs, 0) if number < len(params) - 1 else outputs
    return np.mean(outputs.argmax(1) != labels)


def errors_on_path(experiment, start, end, points=11):
    images, labels = take_images(experiment, "evidence images", 0, experiment.evidence_images)
    paths = [jax.tree.map(lambda a, b: (1 - t) * a + t * b, start, end) for t in np.linspace(0, 1, points)]  # noqa: B023
    return np.array([error_of_lenet(params, images, labels) for params in paths])


def imp_params(end, replicate):
    return take_member(end.networks.trained, end.members.index(("imp", replicate)))["params"]


def train(experiment):
    return list(imp.rounds(experiment))


def test_a_round_is_short_while_the_last_two_solutions_are_connected(tiny_experiment):
    """Each row has the largest barrier of the replicates, which decides its epochs."""
    experiment = tiny_experiment(**EVIDENCE, rounds=5, **{"optimizer.learning_rate": 0.03})
    epochs = set()
    for limit in (0.011, 0.051, 0.101):  # not a multiple of half an image
        experiment = experiment._replace(retraining=experiment.retraining._replace(barrier=limit))
        ends = train(experiment)
        assert all(
            row["epochs"] == 2 and "retraining_barrier" not in row for end in ends[:2] for row in end.rows
        )
        for earlier, later, end in zip(ends, ends[1:], ends[2:], strict=False):
            pairs = ((imp_params(earlier, i), imp_params(later, i)) for i in range(2))
            errors = [errors_on_path(experiment, *pair) for pair in pairs]
            expected = max(np.max(e) - (e[0] + e[-1]) / 2 for e in errors)
            assert end.rows[0]["retraining_barrier"] == pytest.approx(expected, abs=1e-6)
            assert end.rows[0]["epochs"] == (1 if expected <= limit else 2)
            epochs.add(end.rows[0]["epochs"])
    assert epochs == {1, 2}


def test_a_short_round_starts_from_the_trained_weights_and_a_full_one_from_the_ticket(tiny_experiment):
    experiment = tiny_experiment(**EVIDENCE, rounds=4)
    tickets = initial_weights(experiment)["params"]
    plans = iter([RoundPlan(), RoundPlan(True, True, 0.0), RoundPlan(False, False, 0.5), RoundPlan()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imp, "plan_next_round", lambda *_: next(plans))
        ends = train(experiment)
    assert [end.rows[0]["epochs"] for end in ends] == [2, 2, 1, 2]
    for i, member in enumerate(experiment.members):
        if member.arm == "imp":
            end = ends[2]
            previous = take_member(ends[1].networks.trained, i)["params"]
            initial, mask = (
                take_member(tree, i) for tree in (end.networks.initial["params"], end.networks.mask)
            )
            assert_trees_equal(initial, masking.apply(previous, mask))
            mask = take_member(ends[3].networks.mask, i)
            initial = take_member(ends[3].networks.initial["params"], i)
            assert_trees_equal(initial, masking.apply(take_member(tickets, i), mask))


@pytest.mark.parametrize(
    ("schedule", "milestones", "expected"),
    [
        ("cosine", (), lambda t: (1 + np.cos(np.pi * t)) / 2),
        ("step", (4.0,), lambda t: np.where(t < 0.5, 1, 0.1)),
    ],
)
def test_the_schedule_of_a_short_round_is_compressed(tiny_experiment, schedule, milestones, expected):
    fields = {
        "optimizer.schedule": schedule,
        "optimizer.milestones": milestones,
        "optimizer.warmup_epochs": 2.0,
    }
    experiment = tiny_experiment(
        **fields,
        epochs=8,
        **{"retraining.policy": "short", "retraining.epochs": 2, "optimizer.learning_rate": 0.5},
    )
    rates = experiment.learning_rates_in(3, short=True)
    time = np.arange(10) / 10  # two epochs of five steps
    np.testing.assert_allclose(rates.ravel(), 0.5 * expected(time) * np.minimum(time / 0.25, 1), rtol=1e-6)


def test_short_rounds_train_like_those_of_a_run_with_as_many_epochs(tiny_experiment):
    experiment = tiny_experiment(**{"retraining.policy": "short", "retraining.epochs": 1})
    ends = train(experiment)
    assert [end.rows[0]["epochs"] for end in ends] == [2, 1, 1]
    assert "retraining_barrier" not in ends[2].rows[0]
    other = tiny_experiment(epochs=1)
    state = imp.init_state(other)._replace(masks=ends[1].networks.mask)
    progress = imp.train(other, 1, state)
    assert_trees_equal(ends[1].networks.trained, progress.states.variables)


def test_the_largest_fraction_that_stays_within_the_barrier_is_pruned(tiny_experiment):
    fields = {"pruning.policy": "evidence", "pruning.fractions": (0.1, 0.3, 0.6), "evidence.images": 40}
    experiment = tiny_experiment(**fields, rounds=4, epochs=8)
    chosen = set()
    for barrier in (1e-9, 0.06, 1.0):
        experiment = experiment._replace(pruning=experiment.pruning._replace(barrier=barrier))
        alive = 141
        for end in train(experiment):
            increases = {}
            for fraction in (0.1, 0.3, 0.6):
                errors = []
                for i in range(2):
                    params = imp_params(end, i)
                    mask = take_member(end.networks.mask, end.members.index(("imp", i)))
                    pruned = prune_in_numpy(params, mask, round(fraction * alive))
                    errors.append(errors_on_path(experiment, params, pruned))
                increases[fraction] = max(e.max() - e[0] for e in errors)
            allowed = [f for f in (0.6, 0.3) if increases[f] <= barrier] + [0.1]
            assert end.rows[0]["pruning_barrier"] == pytest.approx(increases[allowed[0]], abs=1e-6)
            alive -= round(allowed[0] * alive)
            assert masking.survivors(take_member(end.next_masks, 0)) == alive
            chosen.add(allowed[0])
    assert chosen == {0.1, 0.3, 0.6}


def prune_in_numpy(params, mask, count):
    """Set the `count` smallest survivors of a LeNet's kernels to zero."""
    kernels = {layer: np.where(mask[layer]["kernel"], params[layer]["kernel"], 0) for layer in params}
    alive = np.sort(np.concatenate([np.abs(k[np.asarray(mask[n]["kernel"])]) for n, k in kernels.items()]))
    threshold = alive[count - 1]
    return {
        n: {"kernel": np.where(np.abs(k) <= threshold, 0, k), "bias": params[n]["bias"]}
        for n, k in kernels.items()
    }


def test_a_replicate_that_diverges_leaves_the_plan_of_the_others(tiny_experiment):
    experiment = tiny_experiment(**EVIDENCE, on_divergence="drop", rounds=4)
    state = imp.init_state(experiment)
    kernel = state.tickets["params"]["Dense_0"]["kernel"]
    state.tickets["params"]["Dense_0"]["kernel"] = kernel.at[1].set(np.nan)  # imp of replicate 1
    ends = list(imp.rounds(experiment, state))
    assert [Member("imp", 0) in end.members and Member("imp", 1) not in end.members for end in ends] == [
        True
    ] * 4
    assert "retraining_barrier" in ends[3].rows[0]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("rewind_step", [0, 3])
def test_a_run_that_is_killed_after_each_round_gives_the_same_bits(tmp_path, rewind_step):
    config = make_tiny_config(
        **EVIDENCE,
        rounds=5,
        rewind_step=rewind_step,
        **{"pruning.policy": "evidence", "retraining.barrier": 0.04},
    )
    dataset = make_tiny_dataset()
    runs.run(config, tmp_path / "whole", dataset=dataset)

    def kill(end):
        raise KilledError

    for _ in range(5):
        with pytest.raises(KilledError):
            runs.run(config, tmp_path / "killed", dataset=dataset, on_round=[kill])
    whole, killed = (pd.read_csv(tmp_path / name / "results.csv") for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), killed.drop(columns="seconds"))
    assert set(whole["epochs"]) == {1, 2}
    assert whole["pruning_barrier"].notna().all()


def test_deleted_rounds_do_not_change_the_decisions(tmp_path):
    from imp_jax import analysis

    config = make_tiny_config(**EVIDENCE, rounds=5, keep_checkpoints="ends", **{"retraining.barrier": 0.04})
    config.instability.rounds = ()
    tables = []
    for name, kept in (("whole", "all"), ("ends", "ends")):
        config.keep_checkpoints = kept
        for rounds in (3, 5):
            config.rounds = rounds
            runs.run(config, tmp_path / name, dataset=make_tiny_dataset(), analyses=analysis)
        tables.append(pd.read_csv(tmp_path / name / "results.csv").drop(columns="seconds"))
    pd.testing.assert_frame_equal(*tables)


def test_branches_of_short_rounds_train_short_and_leave_out_round_0(tmp_path):
    config = make_tiny_config(**{"retraining.policy": "short", "retraining.epochs": 1}, arms=("imp",))
    runs.run(config, tmp_path / "run", dataset=make_tiny_dataset())
    path = branch.run(tmp_path / "run", ["reinit"], dataset=make_tiny_dataset())
    results = pd.read_csv(path / "results.csv")
    assert set(results["round"]) == {1, 2}
    assert set(results["epochs"]) == {1}
    config = make_tiny_config(**EVIDENCE, arms=("imp",))
    runs.run(config, tmp_path / "evidence", dataset=make_tiny_dataset())
    with pytest.raises(
        UserError, match=r"retraining.policy is 'evidence'; a branch .*=full or short should be"
    ):
        branch.run(tmp_path / "evidence", ["reinit"], dataset=make_tiny_dataset())
    overrides = {"retraining.policy": "full"}
    path = branch.run(tmp_path / "evidence", ["reinit"], overrides=overrides, dataset=make_tiny_dataset())
    assert set(pd.read_csv(path / "results.csv")["epochs"]) == {2}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"retraining.epochs": 1}, "retraining.epochs is 1; .* it has no effect and should be None"),
        (
            {"retraining.policy": "short"},
            "retraining.epochs is None; .* number of epochs below .* training, 25",
        ),
        ({"retraining.policy": "short", "retraining.epochs": 25}, "retraining.epochs is 25; .* below"),
        ({"retraining.barrier": 0.1}, "retraining.barrier is 0.1; .* no effect and should be 0.02"),
        ({"pruning.barrier": 0.1}, "pruning.barrier is 0.1; .* no effect and should be 0.02"),
        ({"pruning.fractions": (0.1,)}, "pruning.fractions is .* no effect"),
        ({"pruning.policy": "evidence", "pruning.fraction": 0.3}, "pruning.fraction is 0.3; .* no effect"),
        ({"pruning.policy": "evidence", "pruning.fractions": (0.5, 0.2)}, "it should be rising fractions"),
        ({"evidence.images": 5}, "evidence.images is 5; .* no effect and should be 1000"),
        (
            {"pruning.policy": "evidence", "pruning.network": "dense"},
            "pruning.policy is 'evidence'; pruning.network is 'dense', .* should be 'fixed'",
        ),
        ({"optimizer.weight_decay_until": 0.1}, "weight_decay_until is 0.1; optimizer.weight_decay is 0, so"),
    ],
)
def test_settings_without_effect_are_refused(fields, sentence):
    config = configs.default()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=sentence):
        configs.validate(config)


def test_the_policies_that_need_no_evidence_compute_none(tiny_experiment, monkeypatch):
    monkeypatch.setattr(evidence, "_errors_on_paths", None)
    assert all("pruning_barrier" not in end.rows[0] for end in train(tiny_experiment(rounds=3)))


def test_weight_decay_ends_below_a_density():
    """With a gradient of 0, a step of SGD multiplies the weights by 1 − rate · λ if weights decay."""
    options = {"learning_rate": 0.5, "weight_decay": 0.2, "weight_decay_until": 0.4, "exclude": ("Dense_1",)}
    tx = optimizers.make_optimizer("sgd", **options)
    kernels = {
        "Dense_0": {"kernel": np.ones((2, 5), np.float32)},
        "Dense_1": {"kernel": np.ones((9, 9), np.float32)},
    }
    zeros = jax.tree.map(np.zeros_like, kernels)
    for survivors, decays in ((10, True), (4, True), (3, False), (0, False)):
        mask = masking.ones_like(kernels)
        mask["Dense_0"]["kernel"] = np.arange(10).reshape(2, 5) < survivors
        update = jax.jit(
            lambda mask: tx.update(zeros, tx.init(kernels), kernels, mask=mask, learning_rate=0.5)[0]
        )
        updates = update(mask)
        np.testing.assert_allclose(updates["Dense_1"]["kernel"], -0.1 * decays, rtol=1e-6)
        np.testing.assert_allclose(
            updates["Dense_0"]["kernel"], -0.1 * decays * mask["Dense_0"]["kernel"], rtol=1e-6
        )
