"""Shapes, parameter counts and initial distributions of the networks against closed forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import config as configs
from imp_jax import data, masking, models, optimizers, training
from imp_jax.errors import UserError
from imp_jax.models.conv4 import Conv4, max_pool
from imp_jax.models.fast_cpu import convolution
from imp_jax.models.fast_cpu.convolution import conv_general_dilated, use_convolutions
from imp_jax.models.layers import kaiming_normal
from imp_jax.models.lenet import LeNet
from imp_jax.models.resnet import CifarResNet, ResNet50
from imp_jax.runtime.execution import EXECUTION_MODES
from tests.helpers.epochs import train_epoch

CIFAR = (32, 32, 3)


def create(name, image_shape=CIFAR, num_classes=10, dtype="float32", **model):
    config = configs.default()
    config.dtype = dtype
    config.model.update({"name": name, **model})
    configs.validate(config)
    return models.create(config, num_classes, image_shape)


def shapes(model, image_shape=CIFAR):
    """The shapes of a model's variables, nothing computed."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- parameter counts (table 1) ---


def test_lenet():
    params = shapes(create("lenet", (28, 28, 1)), (28, 28, 1))["params"]
    assert count(params) == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10 == 266_610


def test_conv4():
    convolutions = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    dense = 8 * 8 * 128 * 256 + 256 * 256 + 256 * 10
    biases = 64 + 64 + 128 + 128 + 256 + 256 + 10
    params = shapes(create("conv4"))["params"]
    assert count(params) == convolutions + dense + biases == 2_425_930
    assert masking.size(params) == convolutions + dense


def cifar_resnet_counts(depth):
    """Weights of the convolutions and the output layer, and channels that are normalised."""
    n = (depth - 2) // 6
    convolutions = 3 * 16 + (2 * n) * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2
    return 9 * convolutions + 64 * 10, 16 + 2 * n * (16 + 32 + 64)


@pytest.mark.parametrize("depth", [20, 26, 32, 44, 56, 110])
def test_cifar_resnets(depth):
    weights, normalised = cifar_resnet_counts(depth)
    plain = shapes(create(f"resnet{depth}"))
    affine = shapes(create(f"resnet{depth}", norm_affine=True))
    assert count(plain["params"]) == weights + 10  # the output layer's biases
    assert count(affine["params"]) == weights + 10 + 2 * normalised
    assert count(plain["batch_stats"]) == 2 * normalised
    assert masking.size(plain["params"]) == masking.size(affine["params"]) == weights
    if depth == 20:
        assert (count(plain["params"]), count(affine["params"])) == (268_346, 269_722)


def test_resnet50():
    weights, normalised = 7 * 7 * 3 * 64, 64
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        c = 64 * 2**stage
        for block in range(blocks):
            weights += inputs * c + 9 * c * c + c * 4 * c
            normalised += c + c + 4 * c
            if block == 0:
                weights += inputs * 4 * c
                normalised += 4 * c
            inputs = 4 * c
    weights += 2048 * 1000
    image_shape = (224, 224, 3)
    plain = shapes(create("resnet50", image_shape, 1000), image_shape)["params"]
    affine = shapes(create("resnet50", image_shape, 1000, norm_affine=True), image_shape)["params"]
    assert count(plain) == weights + 1000
    assert count(affine) == weights + 1000 + 2 * normalised == 25_557_032
    assert masking.size(affine) == weights


def test_resnet50_is_version_1_5():
    """The stride is in the 3 × 3 convolution: the 1 × 1 one before it still sees the larger image."""
    model = ResNet50(num_classes=10, width=0.125)
    image = jnp.ones((1, 64, 64, 3))

    def intermediates():
        variables = model.init(jax.random.key(0), image)
        return model.apply(variables, image, capture_intermediates=True, mutable=["intermediates"])[1]

    outputs = jax.eval_shape(intermediates)["intermediates"]
    sides = [outputs[f"Conv_{i}"]["__call__"][0].shape[1] for i in range(1 + 3 * 16)]
    # stem; 3 blocks at 16; then the first block of a stage has 1 × 1 at the old size and 3 × 3 at the new
    assert sides == [32] + [16] * 9 + [16, 8, 8] + [8] * 9 + [8, 4, 4] + [4] * 15 + [4, 2, 2] + [2] * 6


# --- the CIFAR family in NumPy ---


