"""Fast convolutions on a CPU, put under the `nn.Conv` layers of any model from outside.

The forward pass and the input gradient of stride 1 are calls of oneDNN where XLA was built with it (no pass of
XLA makes them). The gradients are convolutions written out, for arrays that lie as XLA's own wants them.
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
Outputs = Float[Array, "batch height/stride width/stride outputs"]
Kernel = Float[Array, "rows columns inputs outputs"]
Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after the rows and the columns

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def use_convolutions(implementation: str) -> contextlib.AbstractContextManager:
    """Compute the `nn.Conv` layers of every model that is applied in this context by other kernels.

    A layer that has a `conv_general_dilated` of its own keeps it. Outputs and gradients are those of Flax up to
    the order of their sums; gradients are in reverse mode only, of any order.

    Args:
      implementation: `onednn` or `xla`, this module's forms for a CPU with the forward pass of that library;
        `flax` changes nothing.
    """
    if implementation == "flax":
        return contextlib.nullcontext()
    return replace_convolutions(conv_general_dilated_by(implementation))


@functools.cache
def conv_general_dilated_by(implementation):
    """One object for each: what Flax compiles for a module depends on the identity of its fields."""
    return functools.partial(conv_general_dilated, implementation=implementation)


def replace_convolutions(function: Callable[..., Outputs]) -> contextlib.AbstractContextManager:
    """Have the `nn.Conv` layers of every model that is applied in this context call `function`.

    Args:
      function: takes what `lax.conv_general_dilated` takes.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Conv) or module.conv_general_dilated is not None:
            return call(*args, **kwargs)
        # Flax reads the field when the layer is called; a bound module is frozen, and its clones keep the field
        object.__setattr__(module, "conv_general_dilated", function)
        try:
            return call(*args, **kwargs)
        finally:
            object.__setattr__(module, "conv_general_dilated", None)

    return nn.intercept_methods(intercept)


def conv_general_dilated(
    images: Images,
    kernel: Kernel,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    implementation: str = "xla",
    **options: Any,
) -> Outputs:
    """`lax.conv_general_dilated` as `nn.Conv` calls it, in the forms for a CPU where it has two dimensions.

    Dilated and grouped convolutions, and those of one or three dimensions, are left to `lax`.
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
    # XLA of JAX 0.12 fuses it with a mean that follows, and in bfloat16 gives nan
    return lax.optimization_barrier(xla_convolution(images, kernel, strides, pads))


def _forward(images, kernel, strides, pads, implementation):
    images = lax.optimization_barrier(images)  # kept for the gradient, which would compute them again
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
    """XLA's own convolution, of images and a kernel that lie in memory as it wants them.

    In a loop it takes them as they come, and is many times slower where they lie otherwise (jax-ml/jax issue
    12868): the barrier keeps it from seeing how they lay before they were turned.
    """
    if min(itertools.chain(*pads)) < 0:
        images, pads = _crop(images, pads, dilations.pop("lhs_dilation", (1, 1)))
    images, kernel = lax.optimization_barrier((images, kernel))
    return lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=_DIMENSIONS, **dilations)


def _crop(images, pads, dilation=(1, 1)):
    """Dilate and crop images where padding is negative; return them, and what is left to pad.

    XLA on a CPU crops wrongly inside of a convolution.
    """
    crops = [(min(low, 0), min(high, 0), d - 1) for (low, high), d in zip(pads, dilation, strict=True)]
    images = lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *crops, (0, 0, 0)))
    return images, tuple((max(low, 0), max(high, 0)) for low, high in pads)


def onednn_convolution(images: Images, kernel: Kernel, strides: Sequence[int], pads: Pads) -> Outputs:
    """oneDNN's convolution, by the call that XLA for CPUs knows and no pass of it makes."""
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
    """Return whether this build of XLA has a working oneDNN convolution for this dtype."""
    return _suits_onednn(dtype) and _onednn_call_works()


def _suits_onednn(dtype):
    # in bfloat16 a processor without its instructions would end the process
    return dtype == "float32" or (dtype == "bfloat16" and "avx512_bf16" in _processor_flags())


def disable_compilation_cache_writes() -> None:
    """Keep what is compiled from now on out of JAX's compilation cache: XLA cannot serialise oneDNN's calls."""
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
    draw = np.random.default_rng(0)
    images, kernel = draw.normal(size=(2, 5, 6, 3)), draw.normal(size=(3, 2, 3, 4))
    arguments = [array.astype(np.float32) for array in (images, kernel)]
    options = {"strides": (2, 1), "pads": ((1, 0), (1, 1))}
    written = jax.config.jax_persistent_cache_min_compile_time_secs
    disable_compilation_cache_writes()
    try:
        called, expected = (
            jax.jit(functools.partial(function, **options)).lower(*arguments).compile()(*arguments)
            for function in (onednn_convolution, xla_convolution)
        )
    except (jax.errors.JaxRuntimeError, TypeError, ValueError):  # another version's call, or none
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
    """The gradient by the images, of such sides: a convolution of `gradient` with the kernel turned by 180°."""
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    around = tuple(
        (length - 1 - low, side + low - 1 - (outputs - 1) * stride)
        for length, (low, _), side, outputs, stride in zip(
            kernel.shape, pads, sides, gradient.shape[1:], strides, strict=False
        )
    )
    if set(strides) == {1} and min(min(pair) for pair in around) >= 0:
        return _convolve(gradient, turned, (1, 1), around, implementation)
    return xla_convolution(gradient, turned, (1, 1), around, lhs_dilation=strides)


def weight_gradient(
    images: Images, lengths: Sequence[int], strides: Sequence[int], pads: Pads, gradient: Outputs
) -> Kernel:
    """The gradient by the kernel, of such lengths: a convolution whose features are the images of the batch."""
    around = tuple(
        (low, length - side - low + (outputs - 1) * stride)
        for length, (low, _), side, outputs, stride in zip(
            lengths, pads, images.shape[1:], gradient.shape[1:], strides, strict=False
        )
    )
    return xla_convolution(
        images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), (1, 1), around, rhs_dilation=strides
    ).transpose(1, 2, 0, 3)
