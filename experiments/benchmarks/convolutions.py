"""Time the passes of convolutions in each form on a CPU: `python -m experiments.benchmark convolutions`."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.patches import patches_convolution
from imp_jax.models.fast_cpu import convolution
from imp_jax.runtime.compilation import jit_with_backend_options

SHAPES = (  # side, inputs, outputs and stride of the 3 × 3 convolutions of ResNet-20, and of Conv-4
    *((32, 3, 16, 1), (32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2), (8, 64, 64, 1)),
    *((32, 3, 64, 1), (32, 64, 64, 1), (16, 64, 128, 1), (16, 128, 128, 1)),
)
COLUMNS = (
    *("forward: XLA", "oneDNN"),
    *("input gradient: derived", "turned"),
    *("weight gradient: derived", "turned", "patches"),
)


def benchmark_convolutions(
    batch_size: int, repeats: int, shapes: Sequence[tuple[int, int, int, int]] = SHAPES
) -> None:
    """Time the forward pass, input gradient and weight gradient of each shape; print median milliseconds."""
    if convolution.has_onednn():
        convolution.disable_compilation_cache_writes()
    table = Table("layer", *COLUMNS, title=f"ms at batch {batch_size}")
    rng = np.random.default_rng(0)
    for side, inputs, outputs, stride in shapes:
        sizes = {
            "images": (batch_size, side, side, inputs),
            "kernel": (3, 3, inputs, outputs),
            "gradient": (batch_size, side // stride, side // stride, outputs),
        }
        arrays = {name: jax.numpy.asarray(rng.normal(size=size), "float32") for name, size in sizes.items()}
        geometry = {"strides": (stride, stride), "pads": ((1, 1), (1, 1))}
        operands = {name: arrays[name] for name in ("images", "kernel")}
        forms = [
            (_xla_convolution, operands),
            (convolution.onednn_convolution, operands) if convolution.has_onednn() else None,
            (functools.partial(_derived_gradient, _xla_convolution, 0), arrays),
            (_input_gradient, arrays),
            (functools.partial(_derived_gradient, _xla_convolution, 1), arrays),
            (_weight_gradient, arrays),
            (functools.partial(_derived_gradient, patches_convolution, 1), arrays),
        ]
        cells = [f"{time_compiled(*form, geometry, repeats):.1f}" if form else "" for form in forms]
        table.add_row(f"{side}², {inputs} to {outputs}, stride {stride}", *cells)
    Console(width=130).print(table)


def time_compiled(function: Callable, arrays: dict, geometry: dict, repeats: int) -> float:
    """Compile `function` on its own and return the median milliseconds of a call."""
    program, times = jit_with_backend_options(lambda arrays: function(**arrays, **geometry)), []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(arrays))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def _xla_convolution(images, kernel, strides, pads):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=layout)


def _derived_gradient(convolve, index, images, kernel, strides, pads, gradient):
    # XLA removes the computation of the other gradient, which is not returned
    _, pullback = jax.vjp(lambda *operands: convolve(*operands, strides, pads), images, kernel)
    return pullback(gradient)[index]


def _input_gradient(images, **others):
    return convolution.input_gradient(images.shape[1:3], **others)


def _weight_gradient(kernel, **others):
    return convolution.weight_gradient(lengths=kernel.shape[:2], **others)
