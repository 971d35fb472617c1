"""A convolution as a matrix product of image patches: a form to compare with, not used in training."""

import contextlib

import jax.numpy as jnp
from jax import Array, lax

from imp_jax import training
from imp_jax.models import fast_cpu, kernels


def patches_convolution(images: Array, kernel: Array, strides, padding, **_) -> Array:
    """Compute `lax.conv_general_dilated` (NHWC, HWIO) as a matrix product of patches.

    Under `vmap` over the kernels it is a batched matrix product instead of a grouped convolution.
    """
    rows, columns, inputs, outputs = kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    height, width = (
        (size - side) // stride + 1
        for size, side, stride in zip(padded.shape[1:3], kernel.shape, strides, strict=False)
    )
    shifted = [
        lax.slice_in_dim(
            lax.slice_in_dim(padded, row, row + (height - 1) * strides[0] + 1, strides[0], axis=1),
            column,
            column + (width - 1) * strides[1] + 1,
            strides[1],
            axis=2,
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(rows * columns * inputs, outputs)


def use_patches_convolution() -> None:
    """Make all training steps of this process compute their convolutions with `patches_convolution`."""
    training.use_kernels = _use_kernels_and_patches


@contextlib.contextmanager
def _use_kernels_and_patches(implementation):
    # entered first: a layer whose convolution is already replaced is left alone by `use_kernels`
    patches = fast_cpu.convolution.replace_convolutions(patches_convolution)
    with patches, kernels.use_kernels(implementation):
        yield
