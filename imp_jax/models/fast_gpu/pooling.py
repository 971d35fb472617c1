"""Max-pooling whose gradient is the same to the bit every time."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from imp_jax.models.layers import MaxPool

_MAX_POOL_CALL = MaxPool.__call__.__wrapped__  # without Flax's wrapper, which runs interceptors


def replace_max_pool(call: Any, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    """Compute a `MaxPool` of images with `max_pool`. This is an interceptor for `nn.intercept_methods`."""
    module = context.module
    x = args[0] if args else kwargs.get("x")
    if getattr(context.orig_method, "func", None) is not _MAX_POOL_CALL or x.ndim != 4:
        return call(*args, **kwargs)
    return max_pool(x, module.window_shape, module.strides or (1, 1), module.padding)


def max_pool(
    x: Float[Array, "batch height width channels"],
    window_shape: Sequence[int],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
) -> Float[Array, "batch height_out width_out channels"]:
    """Return the maximum of each window, as the maximum of shifted slices.

    The gradient of `nn.max_pool` is a scatter, which a GPU adds in any order. The gradients differ if the
    maximum of a window is not unique: this one is divided between the equal elements; that of `nn.max_pool`
    goes to one of them.

    Args:
      x: images.
      window_shape: height and width of the window, in pixels.
      strides: in pixels.
      padding: as in `nn.max_pool`.
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window_shape, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-math.inf)
    for axis, (length, stride) in enumerate(zip(window_shape, strides, strict=True), start=1):
        last = (x.shape[axis] - length) // stride * stride
        slices = [lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(length)]
        x = functools.reduce(jnp.maximum, slices)
    return x
