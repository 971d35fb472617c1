"""VGG networks with normalisation and one dense layer, as in the lottery-ticket papers."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax.models.layers import MaxPool, kaiming_normal
from imp_jax.models.resnet import make_layers
from imp_jax.permutations import PermutationSpec, chain_spec, norm_axes

VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Blocks of 3 × 3 convolutions with normalisation, a max-pool between blocks, a mean, and the output layer.

    On images with 3 channels and 10 classes, VGG-11 has 9,222,858 weights and biases and VGG-16 has 14,715,594;
    `norm_affine` adds two for each channel.

    Attributes:
      blocks: number of channels of each convolution, block by block.
      width: factor of the number of channels.
      num_classes, norm_affine, norm_momentum, norm_axis, dtype: see `CifarResNet`.
    """

    blocks: Sequence[Sequence[int]] = VGG16
    num_classes: int = 10
    width: float = 1.0
    norm_affine: bool = False
    norm_momentum: float = 0.9
    norm_axis: str | None = None
    dtype: Any = jnp.float32

    image_sides: ClassVar = (16, None)  # pixels; four max-pools halve them

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images.

        If `train`, batch statistics are used, and the running statistics are updated.
        """
        conv, norm = make_layers(self, train)
        x = images
        for i, block in enumerate(self.blocks):
            if i > 0:
                x = MaxPool((2, 2), strides=(2, 2))(x)
            for features in block:
                x = norm()(conv(max(1, round(features * self.width)), (3, 3))(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_normal)(x.mean((1, 2)))

    def permutation_spec(self) -> PermutationSpec:
        """Return which channels can be permuted together: those of each convolution."""
        sizes = [max(1, round(features * self.width)) for block in self.blocks for features in block]
        names = [f"Conv_{i}" for i in range(len(sizes))]
        spec = chain_spec([*((name, 4) for name in names), ("Dense_0", 2)], sizes)
        for i, name in enumerate(names):
            spec.axes.update(norm_axes(f"BatchNorm_{i}", (name,)))
        return spec
