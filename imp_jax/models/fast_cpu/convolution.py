"""Two-dimensional convolutions that are fast on a CPU, and their gradients.

The forward pass and the gradient by the images at stride 1 call oneDNN, if XLA was built with it; XLA itself
never emits these calls. The other gradients are written as convolutions of operands in XLA's preferred memory
layout.
"""

import contextlib
import functools
import itertools
import json
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Images = Float[Array, "batch height width inputs"]
Outputs = Float[Array, "batch height_out width_out outputs"]
Kernel = Float[Array, "rows columns inputs outputs"]
Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after the rows and the columns, in pixels

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@functools.cache
def conv_general_dilated_by(implementation: str) -> Callable[..., Array]:
    """Return `conv_general_dilated` with an implementation, "xla" or "onednn".

    The same object is returned every time, because Flax caches what `nn.jit` compiles by the identity of the
    fields of a module.
    """
    return functools.partial(conv_general_dilated, implementation=implementation)


def replace_convolutions(function: Callable[..., Array]) -> contextlib.AbstractContextManager:
    """Return a context in which `nn.Conv` layers call `function` in place of `lax.conv_general_dilated`.

    A layer that has a `conv_general_dilated` of its own keeps it.

    Args:
      function: has the signature of `lax.conv_general_dilated`.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Conv) or module.conv_general_dilated is not None:
            return call(*args, **kwargs)
        # set by object.__setattr__ since a bound module is frozen; clones made during the call keep the field
        object.__setattr__(module, "conv_general_dilated", function)
        try:
            return call(*args, **kwargs)
        finally:
            object.__setattr__(module, "conv_general_dilated", None)

    return nn.intercept_methods(intercept)


def conv_general_dilated(
    images: Float[Array, "batch *sides inputs"],
    kernel: Float[Array, "*lengths inputs_of_group outputs"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    implementation: str = "xla",
    **options: Any,
) -> Float[Array, "batch *sides_out outputs"]:
    """Compute `lax.conv_general_dilated`, as `nn.Conv` calls it, by the kernels of this module.

    Dilated and grouped convolutions, and those of one or three dimensions, are left to `lax`.

    Args:
      images: in the layout NHWC.
      kernel: in the layout HWIO.
      strides: in pixels.
      padding: as in `lax.conv_general_dilated`.
      implementation: "xla" or "onednn", the library of the forward pass.
      options: the other arguments of `lax.conv_general_dilated`.
    """
    plain = options.get("feature_group_count", 1) == 1 and all(
        set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation")
    )
    if images.ndim != 4 or not plain:
        return lax.conv_general_dilated(images, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple(map(tuple, padding))
    if min(itertools.chain(*pads)) < 0:
        images, pads = _crop(images, pads)
    sides = _output_sides(images, kernel, strides, pads)
    if min(len(images), *sides) < 1:
        return lax.conv_general_dilated(images, kernel, strides, pads, **options)
    return _convolve(images, kernel, tuple(strides), pads, implementation)


def _output_sides(images, kernel, strides, pads):
    return [
        (size + sum(pad) - length) // stride + 1
        for size, pad, length, stride in zip(images.shape[1:3], pads, kernel.shape, strides, strict=False)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(images, kernel, strides, pads, implementation):
    suits = images.dtype == kernel.dtype and _suits_onednn(images.dtype.name)
    if implementation == "onednn" and suits and min(itertools.chain(*pads)) >= 0:
        return onednn_convolution(images, kernel, strides, pads)
    # the barrier keeps the XLA of JAX 0.12 from fusing it with a mean that follows, which gives nan in bfloat16
    return lax.optimization_barrier(xla_convolution(images, kernel, strides, pads))


def _forward(images, kernel, strides, pads, implementation):
    images = lax.optimization_barrier(images)  # residuals, which XLA would recompute in the backward pass
    return _convolve(images, kernel, strides, pads, implementation), (images, kernel)


def _backward(strides, pads, implementation, arguments, gradient):
    images, kernel = arguments
    gradient = lax.optimization_barrier(gradient)
    return (
        input_gradient(images.shape[1:3], kernel, strides, pads, gradient, implementation),
        weight_gradient(images, kernel.shape[:2], strides, pads, gradient),
    )


_convolve.defvjp(_forward, _backward)


def xla_convolution(
    images: Images, kernel: Kernel, strides: Sequence[int], pads: Pads, **dilations: Sequence[int]
) -> Outputs:
    """Compute XLA's convolution of operands that are forced into its preferred memory layout.

    Inside a loop XLA does not change the layout of operands, and is up to a hundred times slower if they come
    in another one (jax-ml/jax issue 12868). The barrier hides from XLA that they are transposed, and so forces
    the copy.
    """
    if min(itertools.chain(*pads)) < 0:
        images, pads = _crop(images, pads, dilations.pop("lhs_dilation", (1, 1)))
    images, kernel = lax.optimization_barrier((images, kernel))
    return lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=_DIMENSIONS, **dilations)


def _crop(images, pads, dilation=(1, 1)):
    """Dilate images and crop them where padding is negative; return them and the remaining padding.

    XLA on a CPU computes convolutions with negative padding wrongly.
    """
    crops = [(min(low, 0), min(high, 0), d - 1) for (low, high), d in zip(pads, dilation, strict=True)]
    images = lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *crops, (0, 0, 0)))
    return images, tuple((max(low, 0), max(high, 0)) for low, high in pads)


def onednn_convolution(images: Images, kernel: Kernel, strides: Sequence[int], pads: Pads) -> Outputs:
    """Compute oneDNN's convolution, by a custom call that XLA for CPUs registers but never emits itself."""
    sides = _output_sides(images, kernel, strides, pads)
    layout = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    config = {
        "dims": 4,
        "feature_groups": 1,
        "input": layout,
        "kernel": {"filter": {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": [0, 1]}},
        "output": layout,
        "window": {
            "pad_left": [low for low, _ in pads],
            "pad_right": [high for _, high in pads],
            "strides": list(strides),
            "window_dilations": [1, 1],
        },
    }
    return jax.ffi.ffi_call(
        "__onednn$convolution",
        jax.ShapeDtypeStruct((len(images), *sides, kernel.shape[3]), images.dtype),
        vmap_method="sequential_unrolled",
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )(images, kernel)


def has_onednn(dtype: str = "float32") -> bool:
    """Return whether this build of XLA and this processor have a working oneDNN convolution for a dtype."""
    return _suits_onednn(dtype) and _onednn_call_works()


def _suits_onednn(dtype):
    # bfloat16 on a processor without instructions for it crashes the process
    return dtype == "float32" or (dtype == "bfloat16" and "avx512_bf16" in _processor_flags())


def disable_compilation_cache_writes() -> None:
    """Stop writing to JAX's persistent compilation cache, since XLA cannot serialize calls of oneDNN."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)


@functools.cache
def _processor_flags():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("flags")).split()
    return []


@functools.cache
def _onednn_call_works():
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, 5, 6, 3)), rng.normal(size=(3, 2, 3, 4))
    arguments = [array.astype(np.float32) for array in (images, kernel)]
    options = {"strides": (2, 1), "pads": ((1, 0), (1, 1))}
    written = jax.config.jax_persistent_cache_min_compile_time_secs
    disable_compilation_cache_writes()
    try:
        called, expected = (
            jax.jit(functools.partial(function, **options)).lower(*arguments).compile()(*arguments)
            for function in (onednn_convolution, xla_convolution)
        )
    except (jax.errors.JaxRuntimeError, TypeError, ValueError):  # no such call, or one with another signature
        return False
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", written)
    return bool(np.allclose(called, expected, atol=1e-4))


def input_gradient(
    sides: Sequence[int],
    kernel: Kernel,
    strides: Sequence[int],
    pads: Pads,
    gradient: Outputs,
    implementation: str = "xla",
) -> Images:
    """Return the gradient of a loss by the images: a convolution of `gradient` with the rotated kernel.

    Args:
      sides: height and width of the images, in pixels.
      kernel: kernel of the convolution; it is rotated by 180°.
      strides: strides of the convolution.
      pads: padding of the convolution.
      gradient: gradient of the loss by the outputs of the convolution.
      implementation: "xla" or "onednn", used where strides are 1.
    """
    rotated = kernel[::-1, ::-1].swapaxes(2, 3)
    around = tuple(
        (length - 1 - low, side + low - 1 - (outputs - 1) * stride)
        for length, (low, _), side, outputs, stride in zip(
            kernel.shape, pads, sides, gradient.shape[1:], strides, strict=False
        )
    )
    if set(strides) == {1} and min(min(pair) for pair in around) >= 0:
        return _convolve(gradient, rotated, (1, 1), around, implementation)
    return xla_convolution(gradient, rotated, (1, 1), around, lhs_dilation=strides)


def weight_gradient(
    images: Images, lengths: Sequence[int], strides: Sequence[int], pads: Pads, gradient: Outputs
) -> Kernel:
    """Return the gradient of a loss by the kernel: a convolution that contracts over the images of the batch.

    Args:
      images: inputs of the convolution.
      lengths: height and width of the kernel, in pixels.
      strides: strides of the convolution.
      pads: padding of the convolution.
      gradient: gradient of the loss by the outputs of the convolution.
    """
    around = tuple(
        (low, length - side - low + (outputs - 1) * stride)
        for length, (low, _), side, outputs, stride in zip(
            lengths, pads, images.shape[1:], gradient.shape[1:], strides, strict=False
        )
    )
    return xla_convolution(
        images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), (1, 1), around, rhs_dilation=strides
    ).transpose(1, 2, 0, 3)
