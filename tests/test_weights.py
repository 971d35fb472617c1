"""Distributions of surviving weights against NumPy, and dead units against a search over paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import masking, weights
from imp_jax.models.conv import Conv4
from imp_jax.models.lenet import LeNet
from imp_jax.models.resnet import CifarResNet

jitted_dead_units = jax.jit(weights.dead_units, static_argnums=(0, 3))


def layer(kernel, mask=None):
    kernel = jnp.asarray(kernel, jnp.float32)
    mask = jnp.ones(kernel.shape, bool) if mask is None else jnp.asarray(mask)
    bias = jnp.full(2, 100.0)
    return {"kernel": kernel, "bias": bias}, {"kernel": mask, "bias": jnp.ones(2, bool)}


def test_histogram_is_numpys_of_the_survivors():
    draw = np.random.default_rng(0)
    kernels, masks = draw.normal(size=(2, 40, 30)), draw.random((2, 40, 30)) < 0.3
    params, mask = (
        {name: tree for name, tree in zip("ab", trees, strict=True)}
        for trees in zip(
            *(layer(kernel, keep) for kernel, keep in zip(kernels, masks, strict=True)), strict=True
        )
    )
    counts = jax.jit(weights.histogram, static_argnums=3)(params, mask, 5.0, 21)
    expected, _ = np.histogram(kernels.astype(np.float32)[masks], bins=21, range=(-5, 5))
    np.testing.assert_array_equal(counts, expected)
    only_a, _ = np.histogram(kernels[0].astype(np.float32)[masks[0]], bins=21, range=(-5, 5))
    np.testing.assert_array_equal(weights.histogram(params, mask, 5.0, 21, exclude=("b",)), only_a)


def test_the_ends_of_a_histogram_hold_what_lies_on_or_beyond_them():
    counts = weights.histogram(*layer([[-9.0, -1.0, 0.0, 1.0, 9.0]]), limit=1.0, bins=3)
    np.testing.assert_array_equal(counts, [2, 1, 2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.random.default_rng(0).normal(3, 2, 200_000), 1 / 3),
        (np.random.default_rng(0).uniform(-1, 5, 200_000), 5 / 9),
        (np.tile([-0.1, 0.1], 500), 1),
        (np.array([0.0, 0, 0, 1]), 1),  # two points at any odds: skewness² + 1 = kurtosis
    ],
)
def test_bimodality_in_closed_form(values, expected):
    assert weights.bimodality(*layer(values[None])) == pytest.approx(expected, rel=0.02)


def test_bimodality_and_share_near_zero_are_of_the_survivors():
    values = np.array([[-3.0, 0.1, 3.0, -0.2, 3.0, 0.9]])
    keep = np.array([[True, False, True, True, True, True]])
    left = values[keep]
    z = (left - left.mean()) / left.std()
    expected = (np.mean(z**3) ** 2 + 1) / np.mean(z**4)
    assert weights.bimodality(*layer(values, keep)) == pytest.approx(expected, rel=1e-5)
    assert weights.share_near_zero(*layer(values, keep), threshold=2.0) == pytest.approx(2 / 5)


def test_survivors_by_layer():
    mask = {"a": layer(np.ones((2, 3)), np.eye(2, 3) > 0)[1], "block": {"b": layer(np.ones((2, 2)))[1]}}
    assert weights.survivors_by_layer(mask) == {"a": 2, "block/b": 4}


def dead_units_of_a_chain(masks):
    """By following paths: units that the input reaches, and that reach the output, layer by layer."""
    reached = [np.ones(masks[0].shape[0], bool)]
    for mask in masks:
        reached.append((mask & reached[-1][:, None]).any(0))
    reaching = [np.ones(masks[-1].shape[1], bool)]
    for mask in masks[:0:-1]:
        reaching.insert(0, (mask & reaching[0]).any(1))
    return [int((~(a & b)).sum()) for a, b in zip(reached[1:], reaching, strict=True)]


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 1.0])
def test_dead_units_of_lenet_are_those_no_path_leads_through(density):
    model = LeNet(widths=(30, 20))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)))
    draw = np.random.default_rng(1)
    mask = jax.tree.map(
        lambda leaf: draw.random(leaf.shape) < (density if leaf.ndim > 1 else 1), variables["params"]
    )
    dead = jitted_dead_units(model, variables, mask, (6, 6, 1))
    expected = dead_units_of_a_chain([mask[f"Dense_{i}"]["kernel"] for i in range(3)])
    assert [int(dead[f"Dense_{i}"]) for i in range(3)] == expected
    assert (sum(expected) > 0) == (density < 1)


def test_dead_channels_of_conv4():
    model = Conv4(width=0.1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    mask = masking.ones_like(variables["params"])
    mask["Conv_1"]["kernel"] = mask["Conv_1"]["kernel"].at[..., 2].set(False)  # no way in
    mask["Conv_3"]["kernel"] = (
        mask["Conv_3"]["kernel"].at[:, :, 4].set(False)
    )  # no way out for Conv_2's channel 4
    dead = jitted_dead_units(model, variables, mask, (8, 8, 3))
    assert {name: int(count) for name, count in dead.items() if count} == {"Conv_1": 1, "Conv_2": 1}


@pytest.mark.parametrize("affine", [False, True])
def test_dead_channels_of_residual_networks(affine):
    model = CifarResNet(depth=8, width=0.25, norm_affine=affine)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    mask = masking.ones_like(variables["params"])
    assert not any(jitted_dead_units(model, variables, mask, (8, 8, 3)).values())
    # Conv_1 opens a block: what it loses is dead. Conv_4 ends one: its shortcut lives on, the block is dead
    mask["Conv_1"]["kernel"] = mask["Conv_1"]["kernel"].at[..., :3].set(False)
    mask["Conv_4"]["kernel"] = jnp.zeros_like(mask["Conv_4"]["kernel"])
    dead = {name: int(n) for name, n in jitted_dead_units(model, variables, mask, (8, 8, 3)).items() if n}
    assert dead == {"Conv_1": 3, "Conv_3": 8, "Conv_4": 8}


def test_a_deep_dense_network_has_no_dead_units():
    """Products of many fan-ins would leave float32."""
    model = CifarResNet(depth=56, width=0.5)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    mask = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), variables["params"])
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
    assert not any(jitted_dead_units(model, variables, mask, (8, 8, 3)).values())
