"""The kernels for GPUs, run on a CPU, against the layers of Flax and the functions of `lax`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import data, masking, models, optimizers, repulsion, training
from imp_jax.models.fast_cpu import normalization
from imp_jax.models.fast_gpu import pooling
from imp_jax.models.fast_gpu.convolution import IMPLEMENTATIONS, conv_general_dilated_by
from imp_jax.models.kernels import use_kernels
from imp_jax.models.layers import MaxPool
from imp_jax.runtime.execution import EXECUTION_MODES, ExecutionMode
from tests.helpers.epochs import train_epoch

DIMENSIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
GEOMETRIES = [
    ((3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),
    ((3, 2, 3, 4), (1, 1), "SAME"),
    ((1, 1, 3, 4), (2, 1), "VALID"),
    ((2, 2, 3, 4), (1, 2), ((3, 0), (0, 2))),
]


def convolution_and_derivatives(convolve, images, kernel, strides, padding):
    """Return the outputs, the gradients of a loss, and the gradients of a derivative of it in one direction."""
    direction = jnp.cos(3 * images), jnp.cos(3 * kernel)

    def loss(images, kernel):
        return jnp.sum(jnp.sin(convolve(images, kernel, strides, padding, **DIMENSIONS)))

    def derivative(images, kernel):
        gradients = jax.grad(loss, (0, 1))(images, kernel)
        return sum(jnp.sum(d * g) for d, g in zip(direction, gradients, strict=True))

    outputs = convolve(images, kernel, strides, padding, **DIMENSIONS)
    return outputs, jax.grad(loss, (0, 1))(images, kernel), jax.grad(derivative, (0, 1))(images, kernel)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize(("kernel_shape", "strides", "padding"), GEOMETRIES)
def test_vmapped_convolutions_equal_those_of_single_members(
    implementation, in_axes, kernel_shape, strides, padding
):
    """Values, gradients and second derivatives, also if all members share their images or their kernel."""
    images = jax.random.normal(jax.random.key(0), (3, 2, 6, 7, 3))
    kernels = jax.random.normal(jax.random.key(1), (3, *kernel_shape))
    arguments = [leaf if axis == 0 else leaf[0] for leaf, axis in zip((images, kernels), in_axes, strict=True)]
    compute = functools.partial(convolution_and_derivatives, strides=strides, padding=padding)
    function = functools.partial(compute, conv_general_dilated_by(implementation))
    actual = jax.jit(jax.vmap(function, in_axes))(*arguments)
    for i in range(3):
        single = [leaf[i] if axis == 0 else leaf for leaf, axis in zip(arguments, in_axes, strict=True)]
        expected = jax.jit(functools.partial(compute, jax.lax.conv_general_dilated))(*single)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


def find_groups(function, *arguments):
    """Return the numbers of feature groups of all convolutions of a function."""
    text = jax.jit(function).lower(*arguments).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    return [int(line.split("feature_group_count = ")[1].split(" ")[0]) for line in lines]


def test_the_implementations_call_the_convolutions_that_they_should():
    """Each of the three parts once per member, or once for all members."""
    images = jnp.ones((3, 2, 6, 7, 3))
    kernels = jnp.ones((3, 3, 3, 3, 4))

    def gradients(implementation):
        convolve = conv_general_dilated_by(implementation)
        loss = lambda x, k: jnp.sum(jnp.sin(convolve(x, k, (1, 1), "SAME", **DIMENSIONS)))  # noqa: E731
        return jax.grad(loss, (0, 1))

    for implementation in IMPLEMENTATIONS:
        assert find_groups(gradients(implementation), images[0], kernels[0]) == [1] * 3
    assert find_groups(jax.vmap(gradients("per_member")), images, kernels) == [1] * 9
    assert len(find_groups(jax.vmap(gradients("grouped")), images, kernels)) == 3


def test_the_grouped_weight_gradient_is_the_transpose_of_the_grouped_convolution():
    """By JAX's rule it would be a forward convolution with `feature_group_count = 3` and a large window."""
    images, gradients = jnp.ones((3, 2, 6, 7, 3)), jnp.ones((3, 2, 6, 7, 4))

    def kernel_gradient(images, gradient):
        convolve = conv_general_dilated_by("grouped")
        kernel = jnp.zeros((3, 3, 3, 4))
        return jax.vjp(lambda kernel: convolve(images, kernel, (1, 1), "SAME", **DIMENSIONS), kernel)[1](
            gradient
        )

    lowered = jax.jit(jax.vmap(kernel_gradient)).lower(images, gradients).as_text()
    (line,) = [line for line in lowered.splitlines() if "stablehlo.convolution" in line]
    assert "batch_group_count = 3" in line
    assert "feature_group_count = 1" in line


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_parts_of_a_batch_keeps_the_rule_for_members(implementation):
    """As with `model.norm_parts`: the parts of a batch have the same kernel, and their own statistics."""
    images = jax.random.normal(jax.random.key(0), (3, 2, 4, 6, 7, 3))  # members, parts, images
    kernels = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 4))

    def gradients(convolve):
        def loss(images, kernel):
            return jnp.sum(
                jnp.sin(jax.vmap(lambda x: convolve(x, kernel, (1, 1), "SAME", **DIMENSIONS))(images))
            )

        return jax.vmap(jax.grad(loss, (0, 1)))

    ours = gradients(conv_general_dilated_by(implementation))
    for a, b in zip(
        jax.jit(ours)(images, kernels),
        jax.jit(gradients(jax.lax.conv_general_dilated))(images, kernels),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    if implementation == "per_member":  # one for each member; the kernel's gradient one for each part too
        assert find_groups(ours, images, kernels) == [1] * (3 + 3 + 6)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (2, {"feature_group_count": 2}),
        (4, {"rhs_dilation": (2, 2)}),
        (4, {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))}),
    ],
)
def test_grouped_and_dilated_convolutions_keep_the_rules_of_jax(inputs, options):
    images = jax.random.normal(jax.random.key(0), (2, 6, 7, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, inputs, 4))
    options = {"window_strides": (1, 1), "padding": "SAME", **DIMENSIONS, **options}
    expected = jax.lax.conv_general_dilated(images, kernel, **options)
    options["strides"] = options.pop("window_strides")
    np.testing.assert_array_equal(conv_general_dilated_by("grouped")(images, kernel, **options), expected)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_two_sums_in_one_reduction_equal_numpy_in_float64(platform):
    x = jax.random.normal(jax.random.key(0), (8, 5, 6, 3)) + 1
    y = jax.random.normal(jax.random.key(1), (8, 5, 6, 3))
    x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def loss(x, y):
        means = normalization._means(x, y, platform)
        return jnp.sum(means[0] * jnp.arange(3.0)) + jnp.sum(jnp.sin(means[1]))

    mean, product_mean = normalization._means(x, y, platform)
    np.testing.assert_allclose(mean, x64.mean((0, 1, 2)), rtol=4e-6)
    np.testing.assert_allclose(product_mean, (x64 * y64).mean((0, 1, 2)), rtol=4e-6, atol=4e-6)
    slope = np.cos((x64 * y64).mean((0, 1, 2))) / (8 * 5 * 6)
    expected = np.arange(3.0) / (8 * 5 * 6) + slope * y64, slope * x64
    for a, b in zip(jax.grad(loss, (0, 1))(x, y), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


POOLS = [
    ({"window_shape": (2, 2), "strides": (2, 2)}, (2, 7, 6, 3)),
    ({"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}, (2, 8, 7, 3)),
    ({"window_shape": (3, 2), "padding": "SAME"}, (2, 5, 6, 3)),
]


@pytest.mark.parametrize(("options", "shape"), POOLS)
def test_max_pool_and_its_gradient_equal_those_of_flax_without_a_scatter(options, shape):
    layer = MaxPool(**options)
    x = jax.random.normal(jax.random.key(0), shape)
    weights = jnp.cos(jnp.arange(nn.max_pool(x, **options).size)).reshape(nn.max_pool(x, **options).shape)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(weights * layer.apply({}, x)))(x)

    expected = layer.apply({}, x), gradient(x)
    with use_kernels("per_member"):
        np.testing.assert_array_equal(layer.apply({}, x), expected[0])
        np.testing.assert_allclose(gradient(x), expected[1], rtol=1e-6, atol=1e-6)
        text = str(jax.make_jaxpr(gradient)(x))
    assert "scatter" not in text
    assert "reduce_window" not in text
    one_image = jnp.ones((4, 4, 3))  # without a batch: pooled by Flax
    with use_kernels("per_member"):
        assert MaxPool((2, 2)).apply({}, one_image).shape == (3, 3, 3)


def test_equal_elements_share_the_gradient():
    gradient = jax.grad(lambda x: jnp.sum(pooling.max_pool(x, (2, 2), (2, 2), "VALID")))(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient[0, ..., 0], [[0.25, 0.25], [0.25, 0.25]])


class ConvNet(nn.Module):
    """Two convolutions and a dense layer, without a normalisation, whose sums would differ in rounding."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(images))
        x = MaxPool((2, 2), strides=(2, 2))(nn.relu(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


def make_models():
    """Return networks by name; the rectifiers of the ResNet follow sums, which differ in rounding."""
    return {
        "plain": ConvNet(),
        "conv4": models.create("conv4", 10, (8, 8, 3), width=0.1),
        "lenet": models.create("lenet", 10, (8, 8, 3), width=0.1),
        "resnet8": models.create("resnet8", 10, (8, 8, 3), width=0.25),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["plain", "conv4", "lenet", "resnet8"])
@pytest.mark.parametrize(
    ("with_repulsion", "augmentation", "accumulate_steps"), [(False, (), 1), (True, ("crop", "flip"), 2)]
)
def test_vmapped_steps_equal_steps_of_single_networks_of_flax(
    implementation, name, with_repulsion, augmentation, accumulate_steps
):
    """Parameters, statistics and metrics are equal to 2e-6 of the largest value after a step."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, 8, 8, 3), np.uint8), rng.integers(0, 10, 16)
    split = data.InMemory(jnp.asarray(images), jnp.asarray(labels))
    model = make_models()[name]
    keys = jax.random.split(jax.random.key(0), 3)
    variables = jax.vmap(lambda key: dict(model.init(key, jnp.zeros((1, 8, 8, 3)), train=False)))(keys)
    masks = jax.tree.map(lambda p: jax.random.bernoulli(keys[0], 0.8, p.shape), variables["params"])
    optima = None
    if with_repulsion:
        earlier = jax.tree.map(jnp.cos, variables["params"])
        optima = repulsion.add_optimum(None, earlier, masks, max_optima=1)

    def train(execution):
        spec = training.TrainSpec(
            model,
            optimizers.make_optimizer("momentum", learning_rate=0.05),
            normalize=data.Normalize((0.4,) * 3, (0.3,) * 3),
            augmentation=augmentation,
            repulsion_strength=2.0,
            execution=execution,
            accumulate_steps=accumulate_steps,
        )
        # copied, because the states of the epoch are donated
        states = training.init_states(jax.tree.map(jnp.copy, variables), masks, spec=spec)
        rates = np.full(1, 0.05, np.float32)
        return train_epoch(states, masks, split, keys, 0, 0, rates, optima, batch_size=8, spec=spec)

    expected = train(EXECUTION_MODES["step_unroll"])
    actual = train(ExecutionMode(scan=True, unroll=False, convolutions=implementation))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", ["lenet", "conv4", "resnet20", "resnet50"])
def test_the_training_step_lowers_for_cuda_without_custom_calls_and_barriers(name):
    """So no kernel of a CPU is part of it."""
    side = 32 if name == "resnet50" else 16
    model = models.create(name, 10, (side, side, 3), width=0.1)
    spec = training.TrainSpec(
        model,
        optimizers.make_optimizer("momentum", learning_rate=0.1),
        batch_size=4,
        execution=ExecutionMode(convolutions="per_member"),
    )
    split = data.InMemory(jnp.zeros((8, side, side, 3), jnp.uint8), jnp.zeros(8, jnp.int32))
    keys = jax.random.split(jax.random.key(0), 2)

    def epoch(variables, masks, epoch):
        states = training.init_states(variables, masks, spec=spec)
        return training.scan_steps(states, masks, epoch, 0, np.ones(2, np.float32), None, None, spec=spec)

    variables = jax.eval_shape(jax.vmap(models.init_fn(model, (side, side, 3))), keys)
    masks = jax.eval_shape(masking.ones_like, variables["params"])
    batches = split.training_epochs(keys, 1, 4).epoch(0)
    text = jax.export.export(jax.jit(epoch), platforms=["cuda"])(variables, masks, batches).mlir_module()
    assert "stablehlo.while" in text
    assert "stablehlo.custom_call" not in text
    assert "stablehlo.optimization_barrier" not in text
