"""Residual networks: the CIFAR family 6n + 2 (He et al. 2016, section 4.2) and ResNet-50 for ImageNet.

Convolutions have no bias. `norm_affine=False`, the paper's choice as we read it, leaves normalisation without
learnable scale and bias.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax.errors import UserError
from imp_jax.models.fast_cpu.normalization import BatchNorm
from imp_jax.models.layers import kaiming_normal


class CifarResNet(nn.Module):
    """Three stages of (depth − 2) / 6 blocks with 16, 32 and 64 channels, for small images.

    ResNet-20 has 268,346 parameters on 32 × 32 × 3 images and 10 classes, 269,722 with `norm_affine`; the 274K
    of table 1 is a count of ResNet-20 with other shortcuts. Where a stage halves the image, the shortcut takes
    every second pixel and fills the new channels with zeros (option A): it has no weights.

    Raises:
      UserError: a depth that is not 6n + 2.
    """

    depth: int = 20
    num_classes: int = 10
    width: float = 1.0  # factor of the number of channels
    norm_affine: bool = False
    norm_momentum: float = 0.9
    norm_axis: str | None = None  # of a mesh, over whose devices statistics are taken
    dtype: Any = jnp.float32

    image_sides: ClassVar = (8, 96)  # pixels; larger images would stay large through all layers

    def __post_init__(self):
        if self.depth < 8 or self.depth % 6 != 2:
            raise UserError(
                f"a ResNet's depth is {self.depth}; it should be 6n + 2, such as 20, 32, 44, 56 or 110"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"], train: bool = False):
        conv, norm = _layers(self, train)
        x = norm()(conv(max(1, round(16 * self.width)), (3, 3))(images))
        for stage, channels in enumerate((16, 32, 64)):
            channels = max(1, round(channels * self.width))
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                y = norm()(conv(channels, (3, 3), stride)(x))
                y = conv(channels, (3, 3))(y)
                shortcut = jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(0, channels - x.shape[-1])])
                x = norm()(y, shortcut)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_normal)(x.mean((1, 2)))


class ResNet50(nn.Module):
    """Bottlenecks 3, 4, 6, 3 with the stride in the 3 × 3 convolution (v1.5) and projection shortcuts.

    25,557,032 parameters on 1,000 classes with `norm_affine`, 25,503,912 without.
    """

    num_classes: int = 1000
    width: float = 1.0  # factor of the number of channels
    norm_affine: bool = False
    norm_momentum: float = 0.9
    norm_axis: str | None = None  # of a mesh, over whose devices statistics are taken
    dtype: Any = jnp.float32

    image_sides: ClassVar = (32, None)  # pixels; the last stage sees a 32nd of them

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"], train: bool = False):
        conv, norm = _layers(self, train)
        x = norm()(conv(max(1, round(64 * self.width)), (7, 7), 2)(images))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate((3, 4, 6, 3)):
            channels = max(1, round(64 * 2**stage * self.width))
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                y = norm()(conv(channels, (1, 1))(x))
                y = norm()(conv(channels, (3, 3), stride)(y))
                y = conv(4 * channels, (1, 1))(y)
                if block == 0:
                    name = f"projection_{stage}"
                    x = norm(relu=False, name=f"{name}_norm")(conv(4 * channels, (1, 1), stride, name=name)(x))
                x = norm()(y, x)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_normal)(x.mean((1, 2)))


def _layers(module, train):
    """The convolution, without bias and padded like PyTorch's, and the normalisation of `module`."""

    def conv(features, kernel_size, stride=1, name=None):
        return nn.Conv(
            features,
            kernel_size,
            strides=stride,
            padding=kernel_size[0] // 2,
            use_bias=False,
            dtype=module.dtype,
            kernel_init=kaiming_normal,
            name=name,
        )

    norm = functools.partial(
        BatchNorm,
        affine=module.norm_affine,
        momentum=module.norm_momentum,
        axis=module.norm_axis,
        train=train,
        dtype=module.dtype,
    )
    return conv, norm
