"""Fused batch normalisation, residual addition and ReLU, with a hand-written gradient.

The gradient needs only the inputs and the outputs (the ReLU was active where outputs are positive), which are
in memory anyway. The gradient that JAX derives also stores centred inputs and several products. Gradients are
in reverse mode only, and of any order.
"""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jaxtyping import Array, Float

from imp_jax.models import layers

Images = Float[Array, "batch height width channels"]
Channels = Float[Array, " channels"]

# the methods without Flax's wrapper, which runs interceptors
_FLAX_CALL = nn.BatchNorm.__call__.__wrapped__
_LAYERS_CALL = layers.BatchNorm.__call__.__wrapped__


def replace_batch_norm(
    call: Any, args: tuple, kwargs: dict[str, Any], context: Any, platform: str = "cpu"
) -> Any:
    """Compute `layers.BatchNorm` and `nn.BatchNorm` with `batch_norm`, unless it does not support an option.

    This is an interceptor for `nn.intercept_methods`.

    Args:
      platform: see `batch_norm`.
    """
    module, method = context.module, getattr(context.orig_method, "func", None)
    if method not in (_FLAX_CALL, _LAYERS_CALL):
        return call(*args, **kwargs)
    arguments = inspect.signature(method).bind(module, *args, **kwargs).arguments
    x, shortcut = arguments["x"], arguments.get("shortcut")
    running_average_flags = module.use_running_average, arguments.get("use_running_average")
    if (
        running_average_flags.count(None) != 1  # Flax raises an error
        or arguments.get("mask") is not None
        or not _is_supported(module, x)
        or not (shortcut is None or (shortcut.shape, shortcut.dtype) == (x.shape, x.dtype))
    ):
        return call(*args, **kwargs)
    (use_running_average,) = (flag for flag in running_average_flags if flag is not None)
    relu = method is _LAYERS_CALL and module.relu
    return _apply(module, x, shortcut, use_running_average, relu, platform)


def _is_supported(module, x):
    """Return whether `batch_norm` computes what this `nn.BatchNorm` computes."""
    affine = [jnp.float32(1)] * (module.use_scale or module.use_bias)
    dtype = canonicalize_dtype(x, *affine, dtype=module.dtype)
    return (
        x.ndim == 4
        and module.axis in (-1, 3)
        and x.dtype == dtype  # Flax computes statistics before it casts x
        and jnp.issubdtype(dtype, jnp.floating)
        and jnp.finfo(dtype).bits <= 32
        and jnp.dtype(module.param_dtype) == jnp.float32
        and module.axis_index_groups is None
        and module.use_fast_variance
        and module.force_float32_reductions
    )


def _apply(module, x, shortcut, use_running_average, relu, platform):
    """Apply `batch_norm` with the variables of a module, which are created and updated as in Flax."""
    shape = x.shape[-1:]
    running_mean = module.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
    running_var = module.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
    gamma, beta = jnp.ones(shape), jnp.zeros(shape)
    if module.use_scale:
        gamma = module.param("scale", module.scale_init, shape, jnp.float32)
    if module.use_bias:
        beta = module.param("bias", module.bias_init, shape, jnp.float32)
    if use_running_average:
        statistics = running_mean.value, running_var.value
        return _normalize(x, shortcut, gamma, beta, *statistics, relu, module.epsilon)
    axis_name = None if module.is_initializing() else module.axis_name
    y, mean, var = batch_norm(x, shortcut, gamma, beta, axis_name, relu, module.epsilon, platform)
    if not module.is_initializing():
        for running, batch in ((running_mean, mean), (running_var, var)):
            running.value = module.momentum * running.value + (1 - module.momentum) * batch
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def batch_norm(
    x: Images,
    shortcut: Images | None,
    gamma: Channels,
    beta: Channels,
    axis_name: str | None,
    relu: bool,
    epsilon: float = 1e-5,
    platform: str = "cpu",
) -> tuple[Images, Channels, Channels]:
    """Normalise a batch by its own statistics, add a shortcut and apply a ReLU.

    y = relu(γ x̂ + β + shortcut), with x̂ = (x − mean) / √(var + ε) in each channel (Ioffe & Szegedy 2015,
    algorithm 1). Sums are computed in float32.

    Args:
      x: inputs, floating-point with at most 32 bits.
      shortcut: residual connection of the type of `x`, or None.
      gamma: scale γ.
      beta: offset β.
      axis_name: mesh axis over which the statistics are averaged; None: no averaging.
      relu: whether to apply the ReLU.
      epsilon: ε, added to the variance.
      platform: "cpu" or "gpu". On a CPU, XLA is kept from computing images twice; on a GPU, two sums over the
        same images are one reduction.

    Returns:
      y in the type of `x`, and the mean and the (biased) variance of each channel.
    """
    mean, mean_square = _pmean(axis_name, *_means(x, x, platform))
    var = jnp.maximum(mean_square - mean**2, 0)
    return _normalize(x, shortcut, gamma, beta, mean, var, relu, epsilon), mean, var


