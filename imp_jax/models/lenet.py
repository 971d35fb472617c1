"""LeNet-300-100, the smallest network of the paper (appendix A.1)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax.models.layers import kaiming_uniform
from imp_jax.permutations import PermutationSpec, chain_spec


class LeNet(nn.Module):
    """Two dense hidden layers, of 300 and 100 units, and a dense output layer.

    It has 266,610 parameters on 28 × 28 images and 10 classes (table 1).

    Attributes:
      num_classes: number of logits.
      widths: sizes of the hidden layers.
      width: factor of `widths`.
      dtype: type of the computation; parameters are float32.
    """

    num_classes: int = 10
    widths: Sequence[int] = (300, 100)
    width: float = 1.0
    dtype: Any = jnp.float32

    image_sides: ClassVar = (1, 64)  # pixels; the first dense layer grows with the area of the image

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images; `train` has no effect."""
        del train
        x = images.reshape(len(images), -1)
        for features in self._sizes:
            x = nn.relu(nn.Dense(features, dtype=self.dtype, kernel_init=kaiming_uniform)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_uniform)(x)

    @property
    def _sizes(self):
        return [max(1, round(self.width * features)) for features in self.widths]

    def permutation_spec(self) -> PermutationSpec:
        """Return which units can be permuted together: those of each hidden layer."""
        return chain_spec([(f"Dense_{i}", 2) for i in range(len(self.widths) + 1)], self._sizes)
