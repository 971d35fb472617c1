import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import imp_jax
from imp_jax import masking
from imp_jax.models.lenet import LeNet


def small_params():
    return {
        "conv": {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4), "bias": jnp.ones(4)},
        "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "head": {"kernel": -jnp.ones((4, 2)), "bias": jnp.ones(2)},
    }


def test_only_kernels_are_prunable():
    assert masking.prunable(small_params()) == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "head": {"kernel": True, "bias": False},
    }


def test_works_on_whole_flax_variables_and_on_lists():
    variables = LeNet().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert masking.size(variables) == 784 * 300 + 300 * 100 + 100 * 10
    assert masking.size([{"kernel": jnp.ones(3)}, ({"kernel": jnp.ones((2, 2))}, jnp.ones(9))]) == 7


def test_notebook_surface_is_reached_from_the_package():
    assert imp_jax.masking is masking
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = imp_jax.nothing


def test_density_counts_prunable_weights_only():
    params = small_params()
    mask = masking.ones_like(params)
    assert masking.density(mask) == 1
    mask["conv"]["kernel"] = mask["conv"]["kernel"].at[0].set(False)
    assert masking.survivors(mask) == 16
    assert masking.density(mask) == pytest.approx(16 / 20)
    mask["norm"]["scale"] = jnp.zeros(4, bool)  # not a weight: no influence
    assert masking.density(mask) == pytest.approx(16 / 20)


def test_density_is_vmappable_and_jittable():
    masks = {"kernel": jnp.array([[True, True, False, False], [True, False, False, False]])}
    np.testing.assert_allclose(jax.jit(jax.vmap(masking.density))(masks), [0.5, 0.25])


def test_excluded_layers_are_not_prunable():
    params = small_params()
    assert not any(jax.tree.leaves(masking.prunable(params, ["*"])))
    assert masking.prunable(params, ["co*"])["conv"] == {"kernel": False, "bias": False}
    assert masking.prunable(params, ["kernel"]) == masking.prunable(params)  # patterns are of layers
    mask = masking.ones_like(params)
    mask["head"]["kernel"] = jnp.zeros((4, 2), bool)
    assert masking.size(mask, ["conv"]) == 8
    assert masking.survivors(mask, ["conv"]) == 0
    assert masking.density(mask, ["he?d"]) == 1
    with pytest.raises(ValueError, match=r"no leaf called 'kernel' outside of conv, head"):
        masking.density(mask, ["conv", "head"])


def test_nothing_to_prune_is_an_error():
    with pytest.raises(ValueError, match="no leaf called 'kernel'"):
        masking.density({"bias": jnp.ones(3, bool)})


def test_apply_gives_exact_zeros_also_for_nan():
    params = {"kernel": jnp.array([jnp.nan, -2.0, jnp.inf, 3.0])}
    out = masking.apply(params, {"kernel": jnp.array([False, True, False, True])})
    np.testing.assert_array_equal(out["kernel"], [0, -2, 0, 3])


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(1e-2),
        optax.sgd(1e-1, momentum=0.9),
        optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9), optax.scale(-0.1)),
        optax.chain(optax.clip_by_global_norm(1e-2), optax.sgd(1.0)),
    ],
    ids=["adam", "momentum", "decay", "clip"],
)
def test_masked_is_the_inner_transform_on_the_survivors_alone(inner):
    """The algebra: masking commutes with leaving the pruned weights out of the tree altogether."""
    draw = np.random.default_rng(1)
    keep = draw.random(40) < 0.4
    start = np.where(keep, draw.normal(size=40), 0).astype(np.float32)
    full, mask = {"kernel": jnp.asarray(start)}, {"kernel": jnp.asarray(keep)}
    dense = {"kernel": jnp.asarray(start[keep])}
    tx = masking.masked(inner)
    full_state, dense_state = tx.init(full), inner.init(dense)
    for _ in range(6):
        gradient = draw.normal(size=40).astype(np.float32)
        updates, full_state = tx.update({"kernel": jnp.asarray(gradient)}, full_state, full, mask=mask)
        full = optax.apply_updates(full, updates)
        updates, dense_state = inner.update({"kernel": jnp.asarray(gradient[keep])}, dense_state, dense)
        dense = optax.apply_updates(dense, updates)
        np.testing.assert_array_equal(full["kernel"][~keep], 0)
        np.testing.assert_allclose(full["kernel"][keep], dense["kernel"], rtol=1e-5)


def test_masked_holds_weights_at_zero_when_old_moments_would_move_them():
    params = {"kernel": jnp.array([1.0, 2.0])}
    tx = masking.masked(optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)
    dense = masking.ones_like(params)
    _, state = tx.update({"kernel": jnp.array([5.0, 5.0])}, state, params, mask=dense)
    mask = {"kernel": jnp.array([True, False])}
    params = masking.apply(params, mask)
    for _ in range(3):
        updates, state = tx.update({"kernel": jnp.array([1.0, 1.0])}, state, params, mask=mask)
        params = optax.apply_updates(params, updates)
        assert params["kernel"][1] == 0


def test_masked_demands_a_mask():
    tx = masking.masked(optax.sgd(0.1))
    params = {"kernel": jnp.ones(2)}
    with pytest.raises(TypeError, match="mask"):
        tx.update(params, tx.init(params), params)
