"""The tickets, masks and earlier optima that the members of a round start from, with a tiny network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax import imp, masking
from imp_jax.members import Member, add_scheduled_members, imp_of_each, members_for_next_round
from imp_jax.round_state import repeat_optima, start_round
from tests.helpers.rounds import assert_trees_equal, initial_weights, take_member, train_rounds

MEMBERS = tuple(Member(arm, replicate) for arm in ("imp", "reinit") for replicate in (0, 1))
TWINS = {"twin": frozenset({3})}


def test_survivors_start_each_round_from_their_initial_values(tiny_experiment):
    experiment = tiny_experiment()
    initial = initial_weights(experiment)["params"]
    for networks, _ in train_rounds(experiment):
        assert_trees_equal(networks.initial["params"], masking.apply(initial, networks.mask))
        pruned = jax.tree.map(jnp.logical_not, networks.mask)
        assert not any(np.any(x) for x in jax.tree.leaves(masking.apply(networks.trained["params"], pruned)))


def test_arms_and_replicates_start_and_train_differently(tiny_experiment):
    networks, _ = next(train_rounds(tiny_experiment()))
    for tree in (networks.initial, networks.trained):
        kernels = tree["params"]["Dense_0"]["kernel"]
        for i, j in itertools.combinations(range(4), 2):
            assert not np.array_equal(kernels[i], kernels[j])


def test_twin_trains_the_ticket_of_imp_with_other_sgd_noise(tiny_experiment):
    experiment = tiny_experiment(**{"instability.rounds": (1,)})
    _, end = imp.rounds(experiment._replace(rounds=2))
    members = end.members
    assert members == (*experiment.members, ("twin", 0), ("twin", 1))
    networks = end.networks
    for replicate in range(2):
        imp_index, twin_index = (members.index(Member(arm, replicate)) for arm in ("imp", "twin"))
        assert_trees_equal(take_member(networks.initial, imp_index), take_member(networks.initial, twin_index))
        assert_trees_equal(take_member(networks.mask, imp_index), take_member(networks.mask, twin_index))
        trained = (take_member(networks.trained, i) for i in (imp_index, twin_index))
        a, b = (variables["params"]["Dense_0"]["kernel"] for variables in trained)
        assert np.abs(a - b).max() > 1e-3
        np.testing.assert_array_equal(a == 0, b == 0)


def test_twins_take_ticket_mask_and_optima_of_imp_for_one_round(tiny_experiment):
    members = add_scheduled_members(MEMBERS, TWINS, 3)
    np.testing.assert_array_equal(imp_of_each(members), [0, 1, 0, 1, 0, 1])
    tree = {"a": np.array([10, 11, 20, 21])}
    np.testing.assert_array_equal(repeat_optima(tree, MEMBERS, members)["a"], [10, 11, 20, 21, 10, 11])
    assert repeat_optima(tree, MEMBERS, MEMBERS) is tree
    assert members_for_next_round(members, ("imp", "reinit")) == MEMBERS

    experiment = tiny_experiment(**{"instability.rounds": (3,)})
    initial = imp.init_state(experiment)
    tickets, masks = jax.tree.map(lambda leaf: leaf[:2], (initial.tickets, initial.masks))
    state = start_round(experiment, 3, MEMBERS, tickets, masks)
    assert state.members == members
    for tree in (state.tickets, state.masks):
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[4:], leaf[:2]), tree)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:2], b), state.tickets, tickets)
