"""Kernels that make convolutional networks fast on a CPU, and the switch that turns them on.

Models are written in plain Flax. `use_kernels` replaces their layers from outside, by `nn.intercept_methods`:

- `convolution`: `nn.Conv`, by oneDNN or XLA, with gradients written as convolutions;
- `normalization`: `models.layers.BatchNorm` and `nn.BatchNorm`, with a hand-written gradient;
- `pooling`: `models.layers.MaxPool` of 2 × 2 windows.

Gradients are in reverse mode only, of any order.
"""

import contextlib
from collections.abc import Iterator

import flax.linen as nn

from imp_jax.models.fast_cpu import convolution, normalization, pooling

IMPLEMENTATIONS = ("flax", "xla", "onednn")


@contextlib.contextmanager
def use_kernels(implementation: str) -> Iterator[None]:
    """Compute the layers of every model applied in this context by the kernels of this package.

    Results are those of Flax up to rounding, and variables are the same. Layers with options that the kernels
    do not support are left to Flax.

    Args:
      implementation: "onednn" or "xla", the library that computes convolutions; or "flax", which replaces
        nothing.

    Raises:
      ValueError: another implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it should be one of {IMPLEMENTATIONS}")
    if implementation == "flax":
        yield
        return
    convolve = convolution.conv_general_dilated_by(implementation)
    with (
        convolution.replace_convolutions(convolve),
        nn.intercept_methods(normalization.replace_batch_norm),
        nn.intercept_methods(pooling.replace_max_pool),
    ):
        yield
