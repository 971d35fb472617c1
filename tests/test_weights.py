"""Distributions of surviving weights compared with NumPy, and dead units compared with a search over paths."""

from collections.abc import Callable
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import masking, weights
from imp_jax.analysis.weights import compute_layers
from imp_jax.models.conv4 import Conv4
from imp_jax.models.lenet import LeNet
from imp_jax.models.resnet import CifarResNet

jitted_dead_units = jax.jit(weights.dead_units, static_argnums=(0, 3))


def make_layer(kernel, mask=None):
    """Return the parameters of a layer and their mask."""
    kernel = jnp.asarray(kernel, jnp.float32)
    mask = jnp.ones(kernel.shape, bool) if mask is None else jnp.asarray(mask)
    bias = jnp.full(2, 100.0)
    return {"kernel": kernel, "bias": bias}, {"kernel": mask, "bias": jnp.ones(2, bool)}


def test_histogram_of_survivors_equals_numpy():
    draw = np.random.default_rng(0)
    kernels, masks = draw.normal(size=(2, 40, 30)), draw.random((2, 40, 30)) < 0.3
    params, mask = (
        {name: tree for name, tree in zip("ab", trees, strict=True)}
        for trees in zip(
            *(make_layer(kernel, keep) for kernel, keep in zip(kernels, masks, strict=True)), strict=True
        )
    )
    counts = jax.jit(weights.histogram, static_argnums=3)(params, mask, 5.0, 21)
    expected, _ = np.histogram(kernels.astype(np.float32)[masks], bins=21, range=(-5, 5))
    np.testing.assert_array_equal(counts, expected)
    only_a, _ = np.histogram(kernels[0].astype(np.float32)[masks[0]], bins=21, range=(-5, 5))
    np.testing.assert_array_equal(weights.histogram(params, mask, 5.0, 21, exclude=("b",)), only_a)


def test_outer_bins_of_a_histogram_count_values_beyond_the_limit():
    counts = weights.histogram(*make_layer([[-9.0, -1.0, 0.0, 1.0, 9.0]]), limit=1.0, bins=3)
    np.testing.assert_array_equal(counts, [2, 1, 2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.random.default_rng(0).normal(3, 2, 200_000), 1 / 3),
        (np.random.default_rng(0).uniform(-1, 5, 200_000), 5 / 9),
        (np.tile([-0.1, 0.1], 500), 1),
        (np.array([0.0, 0, 0, 1]), 1),  # for two points with any weights, skewness² + 1 = kurtosis
    ],
)
def test_bimodality_equals_closed_forms(values, expected):
    assert weights.bimodality(*make_layer(values[None])) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bimodality_does_not_depend_on_scale_and_is_nan_for_equal_weights(dtype):
    """Fourth powers of small or large weights overflow or underflow float32; bfloat16 sums lose most digits."""
    values = np.asarray(jnp.asarray(np.random.default_rng(0).normal(1, 1, (1, 5000)), dtype), float)
    z = (values - values.mean()) / values.std()
    expected = (np.mean(z**3) ** 2 + 1) / np.mean(z**4)
    mask = {"kernel": jnp.ones((1, 5000), bool)}
    for scale in (2.0**-60, 2.0**-23, 1, 2.0**50):
        got = weights.bimodality({"kernel": jnp.asarray(values * scale, dtype)}, mask)
        assert got == pytest.approx(expected, rel=1e-4)
    assert np.isnan(weights.bimodality({"kernel": jnp.full((1, 5000), 0.1, dtype)}, mask))


def test_bimodality_and_share_near_zero_count_only_survivors():
    values = np.array([[-3.0, 0.1, 3.0, -0.2, 3.0, 0.9]])
    keep = np.array([[True, False, True, True, True, True]])
    survivors = values[keep]
    z = (survivors - survivors.mean()) / survivors.std()
    expected = (np.mean(z**3) ** 2 + 1) / np.mean(z**4)
    assert weights.bimodality(*make_layer(values, keep)) == pytest.approx(expected, rel=1e-5)
    assert weights.share_near_zero(*make_layer(values, keep), threshold=2.0) == pytest.approx(2 / 5)


