"""Arms of users."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import arms, masking, runs
from imp_jax.arms import ARMS, Arm
from imp_jax.errors import UserError
from imp_jax.runtime.signals import Stopped
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.stops import StopsAtFirstCheck


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
