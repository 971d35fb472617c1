"""Shapes, parameter counts and initial distributions of the networks against closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import masking, models
from imp_jax.errors import UserError
from imp_jax.models.conv4 import Conv4
from imp_jax.models.layers import kaiming_normal
from imp_jax.models.lenet import LeNet
from imp_jax.models.resnet import CifarResNet, ResNet50

CIFAR = (32, 32, 3)


def create(name, image_shape=CIFAR, num_classes=10, **options):
    return models.create(name, num_classes, image_shape, **options)


def shapes(model, image_shape=CIFAR):
    """Return the shapes of a model's variables without computing them."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)


def count_elements(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- parameter counts (table 1) ---


def test_lenet_has_the_parameters_of_table_1():
    params = shapes(create("lenet", (28, 28, 1)), (28, 28, 1))["params"]
    assert count_elements(params) == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10 == 266_610


def test_conv4_has_the_parameters_of_table_1():
    convolutions = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    dense = 8 * 8 * 128 * 256 + 256 * 256 + 256 * 10
    biases = 64 + 64 + 128 + 128 + 256 + 256 + 10
    params = shapes(create("conv4"))["params"]
    assert count_elements(params) == convolutions + dense + biases == 2_425_930
    assert masking.size(params) == convolutions + dense


def cifar_resnet_counts(depth):
    """Return the numbers of weights (convolutions and output layer) and of normalised channels."""
    n = (depth - 2) // 6
    convolutions = 3 * 16 + (2 * n) * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2
    return 9 * convolutions + 64 * 10, 16 + 2 * n * (16 + 32 + 64)


@pytest.mark.parametrize("depth", [20, 26, 32, 44, 56, 110])
def test_cifar_resnets_have_the_expected_parameters(depth):
    weights, normalized = cifar_resnet_counts(depth)
    plain = shapes(create(f"resnet{depth}"))
    affine = shapes(create(f"resnet{depth}", norm_affine=True))
    assert count_elements(plain["params"]) == weights + 10  # the output layer's biases
    assert count_elements(affine["params"]) == weights + 10 + 2 * normalized
    assert count_elements(plain["batch_stats"]) == 2 * normalized
    assert masking.size(plain["params"]) == masking.size(affine["params"]) == weights
    if depth == 20:
        assert (count_elements(plain["params"]), count_elements(affine["params"])) == (268_346, 269_722)


def test_resnet50_has_the_expected_parameters():
    weights, normalized = 7 * 7 * 3 * 64, 64
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        c = 64 * 2**stage
        for block in range(blocks):
            weights += inputs * c + 9 * c * c + c * 4 * c
            normalized += c + c + 4 * c
            if block == 0:
                weights += inputs * 4 * c
                normalized += 4 * c
            inputs = 4 * c
    weights += 2048 * 1000
    image_shape = (224, 224, 3)
    plain = shapes(create("resnet50", image_shape, 1000), image_shape)["params"]
    affine = shapes(create("resnet50", image_shape, 1000, norm_affine=True), image_shape)["params"]
    assert count_elements(plain) == weights + 1000
    assert count_elements(affine) == weights + 1000 + 2 * normalized == 25_557_032
    assert masking.size(affine) == weights


@pytest.mark.parametrize(
    ("name", "blocks", "parameters"),
    [
        ("vgg11", (64, 128, 256, 256, 512, 512, 512, 512), 9_222_858 + 2 * 2_752),
        ("vgg16", (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512), 14_715_594 + 2 * 4_224),
    ],
)
def test_vggs_have_the_expected_parameters(name, blocks, parameters):
    weights = sum(9 * a * b for a, b in itertools.pairwise((3, *blocks))) + 512 * 10
    plain, affine = (shapes(create(name, norm_affine=affine))["params"] for affine in (False, True))
    assert count_elements(plain) == weights + 10
    assert count_elements(affine) == weights + 10 + 2 * sum(blocks) == parameters
    assert masking.size(affine) == weights


@pytest.mark.parametrize(
    ("name", "image_shape", "num_classes", "parameters"),
    [
        # the numbers of torchvision for ImageNet
        ("resnet18", (224, 224, 3), 1000, 11_689_512),
        ("resnet34", (224, 224, 3), 1000, 21_797_672),
        ("resnet18", CIFAR, 10, 11_173_962),
        ("resnet34", CIFAR, 10, 21_282_122),
    ],
)
def test_basic_resnets_have_the_expected_parameters(name, image_shape, num_classes, parameters):
    stem = 7 * 7 if image_shape[0] > 64 else 3 * 3
    weights, normalized, inputs = stem * 3 * 64, 64, 64
    for stage, blocks in enumerate((2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3)):
        c = 64 * 2**stage
        weights += 9 * inputs * c + (2 * blocks - 1) * 9 * c * c + (stage > 0) * inputs * c
        normalized += 2 * blocks * c + (stage > 0) * c
        inputs = c
    weights += 512 * num_classes
    affine = shapes(create(name, image_shape, num_classes, norm_affine=True), image_shape)["params"]
    assert count_elements(affine) == weights + num_classes + 2 * normalized == parameters
    assert masking.size(affine) == weights


@pytest.mark.parametrize(
    ("depth", "factor", "parameters"), [(28, 10, 36_479_194), (16, 4, 2_748_890), (10, 1, None)]
)
def test_wide_resnets_have_the_expected_parameters(depth, factor, parameters):
    n, inputs = (depth - 4) // 6, 16
    weights, normalized = 9 * 3 * 16, 0
    for stage in range(3):
        c = 16 * 2**stage * factor
        weights += inputs * c + 9 * inputs * c + (2 * n - 1) * 9 * c * c
        normalized += inputs + (2 * n - 1) * c
        inputs = c
    weights, normalized = weights + inputs * 10, normalized + inputs
    affine = shapes(create(f"wide_resnet{depth}_{factor}", norm_affine=True))["params"]
    assert count_elements(affine) == weights + 10 + 2 * normalized
    assert parameters in (None, count_elements(affine))
    assert masking.size(affine) == weights


def test_mlp_has_the_widths_of_its_name():
    params = shapes(create("mlp_20_7", (5, 5, 1)), (5, 5, 1))["params"]
    assert [layer["kernel"].shape for layer in params.values()] == [(25, 20), (20, 7), (7, 10)]
    assert count_elements(params) == 26 * 20 + 21 * 7 + 8 * 10
    assert shapes(create("mlp"))["params"] == shapes(create("lenet"))["params"]


def test_a_wide_resnet_of_another_depth_is_refused():
    with pytest.raises(UserError, match=r"a wide ResNet's depth is 20; it should be 6n \+ 4, such as 10"):
        create("wide_resnet20_2")


def test_basic_resnets_have_the_strides_of_their_stem():
    """The mean at the end is over an eighth of the side for small images, and over a 32nd for large ones."""
    for side, expected in ((32, 4), (256, 8)):
        model = create("resnet18", (side, side, 3), width=0.05)
        images = jnp.ones((1, side, side, 3))
        variables = jax.eval_shape(lambda images, model=model: model.init(jax.random.key(0), images), images)
        _, state = jax.eval_shape(
            lambda v, images, model=model: model.apply(v, images, capture_intermediates=True), variables, images
        )
        sides = {
            v["__call__"][0].shape[1] for k, v in state["intermediates"].items() if k.startswith("BatchNorm")
        }
        assert min(sides) == expected


def test_resnet50_has_its_strides_in_the_3_by_3_convolutions():
    """In this version, 1.5, the preceding 1 × 1 convolution has outputs of the larger size."""
    model = ResNet50(num_classes=10, width=0.125)
    image = jnp.ones((1, 64, 64, 3))

    def intermediates():
        variables = model.init(jax.random.key(0), image)
        return model.apply(variables, image, capture_intermediates=True, mutable=["intermediates"])[1]

    outputs = jax.eval_shape(intermediates)["intermediates"]
    sides = [outputs[f"Conv_{i}"]["__call__"][0].shape[1] for i in range(1 + 3 * 16)]
    # stem; 3 blocks at 16; in later stages only the first 1 × 1 convolution has outputs of the previous size
    assert sides == [32] + [16] * 9 + [16, 8, 8] + [8] * 9 + [8, 4, 4] + [4] * 15 + [4, 2, 2] + [2] * 6


# --- the CIFAR family in NumPy ---


def numpy_conv(x, kernel, stride):
    """Compute a 3 × 3 convolution, padded by one, from its definition."""
    n, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((n, h, w, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + h, j : j + w] @ kernel[i, j]
    return out[:, ::stride, ::stride]


def numpy_norm(x):
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)


def test_a_cifar_resnet_equals_its_numpy_version():
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


def test_conv4_equals_its_numpy_version():
    model = Conv4(width=0.1)
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases are initially zero
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


def test_resnet50_equals_its_numpy_version():
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
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros do not change a maximum after a ReLU
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


# --- initialisation ---


def test_lenet_is_initialized_kaiming_uniform_with_zero_biases():
    params = LeNet().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    for layer in params.values():
        limit = np.sqrt(6 / layer["kernel"].shape[0])  # uniform with variance 2 / fan-in
        assert 0.99 * limit < np.abs(layer["kernel"]).max() <= limit
        assert np.var(layer["kernel"]) == pytest.approx(limit**2 / 3, rel=0.1)
        np.testing.assert_array_equal(layer["bias"], 0)


def test_convolutional_networks_are_initialized_kaiming_normal_with_zero_biases():
    for model in (Conv4(), CifarResNet(depth=8)):
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *CIFAR)))["params"]
        for layer in params.values():
            fan_in = np.prod(layer["kernel"].shape[:-1])
            tolerance = 4 / np.sqrt(layer["kernel"].size)  # more than four standard errors of the deviation
            assert np.std(layer["kernel"]) == pytest.approx(np.sqrt(2 / fan_in), rel=tolerance)
            np.testing.assert_array_equal(layer.get("bias", 0), 0)


