"""Kernels that make the members of convolutional networks fast on a GPU, and the switch that turns them on.

Models are written in plain Flax. `use_kernels` intercepts calls of their layers (`nn.intercept_methods`):

- `convolution` replaces `nn.Conv`: under `jax.vmap` over members it calls cuDNN once per member, or once for
  all;
- `fast_cpu.normalization` replaces `models.layers.BatchNorm` and `nn.BatchNorm`; on a GPU it computes two sums
  in one reduction;
- `pooling` replaces `models.layers.MaxPool`, whose gradient in XLA adds with atomic operations, in any order.

No kernel is a custom call: they lower for every platform, and the tests run them on a CPU. They have
reverse-mode gradients of any order; convolutions and normalisation have no forward mode.
"""

import contextlib
import functools
from collections.abc import Iterator

import flax.linen as nn

from imp_jax.models.fast_cpu import normalization
from imp_jax.models.fast_cpu.convolution import replace_convolutions
from imp_jax.models.fast_gpu import convolution, pooling

IMPLEMENTATIONS = convolution.IMPLEMENTATIONS


@contextlib.contextmanager
def use_kernels(implementation: str) -> Iterator[None]:
    """Compute the layers of every model that is applied in this context with the kernels of this package.

    Variables are the same as in Flax, and so are results up to rounding, except for the gradient of `MaxPool`
    if the maximum is not unique. Flax computes layers with options that the kernels do not support.

    Args:
      implementation: one of `IMPLEMENTATIONS`, see `convolution`.
    """
    replace_batch_norm = functools.partial(normalization.replace_batch_norm, platform="gpu")
    with (
        replace_convolutions(convolution.conv_general_dilated_by(implementation)),
        nn.intercept_methods(replace_batch_norm),
        nn.intercept_methods(pooling.replace_max_pool),
    ):
        yield
