"""Layers and initializers that several networks share.

The initializers are those of table 1 of the paper. They use the fan-in and the gain √2 (He et al. 2015), so
that initially the pre-activations of all layers of a ReLU network have about the same variance.
"""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float

# uniform in ±√(6 / fan-in)
kaiming_uniform = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")
# normal with variance 2 / fan-in; nn.initializers.he_normal is truncated at two standard deviations
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm`, followed by the addition of a shortcut and by a ReLU.

    The three operations are one layer, so that `models.fast_cpu` can compute them in one kernel. Variables and
    other fields are those of `nn.BatchNorm`.

    Attributes:
      relu: whether to apply `nn.relu`.
    """

    relu: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        shortcut: Float[Array, "batch height width channels"] | None = None,
    ) -> Float[Array, "batch height width channels"]:
        """Return relu(norm(x) + shortcut).

        Args:
          x: inputs of the normalisation.
          shortcut: residual connection to add to the normalised inputs, or None.
        """
        x = super().__call__(x)
        if shortcut is not None:
            x = x + shortcut
        return nn.relu(x) if self.relu else x


class MaxPool(nn.Module):
    """`nn.max_pool` as a layer, so that `models.fast_cpu` can replace it.

    Attributes:
      window_shape: height and width of the window, in pixels.
      strides: strides of the window, in pixels; None: (1, 1).
      padding: as in `nn.max_pool`.
    """

    window_shape: tuple[int, int]
    strides: tuple[int, int] | None = None
    padding: str | Sequence[tuple[int, int]] = "VALID"

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height_out width_out channels"]:
        """Return the maximum of each window."""
        return nn.max_pool(x, self.window_shape, self.strides, self.padding)