def numpy_conv(x, kernel, stride):
    """3 × 3, padded by one, by its definition."""
    n, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((n, h, w, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + h, j : j + w] @ kernel[i, j]
    return out[:, ::stride, ::stride]


def numpy_norm(x):
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)


def test_a_cifar_resnet_against_numpy():
    model = CifarResNet(depth=8, width=0.25, norm_momentum=0.8)
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, state = jax.jit(apply)(variables, images)
    kernels = [np.float64(variables["params"][f"Conv_{i}"]["kernel"]) for i in range(7)]

    x = np.maximum(numpy_norm(numpy_conv(images, kernels[0], 1)), 0)
    for block, (channels, stride) in enumerate([(4, 1), (8, 2), (16, 2)]):
        y = np.maximum(numpy_norm(numpy_conv(x, kernels[1 + 2 * block], stride)), 0)
        y = numpy_norm(numpy_conv(y, kernels[2 + 2 * block], 1))
        shortcut = np.zeros_like(y)
        shortcut[..., : x.shape[-1]] = x[:, ::stride, ::stride]
        x = np.maximum(y + shortcut, 0)
        assert x.shape[-1] == channels
    head = variables["params"]["Dense_0"]
    np.testing.assert_allclose(logits, x.mean((1, 2)) @ head["kernel"] + head["bias"], rtol=1e-3, atol=1e-4)
    first = numpy_conv(images, kernels[0], 1)
    running = state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(running["mean"], 0.2 * first.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(running["var"], 0.8 + 0.2 * first.var((0, 1, 2)), rtol=1e-4)


def test_conv4_against_numpy():
    model = Conv4(width=0.1)
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases that count
    logits = jax.jit(model.apply)({"params": params}, images)
    x = images
    for i in range(4):
        x = np.maximum(
            numpy_conv(x, np.float64(params[f"Conv_{i}"]["kernel"]), 1) + params[f"Conv_{i}"]["bias"], 0
        )
        if i in (1, 3):
            n, h, w, channels = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, channels).max((2, 4))
    x = x.reshape(5, -1)
    for i in range(3):
        x = x @ np.float64(params[f"Dense_{i}"]["kernel"]) + params[f"Dense_{i}"]["bias"]
        x = np.maximum(x, 0) if i < 2 else x
    np.testing.assert_allclose(logits, x, rtol=1e-4, atol=1e-4)


def test_resnet50_against_numpy():
    model = ResNet50(num_classes=10, width=0.05)
    images = np.random.default_rng(0).normal(size=(4, 64, 64, 3))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, state = jax.jit(apply)(variables, images)
    convolutions = (np.float64(variables["params"][f"Conv_{i}"]["kernel"]) for i in range(49))

    def layer(x, stride=1, kernel=None):
        kernel = next(convolutions) if kernel is None else np.float64(kernel)
        side = len(kernel)
        padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (1, 2))[:, ::stride, ::stride]
        return numpy_norm(np.einsum("nhwcij,ijco->nhwo", windows, kernel))

    x = np.maximum(layer(images, 2), 0)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros, which no maximum after a ReLU minds
    x = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2].max((4, 5))
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            y = layer(np.maximum(layer(np.maximum(layer(x), 0), stride), 0))
            if block == 0:
                x = layer(x, stride, variables["params"][f"projection_{stage}"]["kernel"])
            x = np.maximum(x + y, 0)
    head = variables["params"]["Dense_0"]
    np.testing.assert_allclose(logits, x.mean((1, 2)) @ head["kernel"] + head["bias"], rtol=1e-2, atol=1e-2)
    assert next(convolutions, None) is None
    assert (state["batch_stats"]["BatchNorm_0"]["var"] != variables["batch_stats"]["BatchNorm_0"]["var"]).all()


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 3)])
def test_max_pool_and_its_gradient_are_flaxs(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    weights = jax.random.normal(jax.random.key(1), nn.max_pool(x, (2, 2), (2, 2)).shape)
    np.testing.assert_array_equal(max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))
    ours = jax.grad(lambda x: jnp.sum(weights * max_pool(x)))(x)
    flaxs = jax.grad(lambda x: jnp.sum(weights * nn.max_pool(x, (2, 2), (2, 2))))(x)
    np.testing.assert_array_equal(ours, flaxs)


# --- initialisation ---


