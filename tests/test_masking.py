import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import imp_jax
from imp_jax import connectivity, masking, pruning, repulsion, similarity, weights
from imp_jax.models.lenet import LeNet


def small_params():
    """Return parameters with 20 prunable weights."""
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


def test_size_accepts_flax_variables_lists_and_tuples():
    variables = LeNet().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert masking.size(variables) == 784 * 300 + 300 * 100 + 100 * 10
    assert masking.size([{"kernel": jnp.ones(3)}, ({"kernel": jnp.ones((2, 2))}, jnp.ones(9))]) == 7


def test_package_imports_its_modules_on_access():
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
    mask["norm"]["scale"] = jnp.zeros(4, bool)  # not prunable, so not counted
    assert masking.density(mask) == pytest.approx(16 / 20)


def test_density_is_vmappable_and_jittable():
    masks = {"kernel": jnp.array([[True, True, False, False], [True, False, False, False]])}
    np.testing.assert_allclose(jax.jit(jax.vmap(masking.density))(masks), [0.5, 0.25])


def test_excluded_layers_are_not_prunable():
    params = small_params()
    assert not any(jax.tree.leaves(masking.prunable(params, ["*"])))
    assert masking.prunable(params, ["co*"])["conv"] == {"kernel": False, "bias": False}
    assert masking.prunable(params, ["kernel"]) == masking.prunable(params)  # patterns match layers, not leaves
    mask = masking.ones_like(params)
    mask["head"]["kernel"] = jnp.zeros((4, 2), bool)
    assert masking.size(mask, ["conv"]) == 8
    assert masking.survivors(mask, ["conv"]) == 0
    assert masking.density(mask, ["he?d"]) == 1
    with pytest.raises(ValueError, match=r"no leaf called 'kernel' outside of conv, head"):
        masking.density(mask, ["conv", "head"])


def test_density_rejects_trees_without_kernels():
    with pytest.raises(ValueError, match="no leaf called 'kernel'"):
        masking.density({"bias": jnp.ones(3, bool)})


def test_apply_gives_exact_zeros_for_nan_and_inf():
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
def test_masked_equals_the_inner_transform_on_survivors_only(inner):
    """Masked weights and a tree without the pruned weights are trained to the same values."""
    rng = np.random.default_rng(1)
    keep = rng.random(40) < 0.4
    start = np.where(keep, rng.normal(size=40), 0).astype(np.float32)
    full, mask = {"kernel": jnp.asarray(start)}, {"kernel": jnp.asarray(keep)}
    dense = {"kernel": jnp.asarray(start[keep])}
    tx = masking.masked(inner)
    full_state, dense_state = tx.init(full), inner.init(dense)
    for _ in range(6):
        gradient = rng.normal(size=40).astype(np.float32)
        updates, full_state = tx.update({"kernel": jnp.asarray(gradient)}, full_state, full, mask=mask)
        full = optax.apply_updates(full, updates)
        updates, dense_state = inner.update({"kernel": jnp.asarray(gradient[keep])}, dense_state, dense)
        dense = optax.apply_updates(dense, updates)
        np.testing.assert_array_equal(full["kernel"][~keep], 0)
        np.testing.assert_allclose(full["kernel"][keep], dense["kernel"], rtol=1e-5)


def test_masked_keeps_pruned_weights_zero_despite_momentum():
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


def test_masked_requires_a_mask():
    tx = masking.masked(optax.sgd(0.1))
    params = {"kernel": jnp.ones(2)}
    with pytest.raises(TypeError, match="mask"):
        tx.update(params, tx.init(params), params)


# --- all functions of trees, on parameters of other containers and shapes ---


def box_one_kernel(params):
    """Return the parameters with the kernel of `conv` in a `nn.Partitioned` box."""
    kernel = nn.Partitioned(params["conv"]["kernel"], names=(None, "model"))
    return {**params, "conv": {**params["conv"], "kernel": kernel}}


def make_nnx_state(params):
    return nnx.State(jax.tree.map(nnx.Param, params))


