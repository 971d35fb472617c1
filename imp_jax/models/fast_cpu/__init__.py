"""Kernels that make convolutional networks fast on a CPU, and the switch that turns them on.

Models are written in plain Flax. `use_kernels` intercepts calls of their layers (`nn.intercept_methods`):

- `convolution` replaces `nn.Conv`: oneDNN or XLA computes it, with gradients written as convolutions;
- `normalization` replaces `models.layers.BatchNorm` and `nn.BatchNorm`, with a hand-written gradient;
- `pooling` replaces `models.layers.MaxPool` with 2 × 2 windows and stride 2.

The kernels have reverse-mode gradients of any order; convolutions and normalisation have no forward mode.
"""

import contextlib
from collections.abc import Iterator

import flax.linen as nn

from imp_jax.models.fast_cpu import convolution, normalization, pooling

IMPLEMENTATIONS = ("flax", "xla", "onednn")


@contextlib.contextmanager
def use_kernels(implementation: str) -> Iterator[None]:
    """Compute the layers of every model that is applied in this context with the kernels of this package.

    Variables are the same as in Flax, and so are results up to rounding, except for the gradient of `MaxPool`
    if the maximum is not unique. Flax computes layers with options that the kernels do not support.

    Args:
      implementation: "onednn" or "xla", the library that computes convolutions; or "flax", which replaces
        nothing.

    Raises:
      ValueError: `implementation` is not one of these.
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
