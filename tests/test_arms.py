import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import arms, masking, runs
from imp_jax.arms import (
    ARMS,
    Arm,
    Member,
    add_scheduled_members,
    member_keys,
    members_for_next_round,
    members_of_rows,
    take_members,
    where_members,
)
from imp_jax.errors import UserError
from imp_jax.runtime.signals import GracefulStop, Stopped
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset

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


# --- arms of users ---


def permute_mask(inputs):
    """Permute every leaf of imp's mask, by the key of this arm, replicate and round."""
    leaves, treedef = jax.tree.flatten(inputs.mask)
    keys = jax.random.split(inputs.key, len(leaves))
    return treedef.unflatten(
        [
            jax.random.permutation(k, leaf.ravel()).reshape(leaf.shape)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
    )


@pytest.fixture
def negated_arm(monkeypatch):
    """Register a user's arm `negated`: the negated ticket under a permuted mask."""
    monkeypatch.setattr(arms, "ARMS", dict(ARMS))
    monkeypatch.setattr("tests.test_arms.ARMS", arms.ARMS)
    arms.register("negated", Arm(100, lambda inputs: jax.tree.map(jnp.negative, inputs.ticket), permute_mask))


class StopsAtFirstCheck(GracefulStop):
    """Simulates a signal that arrives before the first check for signals."""

    def signal_on_any_process(self, _):
        self.requested = 15
        return super().signal_on_any_process(lambda value: value)


@pytest.mark.parametrize("rewind_step", [0, 3, None])
def test_user_arm_trains_and_resumes_and_does_not_change_imp(negated_arm, tmp_path, rewind_step):
    plain_config, config = (
        make_tiny_config(arms=names, rewind_step=rewind_step)
        for names in (("imp", "reinit"), ("imp", "reinit", "negated"))
    )
    dataset = make_tiny_dataset()
    whole, resumed, plain = (tmp_path / name for name in ("whole", "resumed", "plain"))
    runs.run(plain_config, plain, dataset=dataset)
    runs.run(config, whole, dataset=dataset)
    stops = 0
    while True:
        try:
            runs.run(config, resumed, StopsAtFirstCheck(), dataset=dataset)
            break
        except Stopped:
            stops += 1
    assert stops >= 6
    with (
        contextlib.closing(Checkpoints(whole)) as a,
        contextlib.closing(Checkpoints(resumed)) as b,
        contextlib.closing(Checkpoints(plain)) as c,
    ):
        assert a.rounds() == b.rounds() == c.rounds() == [0, 1, 2]
        for number in a.rounds():
            networks, plain_networks = a.restore(number), c.restore(number)
            jax.tree.map(np.testing.assert_array_equal, networks, b.restore(number))
            imp_networks, negated_networks = (
                jax.tree.map(lambda leaf, s=s: np.asarray(leaf[s]), networks) for s in (slice(2), slice(4, 6))
            )
            jax.tree.map(
                lambda x, y: np.testing.assert_array_equal(x, y[:2]), imp_networks.mask, plain_networks.mask
            )
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y[:2], rtol=1e-3, atol=1e-6),
                (imp_networks.initial, imp_networks.trained),
                (plain_networks.initial, plain_networks.trained),
            )
            counts = [
                np.array([np.sum(layer["kernel"], (1, 2)) for layer in tree.mask.values()])
                for tree in (imp_networks, negated_networks)
            ]
            np.testing.assert_array_equal(*counts)
            kernels = [tree.mask["Dense_0"]["kernel"] for tree in (imp_networks, negated_networks)]
            assert np.array_equal(*kernels) == (number == 0)
            trained = negated_networks.trained["params"]["Dense_0"]["kernel"]
            assert not np.any(trained[~kernels[1]])
            if rewind_step is not None:
                dense = a.restore(0).initial["params"]
                jax.tree.map(
                    lambda leaf, ticket, mask: np.testing.assert_array_equal(
                        leaf, np.where(mask, -np.asarray(ticket)[:2], 0)
                    ),
                    negated_networks.initial["params"],
                    dense,
                    negated_networks.mask,
                )


@pytest.mark.parametrize(
    ("name", "arm", "sentence"),
    [
        ("negated", lambda inputs: inputs.ticket, "'negated' is a function; it should be an imp_jax.arms.Arm"),
        ("imp", Arm(100, lambda inputs: inputs.ticket), "'imp' is one of imp_jax; it should have another name"),
        ("a b", Arm(100, lambda inputs: inputs.ticket), "a name of letters, digits and underscores"),
        (
            "own",
            Arm(99, lambda inputs: inputs.ticket),
            "has the number 99; it should be an integer from 100",
        ),
        ("own", Arm(1e2, lambda inputs: inputs.ticket), "has the number 100.0; it should be an integer"),
        ("own", Arm(100, lambda inputs: inputs.ticket), "has the number 100, which is that of 'negated'"),
    ],
)
def test_register_rejects_a_bad_arm_in_one_sentence(negated_arm, name, arm, sentence):
    arms_before = dict(arms.ARMS)
    with pytest.raises(UserError, match=sentence) as error:
        arms.register(name, arm)
    assert len(str(error.value).splitlines()) == 1
    assert arms_before == arms.ARMS


@pytest.mark.parametrize(
    "arm",
    [
        Arm(101, lambda inputs: inputs.ticket["params"]),
        Arm(101, lambda inputs: jax.tree.map(lambda leaf: leaf[None], inputs.ticket)),
        Arm(101, lambda inputs: None),
        Arm(101, lambda inputs: inputs.ticket, lambda inputs: {"Dense_0": inputs.mask["Dense_0"]}),
        Arm(101, lambda inputs: inputs.ticket, lambda inputs: masking.survivors(inputs.mask)),
    ],
)
def test_arm_that_returns_other_shapes_is_rejected_before_training(negated_arm, tiny_experiment, arm):
    arms.register("odd", arm)
    with pytest.raises(
        UserError, match="arms has 'odd', which should return trees like the ticket and"
    ) as error:
        tiny_experiment(arms=("imp", "odd"))
    assert len(str(error.value).splitlines()) == 1
