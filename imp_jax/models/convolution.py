"""The convolution of the models: that of `jax.lax`, and on a CPU the fastest form there of each of its parts.

The forward pass and the input gradient of stride 1 are calls of oneDNN where XLA was built with it (no pass of
XLA makes them). The gradients are convolutions written out, for arrays that lie as XLA's own wants them.
"""

import contextlib
import functools
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Images = Float[Array, "batch height width inputs"]
Outputs = Float[Array, "batch height/stride width/stride outputs"]
Kernel = Float[Array, "rows columns inputs outputs"]
Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after the rows and the columns

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    images: Images,
    kernel: Kernel,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Outputs:
    """`lax.conv_general_dilated` for `nn.Conv`, the same up to the order of its sums.

    On a CPU it can be differentiated in reverse only, again and again.
    """
    plain = options.get("feature_group_count", 1) == 1 and all(
        set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation")
    )
    if jax.default_backend() != "cpu" or not plain:
        return lax.conv_general_dilated(images, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    return _convolve(images, kernel, tuple(strides), tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(images, kernel, strides, pads):
    if images.dtype == kernel.dtype and has_onednn(images.dtype.name):
        return by_onednn(images, kernel, strides, pads)
    # XLA of JAX 0.12 fuses it with a mean that follows, and in bfloat16 gives nan
    return lax.optimization_barrier(by_xla(images, kernel, strides, pads))


def _forward(images, kernel, strides, pads):
    images = lax.optimization_barrier(images)  # kept for the gradient, which would compute them again
    return _convolve(images, kernel, strides, pads), (images, kernel)


def _backward(strides, pads, arguments, gradient):
    images, kernel = arguments
    gradient = lax.optimization_barrier(gradient)
    return (
        input_gradient(images.shape[1:3], kernel, strides, pads, gradient),
        weight_gradient(images, kernel.shape[:2], strides, pads, gradient),
    )


_convolve.defvjp(_forward, _backward)


def by_xla(
    images: Images, kernel: Kernel, strides: Sequence[int], pads: Pads, **dilations: Sequence[int]
) -> Outputs:
    """XLA's own convolution, of images and a kernel that lie in memory as it wants them.

    In a loop it takes them as they come, and is many times slower where they lie otherwise (jax-ml/jax issue
    12868): the barrier keeps it from seeing how they lay before they were turned.
    """
    images, kernel = lax.optimization_barrier((images, kernel))
    return lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=_DIMENSIONS, **dilations)


def by_onednn(images: Images, kernel: Kernel, strides: Sequence[int], pads: Pads) -> Outputs:
    """oneDNN's convolution, by the call that XLA for CPUs knows and no pass of it makes."""
    sides = [
        (size + sum(pad) - rows) // stride + 1
        for size, pad, rows, stride in zip(images.shape[1:3], pads, kernel.shape, strides, strict=False)
    ]
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
    """Whether this XLA has that call, rightly, and programs are not kept on disk: XLA cannot write it there."""
    # in bfloat16 a processor without its instructions would end the process
    suits = dtype == "float32" or (dtype == "bfloat16" and "avx512_bf16" in _processor_flags())
    return suits and jax.config.jax_compilation_cache_dir is None and _knows_onednn()


@functools.cache
def _processor_flags():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("flags")).split()
    return []


@functools.cache
def _knows_onednn():
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    draw = np.random.default_rng(0)
    images, kernel = draw.normal(size=(2, 5, 6, 3)), draw.normal(size=(3, 2, 3, 4))
    arguments = [array.astype(np.float32) for array in (images, kernel)]
    options = {"strides": (2, 1), "pads": ((1, 0), (1, 1))}
    try:
        called, expected = (
            jax.jit(functools.partial(function, **options)).lower(*arguments).compile()(*arguments)
            for function in (by_onednn, by_xla)
        )
    except (jax.errors.JaxRuntimeError, TypeError, ValueError):  # another version's call, or none
        return False
    return bool(np.allclose(called, expected, atol=1e-4))


def input_gradient(
    sides: Sequence[int], kernel: Kernel, strides: Sequence[int], pads: Pads, gradient: Outputs
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
        return _convolve(gradient, turned, (1, 1), around)
    return by_xla(gradient, turned, (1, 1), around, lhs_dilation=strides)


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
    return by_xla(
        images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), (1, 1), around, rhs_dilation=strides
    ).transpose(1, 2, 0, 3)
