"""LeNet-300-100, the paper's smallest network (appendix A.1)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax.models.layers import kaiming_uniform


class LeNet(nn.Module):
    """Dense 300, dense 100, output: 266,610 parameters on 28 × 28 images and 10 classes (table 1)."""

    num_classes: int = 10
    widths: Sequence[int] = (300, 100)  # of the hidden layers
    width: float = 1.0  # factor of these
    dtype: Any = jnp.float32

    image_sides: ClassVar = (1, 64)  # pixels; every one is a row of weights

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"], train: bool = False):
        del train  # the same in training and evaluation
        x = images.reshape(len(images), -1)
        for features in self.widths:
            features = max(1, round(self.width * features))
            x = nn.relu(nn.Dense(features, dtype=self.dtype, kernel_init=kaiming_uniform)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_uniform)(x)