def test_lenet_starts_kaiming_uniform_with_zero_biases():
    params = LeNet().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    for layer in params.values():
        limit = np.sqrt(6 / layer["kernel"].shape[0])  # gain √2: variance 2 / fan-in, uniform
        assert 0.99 * limit < np.abs(layer["kernel"]).max() <= limit
        assert np.var(layer["kernel"]) == pytest.approx(limit**2 / 3, rel=0.1)
        np.testing.assert_array_equal(layer["bias"], 0)


def test_convolutional_networks_start_kaiming_normal_with_zero_biases():
    for model in (Conv4(), CifarResNet(depth=8)):
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *CIFAR)))["params"]
        for layer in params.values():
            fan_in = np.prod(layer["kernel"].shape[:-1])
            few = 4 / np.sqrt(layer["kernel"].size)  # four standard errors of a standard deviation, and more
            assert np.std(layer["kernel"]) == pytest.approx(np.sqrt(2 / fan_in), rel=few)
            np.testing.assert_array_equal(layer.get("bias", 0), 0)


def test_kaiming_normal_is_not_truncated():
    draws = kaiming_normal(jax.random.key(0), (100, 2000)) / np.sqrt(2 / 100)
    beyond_two = np.mean(np.abs(draws) > 2)
    assert beyond_two == pytest.approx(0.0455, abs=0.003)  # of a normal; Flax's he_normal has none
    assert np.var(draws) == pytest.approx(1, abs=0.02)


# --- options ---


@pytest.mark.parametrize("name", ["lenet", "conv4", "resnet20", "resnet50"])
def test_bfloat16_computes_in_bf16_on_float32_variables(name):
    model = create(name, dtype="bfloat16", width=0.25)
    images = jnp.ones((2, *CIFAR))

    def outputs():
        variables = model.init(jax.random.key(0), images)
        return variables, *model.apply(variables, images, train=True, mutable=["batch_stats"])

    variables, logits, state = jax.eval_shape(outputs)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, state))} == {jnp.dtype("float32")}


