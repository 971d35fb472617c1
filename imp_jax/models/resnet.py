"""Residual networks: the CIFAR family 6n + 2 (He et al. 2016, section 4.2), ResNet-18, -34, -50, wide ResNets.

Convolutions have no bias. By default the normalisation has no learnable scale and bias, which is how we read
appendix A.3 of the paper; `norm_affine=True` adds them.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imp_jax.errors import UserError
from imp_jax.models.layers import BatchNorm, MaxPool, kaiming_normal
from imp_jax.permutations import PermutationSpec, layer_axes, norm_axes


class CifarResNet(nn.Module):
    """Three stages of (depth − 2) / 6 residual blocks with 16, 32 and 64 channels, for small images.

    The first block of the second and third stage halves height and width; its shortcut takes every second pixel
    and pads the new channels with zeros (option A of He et al.), so no shortcut has weights.

    ResNet-20 has 268,346 parameters on images with 3 channels and 10 classes, and 269,722 with `norm_affine`.
    Table 1 gives 274K, which we obtain only with projection shortcuts (option B), learnable scales and biases,
    and the running statistics counted: 274,042.

    Attributes:
      depth: number of layers with weights, 6n + 2 with n ≥ 1.
      num_classes: number of logits.
      width: factor of the number of channels.
      norm_affine: whether the normalisation has a learnable scale and bias.
      norm_momentum: decay of the running statistics.
      norm_axis: name of the mesh axis over which batch statistics are averaged; None: no averaging.
      dtype: type of the computation; parameters and statistics are float32.

    Raises:
      UserError: `depth` is not 6n + 2 with n ≥ 1.
    """

    depth: int = 20
    num_classes: int = 10
    width: float = 1.0
    norm_affine: bool = False
    norm_momentum: float = 0.9
    norm_axis: str | None = None
    dtype: Any = jnp.float32

    image_sides: ClassVar = (8, 96)  # pixels; the network does not downsample enough for larger images

    def __post_init__(self):
        if self.depth < 8 or self.depth % 6 != 2:
            raise UserError(
                f"a ResNet's depth is {self.depth}; it should be 6n + 2, such as 20, 32, 44, 56 or 110"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images.

        If `train`, batch statistics are used, and the running statistics are updated.
        """
        conv, norm = make_layers(self, train)
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

    def permutation_spec(self) -> PermutationSpec:
        """Return which channels can be permuted together.

        All blocks of a stage add to the same channels. Those of a stage are the channels of the stage before,
        which the shortcut copies, and new ones.
        """
        channels = [max(1, round(n * self.width)) for n in (16, 32, 64)]
        streams = [("stream_0",), ("stream_0", "stream_1"), ("stream_0", "stream_1", "stream_2")]
        sizes = {f"stream_{i}": n for i, n in enumerate(np.diff([0, *channels]).tolist())}
        axes = layer_axes("Conv_0", (), streams[0], 4) | norm_axes("BatchNorm_0", streams[0])
        inputs, blocks = streams[0], (self.depth - 2) // 6
        for block in range(3 * blocks):
            stream, inner = streams[block // blocks], (f"inner_{block}",)
            sizes[inner[0]] = channels[block // blocks]
            first, second = 2 * block + 1, 2 * block + 2
            axes |= layer_axes(f"Conv_{first}", inputs, inner, 4) | norm_axes(f"BatchNorm_{first}", inner)
            axes |= layer_axes(f"Conv_{second}", inner, stream, 4) | norm_axes(f"BatchNorm_{second}", stream)
            inputs = stream
        return PermutationSpec(sizes, axes | layer_axes("Dense_0", inputs, ()))


class ResNet50(nn.Module):
    """Stages of 3, 4, 6 and 3 bottleneck blocks with projection shortcuts (He et al. 2016, section 4.1).

    The stride is in the 3 × 3 convolution (version 1.5). The network has 25,557,032 parameters for 1,000
    classes with `norm_affine`, and 25,503,912 without.

    Attributes: see `CifarResNet`.
    """

    num_classes: int = 1000
    width: float = 1.0
    norm_affine: bool = False
    norm_momentum: float = 0.9
    norm_axis: str | None = None
    dtype: Any = jnp.float32

    image_sides: ClassVar = (32, None)  # pixels; the network reduces height and width by a factor of 32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images.

        If `train`, batch statistics are used, and the running statistics are updated.
        """
        conv, norm = make_layers(self, train)
        x = norm()(conv(max(1, round(64 * self.width)), (7, 7), 2)(images))
        x = MaxPool((3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))(x)
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

    def permutation_spec(self) -> PermutationSpec:
        """Return which channels can be permuted together; all blocks of a stage add to the same channels."""
        stem, inputs, index = ("stem",), ("stem",), 1
        sizes = {"stem": max(1, round(64 * self.width))}
        axes = layer_axes("Conv_0", (), stem, 4) | norm_axes("BatchNorm_0", stem)
        for stage, blocks in enumerate((3, 4, 6, 3)):
            channels, stream = max(1, round(64 * 2**stage * self.width)), (f"stream_{stage}",)
            sizes[stream[0]] = 4 * channels
            name = f"projection_{stage}"
            axes |= layer_axes(name, inputs, stream, 4) | norm_axes(f"{name}_norm", stream)
            for block in range(blocks):
                inner = [(f"inner_{stage}_{block}_{i}",) for i in range(2)]
                sizes |= {group: channels for (group,) in inner}
                for before, after in itertools.pairwise((inputs, *inner, stream)):
                    axes |= layer_axes(f"Conv_{index}", before, after, 4)
                    axes |= norm_axes(f"BatchNorm_{index}", after)
                    index += 1
                inputs = stream
        return PermutationSpec(sizes, axes | layer_axes("Dense_0", inputs, ()))


class ResNet(nn.Module):
    """ResNet-18 and -34: four stages of basic blocks, projection shortcuts (He et al. 2016, section 4.1).

    Small images have a 3 × 3 convolution as their stem, and images of more than 64 pixels the 7 × 7 convolution
    with stride 2 and the max-pool of the networks for ImageNet. With `norm_affine`, ResNet-18 has 11,689,512
    parameters and ResNet-34 has 21,797,672 for 1,000 classes with the large stem; ResNet-18 has 11,173,962 for
    10 classes with the small one.

    Attributes:
      blocks: number of blocks of each stage.
      others: see `CifarResNet`.
    """

    blocks: Sequence[int] = (2, 2, 2, 2)
    num_classes: int = 10
    width: float = 1.0
    norm_affine: bool = False
    norm_momentum: float = 0.9
    norm_axis: str | None = None
    dtype: Any = jnp.float32

    image_sides: ClassVar = (8, None)  # pixels; three stages halve them

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images.

        If `train`, batch statistics are used, and the running statistics are updated.
        """
        conv, norm = make_layers(self, train)
        if min(images.shape[1:3]) > 64:
            x = norm()(conv(self._channels(0), (7, 7), 2)(images))
            x = MaxPool((3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))(x)
        else:
            x = norm()(conv(self._channels(0), (3, 3))(images))
        for stage, blocks in enumerate(self.blocks):
            channels = self._channels(stage)
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                y = norm()(conv(channels, (3, 3), stride)(x))
                y = conv(channels, (3, 3))(y)
                if stage > 0 and block == 0:
                    name = f"projection_{stage}"
                    x = norm(relu=False, name=f"{name}_norm")(conv(channels, (1, 1), stride, name=name)(x))
                x = norm()(y, x)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_normal)(x.mean((1, 2)))

    def _channels(self, stage):
        return max(1, round(64 * 2**stage * self.width))

    def permutation_spec(self) -> PermutationSpec:
        """Return which channels can be permuted together; all blocks of a stage add to the same channels."""
        inputs, index = ("stream_0",), 1
        sizes = {f"stream_{stage}": self._channels(stage) for stage in range(len(self.blocks))}
        axes = layer_axes("Conv_0", (), inputs, 4) | norm_axes("BatchNorm_0", inputs)
        for stage, blocks in enumerate(self.blocks):
            stream = (f"stream_{stage}",)
            if stage > 0:
                name = f"projection_{stage}"
                axes |= layer_axes(name, inputs, stream, 4) | norm_axes(f"{name}_norm", stream)
            for block in range(blocks):
                inner = (f"inner_{stage}_{block}",)
                sizes[inner[0]] = self._channels(stage)
                for before, after in itertools.pairwise((inputs, inner, stream)):
                    axes |= layer_axes(f"Conv_{index}", before, after, 4)
                    axes |= norm_axes(f"BatchNorm_{index}", after)
                    index += 1
                inputs = stream
        return PermutationSpec(sizes, axes | layer_axes("Dense_0", inputs, ()))


class WideResNet(nn.Module):
    """Three stages of (depth − 4) / 6 pre-activation blocks (Zagoruyko & Komodakis 2016), for small images.

    WRN-28-10 has 36,479,194 parameters on images with 3 channels and 10 classes with `norm_affine`.

    Attributes:
      depth: number of layers with weights, 6n + 4 with n ≥ 1.
      factor: of the 16, 32 and 64 channels of the stages.
      width: a further factor of these channels, and of the 16 channels of the first convolution.
      others: see `CifarResNet`.

    Raises:
      UserError: `depth` is not 6n + 4 with n ≥ 1.
    """

    depth: int = 28
    factor: int = 10
    num_classes: int = 10
    width: float = 1.0
    norm_affine: bool = False
    norm_momentum: float = 0.9
    norm_axis: str | None = None
    dtype: Any = jnp.float32

    image_sides: ClassVar = (8, 96)  # pixels; the network does not downsample enough for larger images

    def __post_init__(self):
        if self.depth < 10 or self.depth % 6 != 4:
            raise UserError(
                f"a wide ResNet's depth is {self.depth}; it should be 6n + 4, such as 10, 16, 22, 28 or 40"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images.

        If `train`, batch statistics are used, and the running statistics are updated.
        """
        conv, norm = make_layers(self, train)
        x = conv(self._stem, (3, 3))(images)
        for stage in range(3):
            channels = self._channels(stage)
            for block in range(self._blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                y = norm()(x)
                if block == 0:
                    x = conv(channels, (1, 1), stride, name=f"projection_{stage}")(y)
                y = norm()(conv(channels, (3, 3), stride)(y))
                x = x + conv(channels, (3, 3))(y)
        x = norm()(x).mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_normal)(x)

    @property
    def _blocks(self):
        return (self.depth - 4) // 6

    @property
    def _stem(self):
        return max(1, round(16 * self.width))

    def _channels(self, stage):
        return max(1, round(16 * 2**stage * self.factor * self.width))

    def permutation_spec(self) -> PermutationSpec:
        """Return which channels can be permuted together; all blocks of a stage add to the same channels."""
        inputs, sizes = ("stem",), {"stem": self._stem}
        axes = layer_axes("Conv_0", (), inputs, 4)
        for i in range(3 * self._blocks):
            stage, block = divmod(i, self._blocks)
            stream, inner = (f"stream_{stage}",), (f"inner_{i}",)
            sizes |= {stream[0]: self._channels(stage), inner[0]: self._channels(stage)}
            if block == 0:
                axes |= layer_axes(f"projection_{stage}", inputs, stream, 4)
            axes |= norm_axes(f"BatchNorm_{2 * i}", inputs) | norm_axes(f"BatchNorm_{2 * i + 1}", inner)
            axes |= layer_axes(f"Conv_{2 * i + 1}", inputs, inner, 4)
            axes |= layer_axes(f"Conv_{2 * i + 2}", inner, stream, 4)
            inputs = stream
        axes |= norm_axes(f"BatchNorm_{6 * self._blocks}", inputs) | layer_axes("Dense_0", inputs, ())
        return PermutationSpec(sizes, axes)


def make_layers(module: nn.Module, train: bool) -> tuple[Callable[..., nn.Conv], Callable[..., BatchNorm]]:
    """Return constructors of convolutions (padded as in PyTorch) and `BatchNorm`, with a module's options."""

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
        use_running_average=not train,
        momentum=module.norm_momentum,
        use_scale=module.norm_affine,
        use_bias=module.norm_affine,
        axis_name=module.norm_axis,
        dtype=module.dtype,
    )
    return conv, norm
