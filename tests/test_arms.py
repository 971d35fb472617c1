import jax
import jax.numpy as jnp
import numpy as np

from imp_jax import config as configs
from imp_jax.arms import (
    ARMS,
    Member,
    member_keys,
    members_for_next_round,
    members_of,
    members_of_rows,
    repeat_imp_for_twins,
    take_members,
    where_members,
    with_twins,
    without_twins,
)


def config_of(**overrides):
    config = configs.default()
    config.update_from_flattened_dict({"replicates": 2, "instability.rounds": (3,), **overrides})
    return config


def test_members_come_arm_by_arm_and_twins_last():
    every = tuple(Member(arm, replicate) for arm in ("imp", "reinit") for replicate in (0, 1))
    assert members_of(config_of()) == with_twins(every, config_of(), 2) == every
    assert with_twins(every, config_of(), 3) == (*every, ("twin", 0), ("twin", 1))
    assert with_twins([Member("imp", 1)], config_of(), 3) == (("imp", 1), ("twin", 1))


def test_members_without_an_imp_do_not_go_on():
    rows = [{"arm": arm, "replicate": r, "round": 4} for arm, r in (("imp", 1), ("reinit", 0), ("reinit", 1))]
    members = members_of_rows([*rows, {"arm": "imp", "replicate": 0, "round": 3}], 4)
    assert members == (("imp", 1), ("reinit", 0), ("reinit", 1))
    assert members_for_next_round((*members, Member("twin", 1))) == (("imp", 1), ("reinit", 1))


def test_select_takes_the_leaves_of_members():
    members = members_of(config_of())
    tree = {"a": np.array([10, 11, 20, 21])}
    np.testing.assert_array_equal(take_members(tree, members, [members[3], members[0]])["a"], [21, 10])
    assert take_members(tree, members, list(members)) is tree


def test_a_key_is_folded_from_seed_replicate_draw_and_numbers():
    members = with_twins(members_of(config_of()), config_of(), 3)
    keys = member_keys(members, 7, lambda member: ["data", ARMS[member.arm], 3])
    expected = jax.random.key(7)
    for number in (1, 2, ARMS["reinit"], 3):  # replicate, the draw called data, arm, round
        expected = jax.random.fold_in(expected, number)
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys[3], expected)))
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == len(members)
    alone = member_keys([Member("reinit", 1)], 7, lambda member: ["data", ARMS[member.arm], 3])
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys[3], alone[0])))


def test_twins_take_the_leaves_of_imp_and_leave_none():
    members = with_twins(members_of(config_of()), config_of(), 3)
    tree = {"a": jnp.array([10, 11, 20, 21])}
    of_all = repeat_imp_for_twins(members, tree)
    np.testing.assert_array_equal(of_all["a"], [10, 11, 20, 21, 10, 11])
    np.testing.assert_array_equal(without_twins(members, of_all)["a"], tree["a"])
    trained = {"a": np.arange(6)}  # of all members: the twins' own give way
    np.testing.assert_array_equal(repeat_imp_for_twins(members, trained)["a"], [0, 1, 2, 3, 0, 1])
    others = members_of(config_of())
    assert repeat_imp_for_twins(others, tree) is tree
    assert without_twins(others, tree) is tree


def test_where_member_chooses_whole_members():
    one, other = {"a": jnp.ones((3, 2, 2)), "b": jnp.ones(3)}, {"a": jnp.zeros((3, 2, 2)), "b": jnp.zeros(3)}
    chosen = where_members(jnp.array([True, False, True]), one, other)
    np.testing.assert_array_equal(chosen["b"], [1, 0, 1])
    np.testing.assert_array_equal(chosen["a"], np.array([1, 0, 1])[:, None, None] * np.ones((3, 2, 2)))