def test_bfloat16_logits_are_those_of_float32_to_its_precision():
    exact, rounded = (create("resnet8", dtype=dtype, width=0.5) for dtype in ("float32", "bfloat16"))
    images = jax.random.normal(jax.random.key(0), (16, *CIFAR))
    variables = jax.jit(exact.init)(jax.random.key(1), images)
    exact, rounded = (jax.jit(model.apply)(variables, images) for model in (exact, rounded))
    error = np.abs(rounded.astype(np.float32) - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.05  # 8 bits of mantissa, through 8 layers


@pytest.mark.parametrize("name", ["lenet", "conv4", "resnet20", "resnet50"])
def test_width_scales_every_hidden_layer(name):
    full, half = shapes(create(name))["params"], shapes(create(name, width=0.5))["params"]
    for layer, leaves in full.items():
        if "kernel" in leaves:
            out, half_out = leaves["kernel"].shape[-1], half[layer]["kernel"].shape[-1]
            assert half_out == (10 if out == 10 else out // 2)


@pytest.mark.parametrize("name", ["lenet", "conv4", "resnet20", "resnet50"])
def test_a_tiny_width_leaves_a_unit_a_layer(name):
    params = shapes(create(name, width=1e-6))["params"]
    assert masking.size(params) > 0
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(params))


def test_grey_images_suit_every_convolutional_network():
    for name in ("conv4", "resnet20"):
        params = shapes(create(name, (28, 28, 1)), (28, 28, 1))["params"]
        assert params["Conv_0"]["kernel"].shape[:3] == (3, 3, 1)


def test_unsuitable_images_are_said():
    with pytest.raises(UserError, match=r"'lenet', which takes images of 1 to 64 .*; those .* 224 × 224"):
        create("lenet", (224, 224, 3))
    with pytest.raises(UserError, match=r"'resnet50', which takes images of at least 32 .* 28 × 28"):
        create("resnet50", (28, 28, 1))


def test_a_depth_that_is_not_6n_plus_2_is_said():
    for depth in (21, 2, 18):
        with pytest.raises(UserError, match=rf"depth is {depth}; it should be 6n \+ 2, such as 20"):
            create(f"resnet{depth}")


def test_affine_normalisation_where_there_is_none_is_said():
    with pytest.raises(UserError, match=r"model\.norm_affine is True; conv4 has no field norm_affine"):
        create("conv4", norm_affine=True)


def test_unknown_model_is_said_with_a_suggestion():
    with pytest.raises(UserError, match=r"model.name is 'lenett'; .* \(did you mean lenet\?\)"):
        create("lenett")


@pytest.fixture(params=["xla", "onednn"])
def implementation(request):
    """Each way to compute convolutions on a CPU."""
    if request.param == "onednn" and not convolution.has_onednn():
        pytest.skip("this XLA was built without oneDNN")
    convolution.disable_compilation_cache_writes()
    return request.param


@pytest.mark.parametrize(
    ("batch", "kernel_shape", "strides", "padding"),
    [
        (5, (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),
        (40, (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1))),
        (3, (3, 2, 3, 4), (1, 1), "SAME"),  # padded on one side only
        (3, (1, 1, 3, 4), (2, 1), ((0, 0), (0, 0))),
        (3, (2, 2, 3, 4), (1, 1), ((3, 0), (0, 2))),  # padded by more than the kernel
        (3, (2, 2, 3, 4), (1, 2), ((-1, 1), (0, -2))),  # cropped
    ],
)
def test_convolution_in_parts_is_the_convolution(implementation, batch, kernel_shape, strides, padding):
    images = jax.random.normal(jax.random.key(0), (batch, 6, 7, 3))
    kernel = jax.random.normal(jax.random.key(1), kernel_shape)
    along = (
        jax.random.normal(jax.random.key(2), images.shape),
        jax.random.normal(jax.random.key(3), kernel_shape),
    )

    def by(convolve):
        def output(images, kernel):
            return convolve(images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        def loss(inputs):
            return jnp.sum(jnp.sin(output(*inputs)))

        def slope(inputs):
            return sum(jnp.sum(a * g) for a, g in zip(along, jax.grad(loss)(inputs), strict=True))

        @jax.jit
        def all_of_it(inputs):
            return output(*inputs), jax.grad(loss)(inputs), jax.grad(slope)(inputs)

        return jax.tree.leaves(all_of_it((images, kernel)))

    def padded_first(images, kernel, strides, padding, **options):
        """The reference; XLA on a CPU crops wrongly inside of a convolution."""
        if not isinstance(padding, str):
            around = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
            images, padding = jax.lax.pad(images, 0.0, around), "VALID"
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **options)

    ours = functools.partial(conv_general_dilated, implementation=implementation)
    for a, b in zip(by(ours), by(padded_first), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_network_trains_alike_in_a_loop_and_step_by_step(implementation):
    """Two members of a ResNet, three steps: losses, weights, statistics, as with Flax's convolutions."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (24, 8, 8, 3), np.uint8), draw.integers(0, 10, 24)
    split = data.InMemory(jnp.asarray(images), jnp.asarray(labels))
    optimizer = optimizers.make_optimizer("momentum", learning_rate=0.05)

    def trained(execution, convolutions):
        model = CifarResNet(depth=8, width=0.25)
        execution = EXECUTION_MODES[execution]._replace(convolutions=convolutions)
        spec = training.TrainSpec(model, optimizer, execution=execution)
        keys = jax.random.split(jax.random.key(0), 2)
        variables = jax.vmap(lambda key: dict(model.init(key, jnp.zeros((1, 8, 8, 3)), train=False)))(keys)
        masks = masking.ones_like(variables["params"])
        states = training.init_states(variables, masks, spec=spec)
        rates = np.full(3, 0.05, np.float32)
        return train_epoch(states, masks, split, keys, 0, 0, rates, batch_size=8, spec=spec)

    expected = jax.tree.leaves(trained("step_unroll", "flax"))
    for a, b in zip(jax.tree.leaves(trained("scan_unroll", implementation)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_convolution_with_dilation_or_groups_is_laxs():
    images = jax.random.normal(jax.random.key(0), (2, 6, 7, 4))
    for inputs, options in (
        (4, {"rhs_dilation": (2, 2)}),
        (4, {"lhs_dilation": (2, 1)}),
        (2, {"feature_group_count": 2}),
    ):
        kernel = jax.random.normal(jax.random.key(1), (3, 3, inputs, 4))
        arguments = images, kernel, (1, 1), "VALID" if "lhs_dilation" not in options else ((1, 1), (1, 1))
        options["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")
        np.testing.assert_array_equal(
            conv_general_dilated(*arguments, **options), jax.lax.conv_general_dilated(*arguments, **options)
        )


def test_convolution_of_members_is_that_of_each(implementation):
    images = jax.random.normal(jax.random.key(0), (2, 3, 6, 7, 3))
    kernels = jax.random.normal(jax.random.key(1), (2, 3, 3, 3, 4))

    def gradients(images, kernel):
        def loss(images, kernel):
            options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "implementation": implementation}
            return jnp.sum(jnp.sin(conv_general_dilated(images, kernel, (1, 1), "SAME", **options)))

        return jax.grad(loss, argnums=(0, 1))(images, kernel)

    for member in range(2):
        for a, b in zip(
            jax.vmap(gradients)(images, kernels), gradients(images[member], kernels[member]), strict=True
        ):
            np.testing.assert_allclose(a[member], b, rtol=1e-4, atol=1e-4)


def test_bfloat16_wants_a_processor_that_has_it(monkeypatch):
    monkeypatch.setattr(convolution, "_onednn_call_works", lambda: True)
    monkeypatch.setattr(convolution, "_processor_flags", lambda: ["avx2", "avx512f"])
    assert convolution.has_onednn("float32")
    assert not convolution.has_onednn("bfloat16")
    monkeypatch.setattr(convolution, "_processor_flags", lambda: ["avx2", "avx512_bf16"])
    assert convolution.has_onednn("bfloat16")
    assert not convolution.has_onednn("float16")


def test_a_call_that_xla_does_not_know_is_not_made(monkeypatch):
    def unknown(*arguments, **options):
        return jax.ffi.ffi_call("no such call", jax.ShapeDtypeStruct((2,), jnp.float32))(*arguments)

    monkeypatch.setattr(convolution, "onednn_convolution", unknown)
    assert not convolution._onednn_call_works.__wrapped__()
    monkeypatch.setattr(
        convolution,
        "onednn_convolution",
        lambda *a, **options: 0.9 * convolution.xla_convolution(*a, **options),
    )
    assert not convolution._onednn_call_works.__wrapped__()


# --- plain Flax layers of any model ---


class StandardizedConv(nn.Conv):
    """A subclass that computes its kernel and calls the function of the layer by itself."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features))
        kernel = (kernel - kernel.mean()) / kernel.std()
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class ScaledConv(nn.Conv):
    """A subclass that changes what its parent returns."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Twice(nn.Module):
    """One layer, called twice, and made in `setup`."""

    def setup(self):
        self.conv = nn.Conv(3, (3, 3))

    def __call__(self, x):
        return self.conv(nn.relu(self.conv(x)))


LAYERS = {
    "plain": (nn.Conv(4, (3, 3)), True),
    "strided": (nn.Conv(4, (3, 2), strides=(2, 1), padding="VALID", use_bias=False), True),
    "one side": (nn.Conv(4, (2, 2), padding="SAME_LOWER"), True),
    "circular": (nn.Conv(4, (3, 3), padding="CIRCULAR"), True),
    "reflected": (nn.Conv(4, (3, 3), padding="REFLECT"), True),
    "masked": (nn.Conv(4, (3, 3), mask=jnp.arange(3 * 3 * 3 * 4).reshape(3, 3, 3, 4) % 2), True),
    "subclass": (ScaledConv(4, (3, 3)), True),
    "remat": (nn.remat(nn.Conv)(4, (3, 3)), True),
    "jit": (nn.jit(nn.Conv)(4, (3, 3)), True),
    "twice": (Twice(), True),
    "nothing left": (nn.Conv(4, (8, 3), padding="VALID"), False),
    "groups": (nn.Conv(6, (3, 3), feature_group_count=3), False),
    "dilated": (nn.Conv(4, (3, 3), kernel_dilation=2), False),
    "upsampled": (nn.Conv(4, (3, 3), padding=1, input_dilation=(2, 1)), False),
    "own": (nn.Conv(4, (3, 3), conv_general_dilated=jax.lax.conv_general_dilated), False),
    "rows": (nn.Conv(4, (3,), padding="CAUSAL"), False),
    "volumes": (nn.Conv(4, (1, 3, 3)), False),
    "standardized": (StandardizedConv(4, (3, 3)), False),
    "transposed": (nn.ConvTranspose(4, (3, 3)), False),
    "local": (nn.ConvLocal(2, (2, 2)), False),
}


def applied(layer, implementation):
    """The layer as a function of its variables and images."""

    def apply(variables, images):
        with use_convolutions(implementation):
            return layer.apply(variables, images)

    return apply


def layer_inputs(name):
    """Variables and images of a layer."""
    images = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    images = images[:, None] if name == "volumes" else images
    return jax.jit(LAYERS[name][0].init)(jax.random.key(1), images), images


@pytest.mark.parametrize("name", [name for name, (_, plain) in LAYERS.items() if plain])
def test_a_plain_layer_is_taken_over_and_is_that_of_flax(name):
    layer, inputs = LAYERS[name][0], layer_inputs(name)
    ours, expected = applied(layer, "xla"), applied(layer, "flax")
    assert "name=_convolve" in str(jax.make_jaxpr(ours)(*inputs))
    if name in ("remat", "jit", "twice"):  # how the gradient comes to the layer is up to Flax
        ours, expected = (
            jax.value_and_grad(lambda *inputs, f=f: jnp.sum(jnp.sin(f(*inputs))), (0, 1))
            for f in (ours, expected)
        )
    for a, b in zip(*(jax.tree.leaves(jax.jit(f)(*inputs)) for f in (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert getattr(layer, "conv_general_dilated", None) is None


@pytest.mark.parametrize("name", [name for name, (_, plain) in LAYERS.items() if not plain])
def test_any_other_layer_is_left_to_flax(name):
    inputs = jax.eval_shape(lambda: layer_inputs(name))
    ours, expected = (jax.make_jaxpr(applied(LAYERS[name][0], by))(*inputs) for by in ("onednn", "flax"))
    assert str(ours) == str(expected)


# --- a user's own ---


class Mixer(nn.Module):
    """A network for images of one size, without the fields of our own."""

    num_classes: int = 10
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(4, (7, 7), strides=(7, 7))(images)
        x = x.reshape(len(x), 16, 4)
        x = nn.Dense(16, param_dtype=self.param_dtype)(x.swapaxes(1, 2))
        return nn.Dense(self.num_classes)(x.mean(1))


class Normalised(nn.Module):
    num_classes: int = 10
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(images)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


class Untrained(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.mean((1, 2)))


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
        return nn.Dense(10)(images.mean((1, 2)))


class Unflattened(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes)(images)


class Listed(Mixer):
    widths: tuple = ()


@pytest.fixture
def own_models(monkeypatch):
    own = {"listed": functools.partial(Listed, widths=[3])}
    own |= {
        "flat": Unflattened,
        "mixer": Mixer,
        "half": functools.partial(Mixer, param_dtype="bfloat16"),
        "normalised": Normalised,
    }
    for name, model in (own | {"untrained": Untrained, "fixed": Fixed}).items():
        monkeypatch.setitem(models.MODELS, name, model)


def test_a_model_needs_no_field_but_the_number_of_classes(own_models):
    assert create("mixer", (28, 28, 1), num_classes=7).num_classes == 7
    assert create("normalised", norm_parts=2, dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mixer", {"width": 0.5}, r"model\.width is 0\.5; mixer has no field width, so it should be 1\.0"),
        (
            "mixer",
            {"dtype": "bfloat16"},
            r"^dtype is bfloat16; mixer has no field dtype, so it should be float32",
        ),
        ("mixer", {"norm_parts": 2}, r"model\.norm_parts is 2; mixer has no normalisation"),
        ("lenet", {"norm_momentum": 0.5}, r"model\.norm_momentum is 0\.5; lenet has no field norm_momentum"),
        ("half", {}, r"'half', which has parameters of type bfloat16; they should be float32"),
        ("untrained", {}, r"'untrained', which is not called as model\(images, train=False\)"),
        ("fixed", {}, r"'fixed', which has no field num_classes"),
        (
            "flat",
            {},
            r"'flat', which makes \(1, 28, 28, 10\) of one image; it should be logits of the shape \(1, 10\)",
        ),
        ("listed", {}, r"'listed', which has a field that cannot be hashed, as a list; it should be a tuple"),
    ],
)
def test_what_a_model_lacks_is_reported(own_models, name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        create(name, (28, 28, 1), **options)


def test_statistics_cannot_be_estimated_again_without_a_momentum(own_models):
    config = configs.default()
    config.analysis.batch_norm = "reestimate"
    for name, lacks in (("normalised", "field norm_momentum"), ("conv4", "statistics of its batches")):
        config.model.name = name
        with pytest.raises(
            UserError, match=rf"analysis\.batch_norm is 'reestimate'; {name} has no {lacks}, so"
        ):
            models.create(config, 10, CIFAR)
