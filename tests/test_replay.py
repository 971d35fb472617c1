"""Repeated trainings, compared to the bit with the rounds that they repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import imp, masking
from imp_jax.errors import UserError
from imp_jax.members import BranchMember, Member, take_members
from imp_jax.replay import perturb, replay, train_on
from tests.conftest import make_tiny_experiment
from tests.helpers.rounds import assert_trees_equal

STEPS = 10  # two epochs of 5 steps
REPLICATES = [0, 1]
IMPS = [Member("imp", replicate) for replicate in REPLICATES]


def train(experiment):
    """Train all rounds; return the networks of each, and the states of imp by round and step."""
    states = {}

    def keep(end):
        imps = take_members(jax.device_get(end.progress.states), end.members, IMPS)
        states[end.round, end.progress.step] = jax.tree.map(np.array, imps)

    ends = list(imp.rounds(experiment, on_epoch=[keep]))
    return [(end.members, end.networks) for end in ends], states


def start_of(members, networks):
    return take_members((networks.initial, networks.mask), members, IMPS)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rewind_step": None, "optimizer.finetune": True, "optimizer.schedule": "cosine"},
        {"rewind_step": 5, "optimizer.name": "momentum", "instability.rounds": (0, 1)},
        {"model.name": "normalized", "dataset.augmentation": ("flip",)},
    ],
    ids=["finetuned", "rewound", "normalised"],
)
def test_states_equal_those_of_the_run_to_the_bit(overrides):
    experiment = make_tiny_experiment(rounds=2, **overrides)
    rounds, states = train(experiment)
    for number, (members, networks) in enumerate(rounds):
        replayed = replay(experiment, number, REPLICATES, *start_of(members, networks), [5, 7, STEPS])
        assert list(replayed) == [5, 7, STEPS]
        assert_trees_equal(replayed[STEPS].states, states[number, STEPS])
        trained = take_members(networks.trained, members, IMPS)
        assert_trees_equal(replayed[STEPS].states.variables, trained)
        if number == 0 or experiment.rewind_step != 5:  # the run resets imp after its callback at this step
            assert_trees_equal(replayed[5].states, states[number, 5])


def test_a_training_is_repeated_only_to_the_last_step(monkeypatch):
    experiment = make_tiny_experiment(rounds=1)
    ((members, networks),) = train(experiment)[0]
    initial, masks = start_of(members, networks)
    epochs = []
    train_and_evaluate = imp.training.train_and_evaluate

    def count(*arguments, **options):
        epochs.append(len(arguments[4]))
        return train_and_evaluate(*arguments, **options)

    monkeypatch.setattr(imp.training, "train_and_evaluate", count)
    (state,) = replay(experiment, 0, REPLICATES, initial, masks, [0]).values()
    assert not epochs
    assert_trees_equal(state.states.params, masking.apply(initial["params"], masks))
    replay(experiment, 0, REPLICATES, initial, masks, [5])
    assert epochs == [5]


@pytest.mark.parametrize("rewind_step", [0, 3])
def test_twins_that_part_at_the_start_equal_those_of_the_run_to_the_bit(rewind_step):
    experiment = make_tiny_experiment(rounds=2, rewind_step=rewind_step, **{"instability.rounds": (0, 1)})
    for number, (members, networks) in enumerate(train(experiment)[0]):
        initial, masks = start_of(members, networks)
        start = replay(experiment, number, REPLICATES, initial, masks, [rewind_step])[rewind_step]
        twins = [BranchMember("twin", replicate, number) for replicate in REPLICATES]
        trained = train_on(experiment, twins, masks, start, [STEPS])[STEPS].states.variables
        assert_trees_equal(
            trained,
            take_members(networks.trained, members, [Member("twin", replicate) for replicate in REPLICATES]),
        )


def test_a_training_that_diverges_is_repeated_to_its_end():
    experiment = make_tiny_experiment(**{"optimizer.learning_rate": 1e30})
    state = imp.init_state(experiment)
    tickets, masks = take_members((state.tickets, state.masks), state.members, IMPS)
    states = replay(experiment, 0, REPLICATES, tickets, masks, [STEPS])
    assert not np.isfinite(states[STEPS].states.params["Dense_0"]["kernel"]).all()


def test_runs_with_repulsion_are_refused():
    experiment = make_tiny_experiment(**{"repulsion.strength": 2.0})
    state = imp.init_state(experiment)
    with pytest.raises(UserError, match=r"repulsion\.strength is 2; a training with J_r cannot be repeated"):
        replay(experiment, 0, REPLICATES, state.tickets, state.masks, [STEPS])


def test_noise_has_the_given_norm_in_each_layer_and_keeps_pruned_weights_at_zero():
    key = jax.random.key(0)
    params = {
        name: {"kernel": scale * jax.random.normal(key, (30, 20)), "bias": jnp.ones(20)}
        for name, scale in (("a", 1.0), ("b", 100.0), ("c", 1.0))
    }
    mask = masking.ones_like(params)
    mask["a"]["kernel"] = jax.random.bernoulli(key, 0.3, (30, 20))
    params = masking.apply(params, mask)
    noisy = perturb(params, mask, jax.random.key(1), 0.1, "c")
    difference = jax.tree.map(jnp.subtract, noisy, params)
    for name in "ab":
        norms = [np.linalg.norm(tree[name]["kernel"]) for tree in (difference, params)]
        assert norms[0] == pytest.approx(0.1 * norms[1], rel=1e-4)
        values = np.asarray(difference[name]["kernel"])[np.asarray(mask[name]["kernel"])]
        assert np.mean((values / values.std()) ** 4) == pytest.approx(3, abs=1)  # of a Gaussian
    assert not noisy["a"]["kernel"][~mask["a"]["kernel"]].any()
    assert all(not difference[name]["bias"].any() for name in "abc")
    assert not difference["c"]["kernel"].any()
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert_trees_equal(perturb(zeros, mask, key, 0.1), zeros)
