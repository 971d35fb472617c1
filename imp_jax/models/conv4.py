"""Conv-4, the small VGG of the lottery-ticket papers (appendix A.1)."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax.models.layers import kaiming_normal


def max_pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height/2 width/2 channels"]:
    """2 × 2 max-pool; an odd last row or column is dropped.

    A maximum of four slices: the gradient of `nn.max_pool` is slow on a CPU. They part where two of the four
    are equal, where this one halves the gradient and the other gives it to the first.
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


class Conv4(nn.Module):
    """Twice two 3 × 3 convolutions and a max-pool, then dense 256, 256 and the output.

    2,425,930 parameters on 32 × 32 × 3 images and 10 classes (table 1).
    """

    num_classes: int = 10
    width: float = 1.0  # factor of all hidden layers
    dtype: Any = jnp.float32

    image_sides: ClassVar = (4, 64)  # pixels; a sixteenth of their number is a factor of the first dense layer

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"], train: bool = False):
        del train  # the same in training and evaluation
        x = images
        for features in (64, 128):
            features = max(1, round(self.width * features))
            for _ in range(2):
                conv = nn.Conv(features, (3, 3), dtype=self.dtype, kernel_init=kaiming_normal)
                x = nn.relu(conv(x))
            x = max_pool(x)
        x = x.reshape(len(x), -1)
        for _ in range(2):
            features = max(1, round(self.width * 256))
            x = nn.relu(nn.Dense(features, dtype=self.dtype, kernel_init=kaiming_normal)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_normal)(x)
