"""The switch between the layers of Flax and the kernels of `fast_cpu` and `fast_gpu`."""

import contextlib
from collections.abc import Callable

from jax import Array

from imp_jax.models import fast_cpu, fast_gpu

IMPLEMENTATIONS = (*fast_cpu.IMPLEMENTATIONS, *fast_gpu.IMPLEMENTATIONS)


def use_kernels(implementation: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the layers of every model that is applied are computed by an implementation.

    Args:
      implementation: "flax", or one of `fast_cpu.use_kernels` or `fast_gpu.use_kernels`.

    Raises:
      ValueError: `implementation` is not one of these.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it should be one of {IMPLEMENTATIONS}")
    package = fast_gpu if implementation in fast_gpu.IMPLEMENTATIONS else fast_cpu
    return package.use_kernels(implementation)


def conv_general_dilated_by(implementation: str) -> Callable[..., Array]:
    """Return the function that `nn.Conv` layers call in the context of `use_kernels(implementation)`."""
    package = fast_gpu if implementation in fast_gpu.IMPLEMENTATIONS else fast_cpu
    return package.convolution.conv_general_dilated_by(implementation)
