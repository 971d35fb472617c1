"""The normalisation beside Flax's, with a shortcut and a rectifier after it; its gradient by a closed form."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax.models.fast_cpu.normalization import BatchNorm, batch_norm

SHAPE = (6, 4, 5, 3)


def arrays(dtype="float32"):
    """Inputs of unlike means, a shortcut, and weights of a loss."""
    keys = jax.random.split(jax.random.key(0), 3)
    images, shortcut, weights = (jax.random.normal(key, SHAPE) for key in keys)
    return [array.astype(dtype) for array in (2 * images + jnp.array([0.5, 3.0, -1.0]), shortcut, weights)]


class Flaxs(nn.Module):
    """`BatchNorm` put together from Flax's parts."""

    affine: bool
    relu: bool
    train: bool

    @nn.compact
    def __call__(self, inputs, shortcut=None):
        options = {"momentum": 0.8, "use_scale": self.affine, "use_bias": self.affine}
        outputs = nn.BatchNorm(use_running_average=not self.train, name="norm", **options)(inputs)
        outputs = outputs if shortcut is None else outputs + shortcut
        return nn.relu(outputs) if self.relu else outputs


class Ours(nn.Module):
    affine: bool
    relu: bool
    train: bool

    @nn.compact
    def __call__(self, inputs, shortcut=None):
        options = {"momentum": 0.8, "affine": self.affine, "relu": self.relu, "train": self.train}
        return BatchNorm(name="norm", **options)(inputs, shortcut)


def everything(model, variables, images, shortcut, weights):
    """Outputs, new statistics, the gradients of a loss by all it depends on, and those of their own square."""
    statistics, params = variables["batch_stats"], variables.get("params", {})

    def outputs(params, images, shortcut):
        of = {"params": params, "batch_stats": statistics}
        return model.apply(of, images, shortcut, mutable=["batch_stats"])

    def loss(arguments):
        return jnp.sum(jnp.sin(weights * outputs(*arguments)[0]))

    def of_gradients(arguments):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(loss)(arguments)))

    arguments = (params, images, shortcut)
    return outputs(*arguments), jax.grad(loss)(arguments), jax.grad(of_gradients)(arguments)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("affine", "relu", "alone"), [(False, True, True), (True, True, False), (True, False, True)]
)
def test_it_is_flaxs_with_what_follows(affine, relu, alone, train):
    images, shortcut, weights = arrays()
    shortcut = None if alone else shortcut
    flaxs, ours = (kind(affine, relu, train) for kind in (Flaxs, Ours))
    variables = flaxs.init(jax.random.key(0), images, shortcut)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), images, shortcut)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    draw = jax.random.uniform(jax.random.key(1), (3,), minval=0.5, maxval=1.5)
    variables = jax.tree.map(lambda leaf: leaf + draw, variables)
    results = (
        jax.jit(functools.partial(everything, model))(variables, images, shortcut, weights)
        for model in (ours, flaxs)
    )
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_the_gradient_by_the_inputs_is_that_of_the_paper():
    """Ioffe & Szegedy 2015, section 3, in double precision, where all is let through."""
    images, _, weights = (np.asarray(array, np.float64) for array in arrays())
    scale, epsilon = np.array([1.0, 2.0, 0.5]), 1e-5
    n = images.size / 3
    centred = images - images.mean((0, 1, 2))
    var = (centred**2).mean((0, 1, 2))
    of_hat = weights * scale
    of_var = (of_hat * centred).sum((0, 1, 2)) * -0.5 * (var + epsilon) ** -1.5
    of_mean = -of_hat.sum((0, 1, 2)) / np.sqrt(var + epsilon) + of_var * (-2 * centred).mean((0, 1, 2))
    expected = of_hat / np.sqrt(var + epsilon) + of_var * 2 * centred / n + of_mean / n

    def loss(images):
        outputs, *_ = batch_norm(images, None, jnp.asarray(scale, jnp.float32), jnp.zeros(3), None, False)
        return jnp.sum(outputs * weights.astype(np.float32))

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(images, jnp.float32)), expected, rtol=1e-3, atol=1e-5)


def test_half_precision_has_statistics_of_single_precision():
    images, shortcut, _ = arrays("bfloat16")
    outputs, mean, var = batch_norm(images, shortcut, jnp.ones(3), jnp.zeros(3), None, True)
    assert outputs.dtype == jnp.bfloat16
    exact = np.asarray(images, np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)
    gradients = jax.grad(lambda *a: batch_norm(*a, jnp.ones(3), jnp.zeros(3), None, True)[0].sum(), (0, 1))
    assert {leaf.dtype for leaf in gradients(images, shortcut)} == {jnp.dtype("bfloat16")}


def test_a_constant_channel_becomes_its_bias():
    images = jnp.full(SHAPE, 2.0)
    outputs, _, var = batch_norm(images, None, jnp.ones(3), jnp.array([0.0, 1.0, -1.0]), None, True)
    np.testing.assert_array_equal(var, 0)
    np.testing.assert_array_equal(outputs[..., 1], 1)
    np.testing.assert_array_equal(outputs[..., 2], 0)


def test_what_is_not_a_number_stays_so():
    """Or a training that diverges would not be found out."""
    images = arrays()[0].at[0, 0, 0, 0].set(jnp.nan)
    outputs, *_ = batch_norm(images, None, jnp.ones(3), jnp.zeros(3), None, True)
    assert jnp.isnan(outputs[..., 0]).all()
    assert not jnp.isnan(outputs[..., 1:]).any()
