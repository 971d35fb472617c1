"""The parts of convolutions in all forms on a CPU, timed: `python -m experiments.benchmark convolutions`."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

SHAPES = (  # side, inputs, outputs and stride of the 3 × 3 convolutions of ResNet-20, and of Conv-4
    *((32, 3, 16, 1), (32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2), (8, 64, 64, 1)),
    *((32, 3, 64, 1), (32, 64, 64, 1), (16, 64, 128, 1), (16, 128, 128, 1)),
)


def benchmark(batch_size: int, repeats: int, shapes: Sequence[tuple[int, int, int, int]] = SHAPES) -> None:
    """Time forward pass, input gradient and weight gradient of each shape alone; print median milliseconds."""
    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from experiments.benchmarks.steps import by_patches
    from imp_jax.models.fast_cpu import convolution

    def as_derived(convolve, index, images, kernel, strides, pads, gradient):
        # the other of the two is not computed: no output of the program
        return jax.vjp(lambda *both: convolve(*both, strides, pads), images, kernel)[1](gradient)[index]

    def input_gradient(images, **others):
        return convolution.input_gradient(images.shape[1:3], **others)

    def weight_gradient(kernel, **others):
        return convolution.weight_gradient(lengths=kernel.shape[:2], **others)

    def plain(images, kernel, strides, pads):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=layout)

    if convolution.has_onednn():
        convolution.disable_compilation_cache_writes()
    columns = (
        "forward: XLA",
        "oneDNN",
        "by inputs: derived",
        "turned",
        "by weights: derived",
        "turned",
        "patches",
    )
    table = Table("layer", *columns, title=f"ms at batch {batch_size}")
    draw = np.random.default_rng(0)
    for side, inputs, outputs, stride in shapes:
        sizes = {
            "images": (batch_size, side, side, inputs),
            "kernel": (3, 3, inputs, outputs),
            "gradient": (batch_size, side // stride, side // stride, outputs),
        }
        arrays = {name: jax.numpy.asarray(draw.normal(size=size), "float32") for name, size in sizes.items()}
        where = {"strides": (stride, stride), "pads": ((1, 1), (1, 1))}
        both = {name: arrays[name] for name in ("images", "kernel")}
        forms = [
            (plain, both),
            (convolution.onednn_convolution, both) if convolution.has_onednn() else None,
            (functools.partial(as_derived, plain, 0), arrays),
            (input_gradient, arrays),
            (functools.partial(as_derived, plain, 1), arrays),
            (weight_gradient, arrays),
            (functools.partial(as_derived, by_patches, 1), arrays),
        ]
        cells = [f"{milliseconds(*form, where, repeats):.1f}" if form else "" for form in forms]
        table.add_row(f"{side}², {inputs} to {outputs}, stride {stride}", *cells)
    Console(width=130).print(table)


def milliseconds(function: Callable, arrays: dict, where: dict, repeats: int) -> float:
    """The median time of `function` as a program of its own, after the first."""
    import jax

    from imp_jax.runtime.compilation import jit_with_backend_options

    program, times = jit_with_backend_options(lambda arrays: function(**arrays, **where)), []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(arrays))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])
