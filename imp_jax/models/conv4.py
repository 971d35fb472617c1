"""Conv-4, the small VGG of the lottery-ticket papers (appendix A.1)."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax.models.layers import MaxPool, kaiming_normal
from imp_jax.permutations import PermutationSpec, chain_spec


class Conv4(nn.Module):
    """Two blocks of two 3 × 3 convolutions and a max-pool, two dense layers of 256 units, and the output layer.

    The convolutions have 64 channels in the first block and 128 in the second. The network has 2,425,930
    parameters on 32 × 32 × 3 images and 10 classes (table 1).

    Attributes:
      num_classes: number of logits.
      width: factor of the number of channels or units of every hidden layer.
      dtype: type of the computation; parameters are float32.
    """

    num_classes: int = 10
    width: float = 1.0
    dtype: Any = jnp.float32

    image_sides: ClassVar = (4, 64)  # pixels; the first dense layer grows with the area of the image

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images; `train` has no effect."""
        del train
        x = images
        for features in (64, 128):
            features = max(1, round(self.width * features))
            for _ in range(2):
                x = nn.Conv(features, (3, 3), dtype=self.dtype, kernel_init=kaiming_normal)(x)
                x = nn.relu(x)
            x = MaxPool((2, 2), strides=(2, 2))(x)
        x = x.reshape(len(x), -1)
        for _ in range(2):
            features = max(1, round(self.width * 256))
            x = nn.relu(nn.Dense(features, dtype=self.dtype, kernel_init=kaiming_normal)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=kaiming_normal)(x)

    def permutation_spec(self) -> PermutationSpec:
        """Return which units can be permuted together: the channels or units of each hidden layer."""
        layers = [*((f"Conv_{i}", 4) for i in range(4)), *((f"Dense_{i}", 2) for i in range(3))]
        return chain_spec(layers, [max(1, round(self.width * n)) for n in (64, 64, 128, 128, 256, 256)])
