"""Members and their random keys."""

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax.arms import ARMS
from imp_jax.members import (
    Member,
    add_scheduled_members,
    member_keys,
    members_for_next_round,
    members_of_rows,
    take_members,
    where_members,
)

MEMBERS = tuple(Member(arm, replicate) for arm in ("imp", "reinit") for replicate in (0, 1))


TWINS = {"twin": frozenset({3})}


def test_members_are_ordered_by_arm_with_twins_last(tiny_experiment):
    experiment = tiny_experiment(**{"instability.rounds": (3,)})
    assert (experiment.members, experiment.scheduled_arms) == (MEMBERS, TWINS)
    assert add_scheduled_members(MEMBERS, TWINS, 2) == MEMBERS
    assert add_scheduled_members(MEMBERS, TWINS, 3) == (*MEMBERS, ("twin", 0), ("twin", 1))
    assert add_scheduled_members([Member("imp", 1)], TWINS, 3) == (("imp", 1), ("twin", 1))


def test_replicates_without_imp_are_not_trained_in_the_next_round():
    rows = [{"arm": arm, "replicate": r, "round": 4} for arm, r in (("imp", 1), ("reinit", 0), ("reinit", 1))]
    members = members_of_rows([*rows, {"arm": "imp", "replicate": 0, "round": 3}], 4)
    assert members == (("imp", 1), ("reinit", 0), ("reinit", 1))
    assert members_for_next_round((*members, Member("twin", 1)), ("imp", "reinit")) == (
        ("imp", 1),
        ("reinit", 1),
    )


def test_take_members_takes_entries_of_leaves_in_the_wanted_order():
    tree = {"a": np.array([10, 11, 20, 21])}
    np.testing.assert_array_equal(take_members(tree, MEMBERS, [MEMBERS[3], MEMBERS[0]])["a"], [21, 10])
    assert take_members(tree, MEMBERS, list(MEMBERS)) is tree


def test_member_keys_fold_in_seed_replicate_stream_and_numbers():
    members = add_scheduled_members(MEMBERS, TWINS, 3)
    keys = member_keys(members, 7, lambda member: ["data", ARMS[member.arm].number, 3])
    expected = jax.random.key(7)
    for number in (1, 2, ARMS["reinit"].number, 3):  # replicate, the stream "data", arm, round
        expected = jax.random.fold_in(expected, number)
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys[3], expected)))
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == len(members)
    only_one = member_keys([Member("reinit", 1)], 7, lambda member: ["data", ARMS[member.arm].number, 3])
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys[3], only_one[0])))


def test_data_order_differs_between_rounds_arms_and_replicates(tiny_experiment):
    experiment = tiny_experiment()
    keys = [
        member_keys(experiment.members, experiment.seed, lambda m, n=n: ["data", ARMS[m.arm].number, n])
        for n in range(2)
    ]
    orders = {tuple(np.asarray(jax.random.permutation(key, 46))) for round_keys in keys for key in round_keys}
    assert len(orders) == 8


def test_where_members_selects_whole_members():
    ones, zeros = {"a": jnp.ones((3, 2, 2)), "b": jnp.ones(3)}, {"a": jnp.zeros((3, 2, 2)), "b": jnp.zeros(3)}
    chosen = where_members(jnp.array([True, False, True]), ones, zeros)
    np.testing.assert_array_equal(chosen["b"], [1, 0, 1])
    np.testing.assert_array_equal(chosen["a"], np.array([1, 0, 1])[:, None, None] * np.ones((3, 2, 2)))
