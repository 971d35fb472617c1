"""The simple gradient noise scale of a network (McCandlish et al. 2018, section 2.2 and appendix A.1)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from imp_jax import similarity


class NoiseScale(NamedTuple):
    """Estimates of the gradient and its noise.

    Attributes:
      gradient: ‖G‖², the squared norm of the gradient G of the expected loss.
      variance: tr Σ, the trace of the covariance of the gradient of a single image.
      noise_scale: tr Σ / ‖G‖², in images: the batch size at which noise and gradient contribute equally to the
        squared norm of a batch's gradient. nan where the estimate of ‖G‖² is not above 0.
    """

    gradient: Float[Array, "..."]
    variance: Float[Array, "..."]
    noise_scale: Float[Array, "..."]


def noise_scale(
    small_squared_norm: Float[ArrayLike, "..."],
    big_squared_norm: Float[ArrayLike, "..."],
    small_batch: int,
    big_batch: int,
) -> NoiseScale:
    """Estimate the noise scale from the squared gradient norms of batches of two sizes (equation A.2).

    E‖g_B‖² = ‖G‖² + tr Σ / B for batches of B independent images, so the two estimates are unbiased; their
    ratio is not.

    Args:
      small_squared_norm: ‖g‖² of a batch of `small_batch` images, or a mean over such batches.
      big_squared_norm: the same for `big_batch` images.

    Raises:
      ValueError: `small_batch` is not below `big_batch`.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(f"small_batch is {small_batch}; it should be above 0 and below big_batch, {big_batch}")
    small, big = jnp.asarray(small_squared_norm), jnp.asarray(big_squared_norm)
    gradient = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    variance = (small - big) / (1 / small_batch - 1 / big_batch)
    return NoiseScale(gradient, variance, jnp.where(gradient > 0, variance / gradient, jnp.nan))


def squared_norms(
    gradient: Callable[[PyTree[Array]], PyTree[Array]], batches: PyTree[Array]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the mean of ‖g‖² over small batches, and ‖ḡ‖² of the batch that they form together.

    ḡ is the mean of their gradients, which is the gradient of the whole if the loss is a mean over images.

    Args:
      gradient: maps a batch to the gradient of its mean loss, zero where weights are pruned.
      batches: batches of equal size, stacked along axis 0 of each leaf.
    """
    count = len(jax.tree.leaves(batches)[0])
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient, first))

    def add(sums, batch):
        total, squares = sums
        g = gradient(batch)
        total = jax.tree.map(jnp.add, total, g)
        return (total, squares + similarity.inner_product(g, g)), None

    (total, squares), _ = jax.lax.scan(add, (zeros, jnp.zeros(())), batches)
    return squares / count, similarity.inner_product(total, total) / count**2