def test_kaiming_normal_is_not_truncated():
    draws = kaiming_normal(jax.random.key(0), (100, 2000)) / np.sqrt(2 / 100)
    beyond_two = np.mean(np.abs(draws) > 2)
    assert beyond_two == pytest.approx(0.0455, abs=0.003)  # the share of a normal; 0 in Flax's he_normal
    assert np.var(draws) == pytest.approx(1, abs=0.02)


# --- options ---


@pytest.mark.parametrize(
    "name", ["lenet", "conv4", "vgg16", "resnet20", "resnet18", "resnet50", "wide_resnet10_2"]
)
def test_dtype_bfloat16_keeps_variables_in_float32(name):
    model = create(name, dtype="bfloat16", width=0.25)
    images = jnp.ones((2, *CIFAR))

    def outputs():
        variables = model.init(jax.random.key(0), images)
        return variables, *model.apply(variables, images, train=True, mutable=["batch_stats"])

    variables, logits, state = jax.eval_shape(outputs)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, state))} == {jnp.dtype("float32")}


def test_bfloat16_logits_equal_float32_logits_up_to_rounding():
    exact, rounded = (create("resnet8", dtype=dtype, width=0.5) for dtype in ("float32", "bfloat16"))
    images = jax.random.normal(jax.random.key(0), (16, *CIFAR))
    variables = jax.jit(exact.init)(jax.random.key(1), images)
    exact, rounded = (jax.jit(model.apply)(variables, images) for model in (exact, rounded))
    error = np.abs(rounded.astype(np.float32) - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.05  # 8 bits of precision, through 8 layers


@pytest.mark.parametrize(
    "name", ["lenet", "conv4", "vgg16", "resnet20", "resnet18", "resnet50", "wide_resnet10_2"]
)
def test_width_scales_every_hidden_layer(name):
    full, half = shapes(create(name))["params"], shapes(create(name, width=0.5))["params"]
    for layer, leaves in full.items():
        if "kernel" in leaves:
            out, half_out = leaves["kernel"].shape[-1], half[layer]["kernel"].shape[-1]
            assert half_out == (10 if out == 10 else out // 2)


@pytest.mark.parametrize(
    "name", ["lenet", "conv4", "vgg16", "resnet20", "resnet18", "resnet50", "wide_resnet10_2"]
)
def test_a_tiny_width_leaves_one_unit_per_layer(name):
    params = shapes(create(name, width=1e-6))["params"]
    assert masking.size(params) > 0
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(params))


def test_convolutional_networks_accept_grey_images():
    for name in ("conv4", "resnet20"):
        params = shapes(create(name, (28, 28, 1)), (28, 28, 1))["params"]
        assert params["Conv_0"]["kernel"].shape[:3] == (3, 3, 1)


def test_images_of_unsuitable_size_are_refused():
    with pytest.raises(UserError, match=r"'lenet', which takes images of 1 to 64 .*; those .* 224 × 224"):
        create("lenet", (224, 224, 3))
    with pytest.raises(UserError, match=r"'resnet50', which takes images of at least 32 .* 28 × 28"):
        create("resnet50", (28, 28, 1))


def test_a_depth_that_is_not_6n_plus_2_is_refused():
    for depth in (21, 2, 24):
        with pytest.raises(UserError, match=rf"depth is {depth}; it should be 6n \+ 2, such as 20"):
            create(f"resnet{depth}")


def test_norm_affine_is_refused_for_a_model_without_normalization():
    with pytest.raises(UserError, match=r"model\.norm_affine is True; conv4 has no field norm_affine"):
        create("conv4", norm_affine=True)


def test_an_unknown_model_is_reported_with_a_suggestion():
    with pytest.raises(UserError, match=r"model.name is 'lenett'; .* \(did you mean lenet\?\)"):
        create("lenett")
