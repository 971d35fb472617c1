"""Two-dimensional convolutions that are fast on a CPU, and their gradients.

With the implementation "onednn", the forward pass and, at stride 1, the gradient with respect to the images
call oneDNN. XLA can execute these calls but never emits them itself. The other gradients are convolutions of
XLA, whose operands are put into XLA's preferred memory layout.
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
Pads = tuple[tuple[int, int], tuple[int, int]]  # padding (before, after) of rows and columns, in pixels

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@functools.cache
def conv_general_dilated_by(implementation: str) -> Callable[..., Array]:
    """Return the partial function `conv_general_dilated` with an implementation, "xla" or "onednn".

    The same object is returned every time, because `nn.jit` compiles again if a field of a module is another
    object.
    """
    return functools.partial(conv_general_dilated, implementation=implementation)


def replace_convolutions(function: Callable[..., Array]) -> contextlib.AbstractContextManager:
    """Return a context in which `nn.Conv` layers call `function` instead of `lax.conv_general_dilated`.

    A layer whose field `conv_general_dilated` is set is not changed.

    Args:
      function: a function with the signature of `lax.conv_general_dilated`.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Conv) or module.conv_general_dilated is not None:
            return call(*args, **kwargs)
        # a bound module is frozen, so object.__setattr__ is needed; clones made during the call copy the field
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
    """Compute `lax.conv_general_dilated`, as `nn.Conv` calls it, with the kernels of this module.

    `lax` computes dilated and grouped convolutions, and those of one or three dimensions.

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
    is_supported = images.dtype == kernel.dtype and _onednn_supports(images.dtype.name)
    if implementation == "onednn" and is_supported and min(itertools.chain(*pads)) >= 0:
        return onednn_convolution(images, kernel, strides, pads)
    # without the barrier, the XLA of JAX 0.12 fuses it with a following mean, which gives nan in bfloat16
    return lax.optimization_barrier(xla_convolution(images, kernel, strides, pads))


def _forward(images, kernel, strides, pads, implementation):
    images = lax.optimization_barrier(images)  # otherwise XLA recomputes this residual in the backward pass
    return _convolve(images, kernel, strides, pads, implementation), (images, kernel)


def _backward(strides, pads, implementation, residuals, gradient):
    images, kernel = residuals
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

    Inside a loop, XLA does not change the layout of operands, and is up to a hundred times slower if they have
    another layout (jax-ml/jax issue 12868). The barrier hides from XLA that an operand is a transpose, so that
    XLA must copy it.
    """
    if min(itertools.chain(*pads)) < 0:
        images, pads = _crop(images, pads, dilations.pop("lhs_dilation", (1, 1)))
    images, kernel = lax.optimization_barrier((images, kernel))
    return lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=_DIMENSIONS, **dilations)


def _crop(images, pads, dilation=(1, 1)):
    """Dilate images and apply the negative padding as a crop; return them and the remaining padding.

    This is needed because XLA on a CPU returns wrong convolutions for negative padding.
    """
    crops = [(min(low, 0), min(high, 0), d - 1) for (low, high), d in zip(pads, dilation, strict=True)]
    images = lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *crops, (0, 0, 0)))
    return images, tuple((max(low, 0), max(high, 0)) for low, high in pads)


def onednn_convolution(images: Images, kernel: Kernel, strides: Sequence[int], pads: Pads) -> Outputs:
    """Compute oneDNN's convolution with a custom call, which XLA for CPUs registers but never emits itself."""
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
    return _onednn_supports(dtype) and _onednn_call_works()


def _onednn_supports(dtype):
    # bfloat16 crashes the process on a processor without instructions for it
    return dtype == "float32" or (dtype == "bfloat16" and "avx512_bf16" in _processor_flags())


def disable_compilation_cache_writes() -> None:
    """Stop writing to JAX's persistent compilation cache, because XLA cannot serialise calls of oneDNN."""
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
    min_compile_time_s = jax.config.jax_persistent_cache_min_compile_time_secs
    disable_compilation_cache_writes()
    try:
        actual, expected = (
            jax.jit(functools.partial(function, **options)).lower(*arguments).compile()(*arguments)
            for function in (onednn_convolution, xla_convolution)
        )
    except (jax.errors.JaxRuntimeError, TypeError, ValueError):  # no such call, or another signature
        return False
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_time_s)
    return bool(np.allclose(actual, expected, atol=1e-4))


def input_gradient(
    sides: Sequence[int],
    kernel: Kernel,
    strides: Sequence[int],
    pads: Pads,
    gradient: Outputs,
    implementation: str = "xla",
) -> Images:
    """Return the gradient with respect to the images: a convolution of `gradient` with the rotated kernel.

    Args:
      sides: height and width of the images, in pixels.
      kernel: kernel of the convolution.
      strides: strides of the convolution.
      pads: padding of the convolution.
      gradient: gradient of the loss with respect to the outputs of the convolution.
      implementation: "xla" or "onednn". XLA is used in any case if a stride is not 1, or if the padding of this
        convolution would be negative.
    """
    rotated = kernel[::-1, ::-1].swapaxes(2, 3)
    gradient_pads = tuple(
        (length - 1 - low, side + low - 1 - (outputs - 1) * stride)
        for length, (low, _), side, outputs, stride in zip(
            kernel.shape, pads, sides, gradient.shape[1:], strides, strict=False
        )
    )
    if set(strides) == {1} and min(min(pair) for pair in gradient_pads) >= 0:
        return _convolve(gradient, rotated, (1, 1), gradient_pads, implementation)
    return xla_convolution(gradient, rotated, (1, 1), gradient_pads, lhs_dilation=strides)


def weight_gradient(
    images: Images, lengths: Sequence[int], strides: Sequence[int], pads: Pads, gradient: Outputs
) -> Kernel:
    """Return the gradient with respect to the kernel: a convolution that contracts over the batch.

    Args:
      images: inputs of the convolution.
      lengths: height and width of the kernel, in pixels.
      strides: strides of the convolution.
      pads: padding of the convolution.
      gradient: gradient of the loss with respect to the outputs of the convolution.
    """
    image_pads = tuple(
        (low, length - side - low + (outputs - 1) * stride)
        for length, (low, _), side, outputs, stride in zip(
            lengths, pads, images.shape[1:], gradient.shape[1:], strides, strict=False
        )
    )
    return xla_convolution(
        images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), (1, 1), image_pads, rhs_dilation=strides
    ).transpose(1, 2, 0, 3)