def _forward(x, shortcut, gamma, beta, axis_name, relu, epsilon, platform):
    y, mean, var = batch_norm(x, shortcut, gamma, beta, axis_name, relu, epsilon, platform)
    y = _materialize(y, platform)
    return (y, mean, var), (x, shortcut is not None, gamma, mean, var, y)


def _backward(axis_name, relu, epsilon, platform, residuals, cotangents):
    """Return the gradients of x, shortcut, γ and β (Ioffe & Szegedy 2015, section 3).

    dL/dx = γ / √(var + ε) · (dy − mean(dy) − x̂ mean(dy x̂)), where dy is the gradient with respect to the input
    of the ReLU. Terms of the cotangents of mean and variance are added, which are not zero if this gradient is
    differentiated again.
    """
    x, has_shortcut, gamma, mean, var, y = residuals
    dy, d_mean, d_var = cotangents
    if relu:
        dy = _materialize(jnp.where(y > 0, dy, 0), platform)
    size = x.size // x.shape[-1]
    inv_std = lax.rsqrt(var + epsilon)
    mean_dy, mean_dy_x = _means(dy, x, platform)
    mean_dy_x_hat = inv_std * (mean_dy_x - mean * mean_dy)
    d_gamma, d_beta = size * mean_dy_x_hat, size * mean_dy
    mean_dy_x_hat, mean_dy, d_mean, d_var = _pmean(
        axis_name, mean_dy_x_hat, mean_dy, d_mean / size, d_var / size
    )
    # the coefficients of each channel are computed first, so that dx needs a single pass over the images
    dy_factor = gamma * inv_std
    offset = d_mean - dy_factor * mean_dy
    x_factor = 2 * d_var - dy_factor * inv_std * mean_dy_x_hat
    dx = dy_factor * dy + x_factor * (x - mean) + offset
    return dx.astype(x.dtype), dy if has_shortcut else None, d_gamma, d_beta


batch_norm.defvjp(_forward, _backward)


def _means(x: Images, y: Images, platform: str) -> tuple[Channels, Channels]:
    """Return the means of x and of x · y over all axes but the last, computed in float32."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    if platform == "cpu":
        return jnp.mean(x, (0, 1, 2)), jnp.mean(x * y, (0, 1, 2))
    size = x.size // x.shape[-1]
    sums = _sum_both(x, x * y)
    return sums[0] / size, sums[1] / size


@jax.custom_vjp
def _sum_both(x, y):
    """Sum two arrays over all axes but the last in one reduction, which JAX cannot differentiate."""
    zero = jnp.zeros((), x.dtype)
    add_both = lambda sums, values: (sums[0] + values[0], sums[1] + values[1])  # noqa: E731
    return lax.reduce((x, y), (zero, zero), add_both, (0, 1, 2))


def _broadcast_both(shape, gradients):
    return tuple(jnp.broadcast_to(gradient, shape) for gradient in gradients)


_sum_both.defvjp(lambda x, y: (_sum_both(x, y), x.shape), _broadcast_both)


def _pmean(axis_name, *values):
    return lax.pmean(values, axis_name) if axis_name else values


def _materialize(images, platform):
    """On a CPU, prevent XLA from recomputing the images for each operation that uses them."""
    return lax.optimization_barrier(images) if platform == "cpu" else images


def _normalize(x, shortcut, gamma, beta, mean, var, relu, epsilon):
    y = (x - mean) * (lax.rsqrt(var + epsilon) * gamma) + beta
    if shortcut is not None:
        y += shortcut
    return (nn.relu(y) if relu else y).astype(x.dtype)