@pytest.mark.parametrize("convert", [flax.core.freeze, box_one_kernel, make_nnx_state])
def test_functions_of_trees_accept_flax_containers(convert):
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.tree.map(lambda p, k=k: p + jax.random.normal(k, p.shape), small_params()) for k in keys)

    def compute_all(a, b):
        dense = masking.ones_like(a)
        mask, threshold = pruning.prune_by_magnitude(a, dense, 0.5, exclude="no such layer")
        a = masking.apply(a, mask)
        stacked = [jax.tree.map(lambda leaf: leaf[None], tree) for tree in (b, mask)]
        optima = repulsion.add_optimum(None, *stacked, max_optima=1)
        member_optima = jax.tree.map(lambda leaf: leaf[0], optima)
        gradient = repulsion.add_gradient(jax.tree.map(jnp.zeros_like, a), a, member_optima, 2.0)
        reference_gradient = jax.grad(repulsion.repulsion_loss)(a, mask, [b])
        updates, _ = masking.masked(optax.sgd(1.0)).update(b, optax.sgd(1.0).init(b), b, mask=mask)
        trees = [mask, gradient, reference_gradient, updates, connectivity.linear_path(a, b, 3)]
        scalars = [
            threshold,
            masking.density(mask),
            masking.survivors(mask),
            masking.size(mask, "head"),
            similarity.angular_distance(a, mask, b, dense),
            similarity.distance_matrix([a, b], [mask, dense], similarity.cosine_distance)[0, 1],
            repulsion.repulsion_loss(a, mask, [b]),
            repulsion.summary(jax.tree.map(lambda leaf: leaf[None], a), optima, 2.0)[1][0],
            weights.bimodality(a, mask),
        ]
        return [*scalars, *(np.asarray(leaf) for tree in trees for leaf in jax.tree.leaves(tree))]

    got, expected = compute_all(convert(a), convert(b)), compute_all(a, b)
    assert len(got) == len(expected) == 9 + 5 * 6
    assert masking.prunable_by_name(convert(a)).keys() == {"conv/kernel", "head/kernel"}
    for value, expected_value in zip(got, expected, strict=True):
        np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-7)


def test_unknown_container_of_a_kernel_is_rejected_by_name():
    quantised = {"Dense_0": {"kernel": [jnp.ones((2, 2)), jnp.ones(2)]}}
    with pytest.raises(ValueError, match="Dense_0/kernel is a container of an unknown kind"):
        masking.size(quantised)


def test_functions_of_trees_reject_different_shapes():
    """JAX would broadcast: the distance between ones of shape (4, 1) and of shape (4, 3) would be 0."""
    a, b = ({"d": {"kernel": jnp.ones((4, width)), "bias": jnp.ones(2)}} for width in (1, 3))
    mask_a, mask_b = masking.ones_like(a), masking.ones_like(b)
    stacked = [jax.tree.map(lambda leaf: leaf[None], tree) for tree in (a, mask_b)]
    tx = masking.masked(optax.sgd(1.0))
    for function in (
        lambda: masking.apply(a, mask_b),
        lambda: tx.update(a, tx.init(a), a, mask=mask_b),
        lambda: pruning.prune_by_magnitude(a, mask_b),
        lambda: pruning.prune_by_score(b, a, mask_a, 0.2),
        lambda: similarity.angular_distance(a, mask_a, b, mask_b),
        lambda: similarity.cosine_distance(a, mask_b, a, mask_a),
        lambda: similarity.euclidean_distance(a, mask_a, a, mask_b),
        lambda: similarity.inner_product(a, b),
        lambda: similarity.distance_matrix([a, b], [mask_a, mask_b]),
        lambda: similarity.distance_matrices(*stacked),
        lambda: similarity.gram_products(*stacked),
        lambda: repulsion.repulsion_loss(a, mask_b, [a]),
        lambda: repulsion.repulsion_loss(a, mask_a, [a, b]),
        lambda: repulsion.add_optimum(None, *stacked, max_optima=1),
        lambda: connectivity.linear_path(a, b),
        lambda: weights.histogram(a, mask_b, 1.0),
        lambda: weights.bimodality(a, mask_b),
        lambda: weights.share_near_zero(a, mask_b, 1.0),
    ):
        with pytest.raises(ValueError, match=r"\['kernel'\] has shape") as error:
            function()
        assert "4, 1) in" in str(error.value)
        assert "4, 3) in" in str(error.value)
    with pytest.raises(ValueError, match="bias"):
        similarity.angular_distance(a, mask_a, {"d": {"kernel": a["d"]["kernel"]}}, mask_a)
