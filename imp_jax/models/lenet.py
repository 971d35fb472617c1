"""LeNet-300-100, the paper's smallest network (appendix A.1)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# fan-in, gain √2: uniform in ±√(6 / fan-in)
kaiming_uniform = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")


class LeNet(nn.Module):
    """Dense 300, dense 100, output: 266,610 parameters on 28 × 28 images and 10 classes (table 1)."""

    num_classes: int = 10
    widths: Sequence[int] = (300, 100)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"], train: bool = False):
        del train  # the same in training and evaluation
        x = images.reshape(len(images), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width, dtype=self.dtype, kernel_init=kaiming_uniform)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_uniform)(x)