def test_survivors_by_layer_counts_each_kernel():
    mask = {
        "a": make_layer(np.ones((2, 3)), np.eye(2, 3) > 0)[1],
        "block": {"b": make_layer(np.ones((2, 2)))[1]},
    }
    assert weights.survivors_by_layer(mask) == {"a": 2, "block/b": 4}


def count_dead_units(masks):
    """Count the units of each layer that are on no path from the input to the output."""
    from_input = [np.ones(masks[0].shape[0], bool)]
    for mask in masks:
        from_input.append((mask & from_input[-1][:, None]).any(0))
    to_output = [np.ones(masks[-1].shape[1], bool)]
    for mask in masks[:0:-1]:
        to_output.insert(0, (mask & to_output[0]).any(1))
    return [int((~(a & b)).sum()) for a, b in zip(from_input[1:], to_output, strict=True)]


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 1.0])
def test_dead_units_of_lenet_are_on_no_path(density):
    model = LeNet(widths=(30, 20))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)))
    draw = np.random.default_rng(1)
    mask = jax.tree.map(
        lambda leaf: draw.random(leaf.shape) < (density if leaf.ndim > 1 else 1), variables["params"]
    )
    dead = jitted_dead_units(model, variables, mask, (6, 6, 1))
    expected = count_dead_units([mask[f"Dense_{i}"]["kernel"] for i in range(3)])
    assert [int(dead[f"Dense_{i}"]) for i in range(3)] == expected
    assert (sum(expected) > 0) == (density < 1)


def test_dead_channels_of_conv4_have_no_input_or_no_output():
    model = Conv4(width=0.1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    mask = masking.ones_like(variables["params"])
    # channel 2 of Conv_1 has no input
    mask["Conv_1"]["kernel"] = mask["Conv_1"]["kernel"].at[..., 2].set(False)
    # channel 4 of Conv_2 has no output
    mask["Conv_3"]["kernel"] = mask["Conv_3"]["kernel"].at[:, :, 4].set(False)
    dead = jitted_dead_units(model, variables, mask, (8, 8, 3))
    assert {name: int(count) for name, count in dead.items() if count} == {"Conv_1": 1, "Conv_2": 1}


@pytest.mark.parametrize("affine", [False, True])
def test_dead_channels_of_resnet_are_those_within_blocks(affine):
    model = CifarResNet(depth=8, width=0.25, norm_affine=affine)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    mask = masking.ones_like(variables["params"])
    assert not any(jitted_dead_units(model, variables, mask, (8, 8, 3)).values())
    # Conv_1 is the first layer of a block: its pruned channels are dead. Conv_4 is the last one of a block:
    # without it the whole block is dead, but the shortcut is not.
    mask["Conv_1"]["kernel"] = mask["Conv_1"]["kernel"].at[..., :3].set(False)
    mask["Conv_4"]["kernel"] = jnp.zeros_like(mask["Conv_4"]["kernel"])
    dead = {name: int(n) for name, n in jitted_dead_units(model, variables, mask, (8, 8, 3)).items() if n}
    assert dead == {"Conv_1": 3, "Conv_3": 8, "Conv_4": 8}


def test_deep_dense_network_has_no_dead_units():
    """Products of many fan-ins would overflow float32."""
    model = CifarResNet(depth=32, width=0.5)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    mask = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), variables["params"])
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
    assert not any(jitted_dead_units(model, variables, mask, (8, 8, 3)).values())


# --- connectivity of units in models of users ---


class SubclassedNorm(nn.LayerNorm):
    pass


