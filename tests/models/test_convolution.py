"""Values and gradients of the fast convolutions for CPUs, against those of `lax` and Flax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import data, masking, optimizers, training
from imp_jax.models.fast_cpu import convolution, use_kernels
from imp_jax.models.fast_cpu.convolution import conv_general_dilated
from imp_jax.models.resnet import CifarResNet
from imp_jax.runtime.execution import EXECUTION_MODES
from tests.helpers.epochs import train_epoch


@pytest.fixture(params=["xla", "onednn"])
def implementation(request):
    """Return each library that computes convolutions; oneDNN is skipped if it is not available."""
    if request.param == "onednn" and not convolution.has_onednn():
        pytest.skip("this build of XLA has no working oneDNN convolution")
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
def test_conv_general_dilated_and_its_gradients_equal_lax(
    implementation, batch, kernel_shape, strides, padding
):
    images = jax.random.normal(jax.random.key(0), (batch, 6, 7, 3))
    kernel = jax.random.normal(jax.random.key(1), kernel_shape)
    direction = (
        jax.random.normal(jax.random.key(2), images.shape),
        jax.random.normal(jax.random.key(3), kernel_shape),
    )

    def outputs_and_gradients(convolve):
        def output(images, kernel):
            return convolve(images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        def loss(inputs):
            return jnp.sum(jnp.sin(output(*inputs)))

        def directional_derivative(inputs):
            return sum(jnp.sum(d * g) for d, g in zip(direction, jax.grad(loss)(inputs), strict=True))

        @jax.jit
        def compute(inputs):
            return output(*inputs), jax.grad(loss)(inputs), jax.grad(directional_derivative)(inputs)

        return jax.tree.leaves(compute((images, kernel)))

    def pad_and_convolve(images, kernel, strides, padding, **options):
        """Pad or crop first, because convolutions of XLA on a CPU are wrong for negative padding."""
        if not isinstance(padding, str):
            pads = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
            images, padding = jax.lax.pad(images, 0.0, pads), "VALID"
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **options)

    ours = functools.partial(conv_general_dilated, implementation=implementation)
    for a, b in zip(outputs_and_gradients(ours), outputs_and_gradients(pad_and_convolve), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_scanned_steps_with_fast_convolutions_equal_single_steps_with_flax(implementation):
    """Losses, weights and statistics of two members of a ResNet are equal after three steps."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 8, 8, 3), np.uint8), rng.integers(0, 10, 24)
    split = data.InMemory(jnp.asarray(images), jnp.asarray(labels))
    optimizer = optimizers.make_optimizer("momentum", learning_rate=0.05)

    def train(execution, convolutions):
        model = CifarResNet(depth=8, width=0.25)
        execution = EXECUTION_MODES[execution]._replace(convolutions=convolutions)
        spec = training.TrainSpec(model, optimizer, execution=execution)
        keys = jax.random.split(jax.random.key(0), 2)
        variables = jax.vmap(lambda key: dict(model.init(key, jnp.zeros((1, 8, 8, 3)), train=False)))(keys)
        masks = masking.ones_like(variables["params"])
        states = training.init_states(variables, masks, spec=spec)
        rates = np.full(3, 0.05, np.float32)
        return train_epoch(states, masks, split, keys, 0, 0, rates, batch_size=8, spec=spec)

    expected = jax.tree.leaves(train("step_unroll", "flax"))
    for a, b in zip(jax.tree.leaves(train("scan_unroll", implementation)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_lax_computes_dilated_and_grouped_convolutions():
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


def test_vmap_over_members_equals_single_convolutions(implementation):
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


def test_onednn_in_bfloat16_requires_processor_support(monkeypatch):
    monkeypatch.setattr(convolution, "_onednn_call_works", lambda: True)
    monkeypatch.setattr(convolution, "_processor_flags", lambda: ["avx2", "avx512f"])
    assert convolution.has_onednn("float32")
    assert not convolution.has_onednn("bfloat16")
    monkeypatch.setattr(convolution, "_processor_flags", lambda: ["avx2", "avx512_bf16"])
    assert convolution.has_onednn("bfloat16")
    assert not convolution.has_onednn("float16")


def test_onednn_is_not_available_if_its_call_is_unknown_or_wrong(monkeypatch):
    def unknown_call(*arguments, **options):
        return jax.ffi.ffi_call("no such call", jax.ShapeDtypeStruct((2,), jnp.float32))(*arguments)

    monkeypatch.setattr(convolution, "onednn_convolution", unknown_call)
    assert not convolution._onednn_call_works.__wrapped__()
    monkeypatch.setattr(
        convolution,
        "onednn_convolution",
        lambda *a, **options: 0.9 * convolution.xla_convolution(*a, **options),
    )
    assert not convolution._onednn_call_works.__wrapped__()


# --- Flax layers in a user's model ---


class StandardizedConv(nn.Conv):
    """A subclass that standardises its kernel and calls `lax.conv_general_dilated` directly."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features))
        kernel = (kernel - kernel.mean()) / kernel.std()
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class ScaledConv(nn.Conv):
    """A subclass that doubles the outputs of its parent."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Twice(nn.Module):
    """A module that calls one layer twice."""

    def setup(self):
        self.conv = nn.Conv(3, (3, 3))

    def __call__(self, x):
        return self.conv(nn.relu(self.conv(x)))


# layers, and whether the kernels compute them
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


def make_apply(layer, implementation):
    """Return a function that applies a layer to variables and images."""

    def apply(variables, images):
        with use_kernels(implementation):
            return layer.apply(variables, images)

    return apply


def layer_inputs(name):
    """Return variables and images for a layer."""
    images = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    images = images[:, None] if name == "volumes" else images
    return jax.jit(LAYERS[name][0].init)(jax.random.key(1), images), images


@pytest.mark.parametrize("name", [name for name, (_, is_replaced) in LAYERS.items() if is_replaced])
def test_the_kernels_replace_a_layer_and_equal_flax(name):
    layer, inputs = LAYERS[name][0], layer_inputs(name)
    ours, expected = make_apply(layer, "xla"), make_apply(layer, "flax")
    assert "name=_convolve" in str(jax.make_jaxpr(ours)(*inputs))
    if name in ("remat", "jit", "twice"):  # Flax transforms these layers: compare gradients too
        ours, expected = (
            jax.value_and_grad(lambda *inputs, f=f: jnp.sum(jnp.sin(f(*inputs))), (0, 1))
            for f in (ours, expected)
        )
    for a, b in zip(*(jax.tree.leaves(jax.jit(f)(*inputs)) for f in (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert getattr(layer, "conv_general_dilated", None) is None


@pytest.mark.parametrize("name", [name for name, (_, is_replaced) in LAYERS.items() if not is_replaced])
def test_flax_computes_any_other_layer(name):
    inputs = jax.eval_shape(lambda: layer_inputs(name))
    jaxpr, expected = (
        jax.make_jaxpr(make_apply(LAYERS[name][0], implementation))(*inputs)
        for implementation in ("onednn", "flax")
    )
    assert str(jaxpr) == str(expected)
