"""Permutations of units keep the function of a network; matching recovers them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import masking, models
from imp_jax.models.lenet import LeNet
from imp_jax.permutations import align, from_orders, identity, match_weights, permute

MODELS = {
    "lenet": (8, {}),
    "conv4": (8, {"width": 0.1}),
    "resnet20": (8, {"width": 0.5, "norm_affine": True}),
    "resnet32": (8, {"width": 0.3}),
    "mlp_9_7_5": (4, {}),
    "vgg11": (16, {"width": 0.12, "norm_affine": True}),
    "resnet18": (8, {"width": 0.1, "norm_affine": True}),
    "wide_resnet16_2": (8, {"width": 0.5, "norm_affine": True}),
    "resnet50": (32, {"width": 0.12, "norm_affine": True}),
}


def random_variables(name):
    """Return a model and variables in which no leaf is constant, statistics and biases included."""
    side, options = MODELS[name]
    model = models.create(name, 10, (side, side, 3), **options)
    shapes = models.shapes(model, (side, side, 3))
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        values = (
            generator.uniform(0.5, 1.5, leaf.shape)
            if "var" in str(path)
            else generator.normal(0, 1, leaf.shape)
        )
        return (values / np.sqrt(max(1, np.prod(leaf.shape[:-1])))).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes), (side, side, 3)


def random_orders(spec, seed=1):
    generator = np.random.default_rng(seed)
    return {group: generator.permutation(size) for group, size in spec.sizes.items()}


@pytest.mark.parametrize("name", MODELS)
def test_permuted_network_computes_the_same_function(name):
    model, variables, image_shape = random_variables(name)
    spec = model.permutation_spec()
    permutations = from_orders(spec, random_orders(spec), *variables.values())
    permuted = {collection: permute(tree, permutations) for collection, tree in variables.items()}
    images = jax.random.normal(jax.random.key(0), (4, *image_shape))
    for train in (False, True):
        logits, other = (
            model.apply(v, images, train=train, mutable=["batch_stats"])[0] for v in (variables, permuted)
        )
        np.testing.assert_allclose(logits, other, rtol=2e-4, atol=2e-4 * float(jnp.abs(logits).max()))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), variables["params"], permuted["params"])
    for path, kernel_changed in masking.prunable_by_name(changed).items():
        assert kernel_changed, f"{path} is not permuted"


def test_permuted_mask_belongs_to_the_permuted_weights():
    model, variables, _ = random_variables("resnet20")
    spec, params = model.permutation_spec(), variables["params"]
    permutations = from_orders(spec, random_orders(spec), *variables.values())
    mask = jax.tree.map(lambda leaf: leaf > 0, params)
    masked_then_permuted = permute(masking.apply(params, mask), permutations)
    permuted_then_masked = masking.apply(permute(params, permutations), permute(mask, permutations))
    jax.tree.map(np.testing.assert_array_equal, masked_then_permuted, permuted_then_masked)


@pytest.mark.parametrize("name", MODELS)
def test_matching_recovers_a_planted_permutation(name):
    model, variables, _ = random_variables(name)
    spec, params = model.permutation_spec(), variables["params"]
    planted = from_orders(spec, random_orders(spec), params)
    target = permute(params, planted)
    noise = jax.tree.map(lambda p: 0.01 * np.std(p) * np.random.default_rng(2).normal(size=p.shape), target)
    found = match_weights(spec, jax.tree.map(np.add, target, noise), params)
    jax.tree.map(np.testing.assert_array_equal, permute(params, found), target)


@pytest.mark.parametrize("name", ["lenet", "resnet20", "vgg11"])
def test_aligning_a_permuted_copy_restores_all_variables(name):
    """Statistics too, on which the matching does not depend."""
    model, variables, _ = random_variables(name)
    spec = model.permutation_spec()
    planted = from_orders(spec, random_orders(spec), *variables.values())
    copy = {collection: permute(tree, planted) for collection, tree in variables.items()}
    other_statistics = {name: jax.tree.map(lambda leaf: -leaf, tree) for name, tree in variables.items()}
    target = {**other_statistics, "params": variables["params"]}
    jax.tree.map(np.testing.assert_array_equal, align(spec, target, copy), variables)


def test_matching_increases_the_inner_product_of_independent_networks():
    model = LeNet(widths=(30, 20))
    target, source = (model.init(jax.random.key(i), jnp.ones((1, 4, 4, 1)))["params"] for i in range(2))
    spec = model.permutation_spec()
    matched = permute(source, match_weights(spec, target, source))
    before, after = (
        sum(np.vdot(target[name]["kernel"], tree[name]["kernel"]) for name in target)
        for tree in (source, matched)
    )
    assert after > before + 1
    # no exchange of two units increases it further
    for name, size in spec.sizes.items():
        for a in range(size):
            orders = {group: np.arange(n) for group, n in spec.sizes.items()}
            orders[name][[a, (a + 1) % size]] = orders[name][[(a + 1) % size, a]]
            exchanged = permute(matched, from_orders(spec, orders, matched))
            assert sum(np.vdot(target[n]["kernel"], exchanged[n]["kernel"]) for n in target) <= after + 1e-4


def test_identity_changes_nothing():
    model, variables, _ = random_variables("resnet20")
    permutations = identity(model.permutation_spec(), variables["params"])
    jax.tree.map(np.testing.assert_array_equal, permute(variables["params"], permutations), variables["params"])
