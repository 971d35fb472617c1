"""`MaxPool` and the kernel `max_pool`, compared with `nn.max_pool`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax.models.fast_cpu import use_kernels
from imp_jax.models.fast_cpu.pooling import max_pool
from imp_jax.models.layers import MaxPool


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 3)])
def test_max_pool_and_its_gradient_equal_those_of_flax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    weights = jax.random.normal(jax.random.key(1), nn.max_pool(x, (2, 2), (2, 2)).shape)
    np.testing.assert_array_equal(max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))
    gradient = jax.grad(lambda x: jnp.sum(weights * max_pool(x)))(x)
    expected = jax.grad(lambda x: jnp.sum(weights * nn.max_pool(x, (2, 2), (2, 2))))(x)
    np.testing.assert_array_equal(gradient, expected)


def trace(layer, kernels, x):
    """Return the jaxpr of a layer as text."""
    with use_kernels(kernels):
        return str(jax.make_jaxpr(lambda x: layer.apply({}, x))(x))


@pytest.mark.parametrize("kernels", ["flax", "xla", "onednn"])
@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({"window_shape": (2, 2), "strides": (2, 2)}, True),
        ({"window_shape": (2, 2), "strides": (2, 2), "padding": "SAME"}, False),
        ({"window_shape": (2, 2)}, False),
        ({"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}, False),
    ],
)
def test_the_layer_equals_nn_max_pool(options, replaced, kernels):
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    layer = MaxPool(**options)
    with use_kernels(kernels):
        np.testing.assert_array_equal(layer.apply({}, x), nn.max_pool(x, **options))
        np.testing.assert_array_equal(layer.apply({}, x=x), nn.max_pool(x, **options))
        assert layer.init(jax.random.key(0), x) == {}
    assert ("reduce_window_max" not in trace(layer, kernels, x)) == (replaced and kernels != "flax")


def test_images_without_a_batch_axis_are_pooled_by_flax():
    x = jax.random.normal(jax.random.key(0), (6, 6, 3))
    layer = MaxPool((2, 2), strides=(2, 2))
    assert trace(layer, "xla", x) == trace(layer, "flax", x)


def test_equal_elements_share_the_gradient_only_with_the_kernels():
    x = jnp.ones((1, 2, 2, 1))
    gradient = jax.grad(lambda x: jnp.sum(MaxPool((2, 2), strides=(2, 2)).apply({}, x)))
    np.testing.assert_array_equal(gradient(x)[0, ..., 0], [[1, 0], [0, 0]])
    with use_kernels("xla"):
        np.testing.assert_array_equal(gradient(x)[0, ..., 0], [[0.25, 0.25], [0.25, 0.25]])
