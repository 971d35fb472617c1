import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax.repulsion import repulsion_loss


def random_trees(count):
    draw = np.random.default_rng(0)
    return [
        {
            "a": {
                "kernel": jnp.asarray(draw.normal(size=(5, 4)), jnp.float32),
                "bias": jnp.asarray(draw.normal(size=4), jnp.float32),
            }
        }
        for _ in range(count)
    ]


MASK = {"a": {"kernel": jnp.asarray(np.random.default_rng(1).random((5, 4)) < 0.5), "bias": jnp.ones(4, bool)}}


def flat(tree):
    return np.concatenate(
        [np.ravel(np.where(m, p, 0)) for p, m in zip(jax.tree.leaves(tree), jax.tree.leaves(MASK), strict=True)]
    )


def test_value_and_gradient_against_numpy():
    params, *earlier = random_trees(4)
    u = flat(params).astype(float)
    expected, gradient = 0.0, np.zeros_like(u)
    for tree in earlier:
        v = flat(tree).astype(float)
        cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        expected += cosine**2
        # d cos²/du = 2 cos · (v/|u||v| − cos · u/|u|²)
        gradient += 2 * cosine * (v / np.linalg.norm(u) / np.linalg.norm(v) - cosine * u / (u @ u))
    value, got = jax.value_and_grad(repulsion_loss)(params, MASK, earlier, strength=-1.0)
    assert value == pytest.approx(-expected / 3, rel=1e-5)
    np.testing.assert_allclose(flat(got), -gradient / 3, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got["a"]["kernel"][~MASK["a"]["kernel"]], 0)


def test_scale_does_not_matter():
    params, *earlier = random_trees(3)
    scaled = jax.tree.map(lambda p: 7.5 * p, params)
    assert repulsion_loss(scaled, MASK, earlier) == pytest.approx(
        float(repulsion_loss(params, MASK, earlier)), rel=1e-5
    )


def test_orthogonal_is_free_equal_costs_the_strength():
    mask = {"kernel": jnp.ones(2, bool)}
    along, across = {"kernel": jnp.array([3.0, 0.0])}, {"kernel": jnp.array([0.0, 2.0])}
    assert repulsion_loss(along, mask, [across]) == 0
    assert repulsion_loss(along, mask, [along], strength=2.0) == pytest.approx(2)
    assert repulsion_loss(along, mask, [along, across], strength=2.0) == pytest.approx(1)


def test_no_earlier_optima_no_term():
    params = random_trees(1)[0]
    assert repulsion_loss(params, MASK, []) == 0


def test_no_nan_at_zero_norm():
    params = random_trees(1)[0]
    zero = jax.tree.map(jnp.zeros_like, params)
    for theta, earlier in ((zero, params), (params, zero)):
        value, gradient = jax.value_and_grad(repulsion_loss)(theta, MASK, [earlier])
        assert value == 0
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