class DoubledNorm(nn.LayerNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Between(nn.Module):
    """Dense layers of 3 and 2 units with `layer` between them."""

    layer: Callable

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(3)(images.reshape(len(images), -1))
        return nn.Dense(2)(self.layer(x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: nn.LayerNorm()(x),
        lambda x: nn.LayerNorm()(x=x),
        lambda x: SubclassedNorm()(x),
        lambda x: DoubledNorm()(x),
        lambda x: nn.GroupNorm(num_groups=3)(x),
    ],
)
def test_normalisation_statistics_do_not_connect_units(layer):
    model = Between(layer)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
    mask = masking.ones_like(variables["params"])
    mask["Dense_1"]["kernel"] = mask["Dense_1"]["kernel"].at[0].set(False)
    dead = jitted_dead_units(model, variables, mask, (2, 2, 1))
    assert {name: int(count) for name, count in dead.items()} == {"Dense_0": 1, "Dense_1": 0}


class Mixer(nn.Module):
    """MLP-Mixer: dense layers over patches and over channels (Tolstikhin et al. 2021)."""

    norm: bool = True
    activation: Callable = nn.gelu

    @nn.compact
    def __call__(self, images, train=False):
        norm = nn.LayerNorm if self.norm else lambda: lambda x: x
        x = nn.Conv(6, (4, 4), strides=(4, 4))(images).reshape(len(images), -1, 6)
        for _ in range(2):
            y = jnp.swapaxes(norm()(x), 1, 2)
            y = nn.Dense(x.shape[1])(self.activation(nn.Dense(5)(y)))
            x = x + jnp.swapaxes(y, 1, 2)
            x = x + nn.Dense(6)(self.activation(nn.Dense(12)(norm()(x))))
        return nn.log_softmax(nn.Dense(10)(norm()(x).mean(1)))


class Assorted(nn.Module):
    """Grouped and transposed convolutions, several feature axes, pools, concatenation, gates, remat."""

    @nn.compact
    def __call__(self, images, train=False):
        x = jnp.tanh(nn.Conv(6, (3, 3))(images))
        x = jnp.tanh(nn.remat(nn.Conv)(6, (3, 3), feature_group_count=3)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        gate = nn.sigmoid(nn.Dense(6)(x.mean((1, 2))))
        x = jnp.concatenate([x * gate[:, None, None], jnp.abs(jnp.tanh(nn.ConvTranspose(4, (2, 2))(x)))], -1)
        one, other = jnp.split(jnp.tanh(nn.DenseGeneral((2, 3), axis=(1, 3))(x)), 2, axis=2)
        return nn.Dense(3)(jnp.tanh((2 * one[:, 0, 0] + other[:, -1, 0]) / 3))


def alive_by_derivatives(model, classes, mask, image_shape, unit_axes):
    """Find the units whose surviving weights have a gradient, for random weights.

    These are exactly the units on paths if there is no normalisation, biases are 0 and activations map 0 to 0.
    """
    draw = np.random.default_rng(3)

    def random_kernel(path, keep):
        return np.where(keep, draw.normal(size=keep.shape), 0) * (path[-1].key == "kernel")

    with jax.enable_x64(True):
        kernels = jax.tree_util.tree_map_with_path(random_kernel, mask)
        images = jnp.asarray(draw.normal(size=(4, *image_shape)))
        probes = jnp.asarray(draw.normal(size=10))
        loss = lambda kernels: (model.apply({"params": kernels}, images) @ probes[:classes]).sum()  # noqa: E731
        slopes = jax.jit(jax.grad(loss))(kernels)
        alive = {}
        for layer, leaves in slopes.items():
            axes = unit_axes.get(layer, (-1,))
            inputs = [i for i in range(leaves["kernel"].ndim) if i - leaves["kernel"].ndim not in axes]
            alive[layer] = ((np.abs(leaves["kernel"]) > 0) & mask[layer]["kernel"]).any(tuple(inputs))
    return alive


def zero_variables(model, image_shape):
    """Return variables of the right shapes; the values do not matter."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)


def random_mask(params, density, seed=0):
    draw = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw.random(leaf.shape) < (density if path[-1].key == "kernel" else 1), params
    )


@pytest.mark.parametrize(
    ("model", "classes", "unit_axes"),
    [
        (Mixer(norm=False, activation=jnp.tanh), 10, {}),
        (Assorted(), 3, {"DenseGeneral_0": (-2, -1)}),
    ],
)
def test_units_are_alive_if_the_output_depends_on_their_weights(model, classes, unit_axes):
    variables = zero_variables(model, (8, 8, 3))
    connectivity = jax.jit(weights.connectivity_of_units, static_argnums=(0, 3))
    for density in (0.04, 0.12, 0.3):
        mask = random_mask(variables["params"], density)
        alive = connectivity(model, variables, mask, (8, 8, 3))
        expected = alive_by_derivatives(model, classes, mask, (8, 8, 3), unit_axes)
        assert set(alive) == set(expected)
        for layer, units in alive.items():
            np.testing.assert_array_equal(units, expected[layer], err_msg=layer)
        assert any(not units.all() for units in alive.values())


def test_normalisation_and_softmax_do_not_change_dead_units():
    """Their statistics and sums over units do not count as paths."""
    model, plain = Mixer(), Mixer(norm=False)
    variables = zero_variables(model, (8, 8, 3))
    dense = masking.ones_like(variables["params"])
    dead = jitted_dead_units(model, variables, dense, (8, 8, 3))
    assert len(dead) == 10
    assert not any(dead.values())
    mask = random_mask(variables["params"], 0.1)
    dead = jitted_dead_units(model, variables, mask, (8, 8, 3))
    kernels = {layer: leaves for layer, leaves in mask.items() if "kernel" in leaves}
    assert sum(dead.values()) > 0
    assert dead == jitted_dead_units(plain, {"params": kernels}, kernels, (8, 8, 3))


@pytest.mark.parametrize("kind", ["attention", "standardised", "scanned", "transposed"])
def test_models_with_unknown_paths_get_no_counts(kind):
    class Standardised(nn.Conv):
        def param(self, name, *arguments, **options):
            value = super().param(name, *arguments, **options)
            return value - value.mean() if name == "kernel" else value

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8)(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            if kind == "attention":
                x = nn.MultiHeadDotProductAttention(2)(x[:, :, 0])
            elif kind == "standardised":
                x = Standardised(3, (3, 3))(x)
            elif kind == "scanned":
                x, _ = nn.scan(Twice, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(
                    x, None
                )
            else:
                layer = nn.Dense(8, use_bias=False)
                x = layer(x) @ layer.variables["params"]["kernel"].T
            return nn.Dense(3)(x.reshape(len(x), -1))

    variables = zero_variables(Net(), (4, 4, 8))
    assert weights.dead_units(Net(), variables, masking.ones_like(variables["params"]), (4, 4, 8)) == {}
    dataset = SimpleNamespace(train=SimpleNamespace(image_shape=(4, 4, 8)))
    experiment = SimpleNamespace(spec=SimpleNamespace(model=Net()), dataset=dataset)
    rows = list(compute_layers(experiment, variables, masking.ones_like(variables["params"])))
    assert rows[0][0] == "Dense_0"
    assert np.isnan([row[3:] for row in rows]).all()


def test_unread_layers_are_dead_and_unevaluated_layers_are_left_out():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = x.reshape(len(x), -1)
            nn.Dense(5, name="unread")(x)
            if self.is_initializing():
                nn.Dense(7, name="auxiliary")(x)
            return nn.Dense(3, name="head")(x)

    variables = zero_variables(Net(), (2, 2, 1))
    dead = weights.dead_units(Net(), variables, masking.ones_like(variables["params"]), (2, 2, 1))
    assert dead == {"head": 0, "unread": 5}
