"""Batch normalisation with what follows it, a shortcut and a rectifier, in few passes over memory.

The function is that of `flax.linen.BatchNorm`, an addition and `nn.relu`. Its gradient is its own: it reads the
inputs, and the outputs, which say where the rectifier was open and are kept in any case; what JAX derives from
the parts writes and reads centred inputs and products besides.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

EPSILON = 1e-5  # added to the variance

Images = Float[Array, "batch height width channels"]
Channels = Float[Array, " channels"]


class BatchNorm(nn.Module):
    """relu(normalised inputs + shortcut), by the statistics of a batch in training and by running ones else.

    Its variables are those of `flax.linen.BatchNorm`.
    """

    affine: bool = False  # learnable scale and bias
    momentum: float = 0.9  # of the running statistics
    axis: str | None = None  # of a mesh, over whose devices statistics are taken
    train: bool = False  # by the statistics of the batch, which the running ones follow
    relu: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Images, shortcut: Images | None = None) -> Images:
        shape = inputs.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale, bias = jnp.ones(shape), jnp.zeros(shape)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        inputs = inputs.astype(self.dtype)
        if not self.train:
            statistics = running_mean.value, running_var.value
            return _normalized(inputs, shortcut, scale, bias, *statistics, self.relu)
        axis = None if self.is_initializing() else self.axis
        outputs, mean, var = batch_norm(inputs, shortcut, scale, bias, axis, self.relu)
        if not self.is_initializing():
            for running, now in ((running_mean, mean), (running_var, var)):
                running.value = self.momentum * running.value + (1 - self.momentum) * now
        return outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def batch_norm(
    inputs: Images, shortcut: Images | None, scale: Channels, bias: Channels, axis: str | None, relu: bool
) -> tuple[Images, Channels, Channels]:
    """scale x̂ + bias + shortcut, rectified; and mean and variance (biased) of the batch, for the running ones.

    x̂ = (x − mean) / √(var + ε), of each channel (Ioffe & Szegedy 2015, algorithm 1). It can be differentiated
    in reverse only, again and again.

    Args:
      shortcut: of the same type as the inputs, or None.
      axis: of a mesh, over whose devices the statistics are taken.
    """
    mean, square = _pmean(axis, _mean(inputs), _mean(inputs, inputs))
    var = jnp.maximum(square - mean**2, 0)
    return _normalized(inputs, shortcut, scale, bias, mean, var, relu), mean, var


def _forward(inputs, shortcut, scale, bias, axis, relu):
    outputs, mean, var = batch_norm(inputs, shortcut, scale, bias, axis, relu)
    outputs = _kept(outputs)
    return (outputs, mean, var), (inputs, shortcut is None, scale, mean, var, outputs)


def _backward(axis, relu, kept, gradients):
    """For the inputs scale / √(var + ε) · (g − mean(g) − x̂ mean(g x̂)), where g passes the rectifier.

    What comes for mean and variance, as in a gradient of this one, is added.
    """
    inputs, alone, scale, mean, var, outputs = kept
    gradient, of_mean, of_var = gradients
    if relu:
        gradient = _kept(jnp.where(outputs > 0, gradient, 0))
    images = inputs.size // inputs.shape[-1]
    root = lax.rsqrt(var + EPSILON)
    of_bias = _mean(gradient)
    of_scale = root * (_mean(gradient, inputs) - mean * of_bias)
    to_scale, to_bias = images * of_scale, images * of_bias
    of_scale, of_bias, of_mean, of_var = _pmean(axis, of_scale, of_bias, of_mean / images, of_var / images)
    # what a channel has in common comes first: the rest is one pass over the images
    slope = scale * root
    shift, tilt = of_mean - slope * of_bias, 2 * of_var - slope * root * of_scale
    of_inputs = slope * gradient + tilt * (inputs - mean) + shift
    return of_inputs.astype(inputs.dtype), None if alone else gradient, to_scale, to_bias


batch_norm.defvjp(_forward, _backward)


def _mean(*factors: Images) -> Channels:
    """Of the product of `factors`, in single precision."""
    return jnp.mean(math.prod(factor.astype(jnp.float32) for factor in factors), (0, 1, 2))


def _pmean(axis, *values):
    return lax.pmean(values, axis) if axis else values


def _kept(images):
    """On a CPU XLA would compute them again for each who reads them."""
    return lax.optimization_barrier(images) if jax.default_backend() == "cpu" else images


def _normalized(inputs, shortcut, scale, bias, mean, var, relu):
    outputs = (inputs - mean) * (lax.rsqrt(var + EPSILON) * scale) + bias
    if shortcut is not None:
        outputs += shortcut
    return (nn.relu(outputs) if relu else outputs).astype(inputs.dtype)
