"""Numbers of surviving weights of each layer for masks that are drawn at random (Evci et al. 2020).

Layers are the prunable leaves of a tree, in tree order. The counts add up to exactly the number asked for, and
no layer gets more than it has.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def uniform_counts(shapes: Sequence[tuple[int, ...]], total: Int[Array, ""]) -> Int[Array, " layers"]:
    """Distribute `total` survivors such that all layers have the same density.

    The first layer is treated like the others (ours; Evci et al. keep that of ResNet-50 dense).
    """
    return _distribute(shapes, [1.0] * len(shapes), total)


def erdos_renyi_kernel_counts(
    shapes: Sequence[tuple[int, ...]], total: Int[Array, ""]
) -> Int[Array, " layers"]:
    """Distribute `total` survivors: densities are proportional to a layer's sum of sides over its size.

    For a convolution [h, w, n, m] the density is ε · (h + w + n + m) / (h · w · n · m), and for a dense layer
    [n, m] it is ε · (n + m) / (n · m). Layers in which this exceeds 1 are dense; ε is the same in the others.
    """
    return _distribute(shapes, [sum(shape) / math.prod(shape) for shape in shapes], total)


def _distribute(shapes, weights, total):
    """Distribute `total` survivors with densities min(1, ε · weight); ε follows from `total`."""
    total = jnp.asarray(total, jnp.int32)
    sizes, weights = np.array([math.prod(shape) for shape in shapes], np.int64), np.array(weights)
    order = np.argsort(-weights, kind="stable")  # layers become dense in this order
    # survivors(ε) is concave and piecewise linear: on its i-th piece the first i layers of `order` are dense
    dense = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])
    slopes = np.cumsum((sizes * weights)[order][::-1])[::-1]
    with jax.enable_x64(True):  # float32 cannot count beyond 2²⁴
        epsilon = jnp.max((total.astype(jnp.float64) - dense) / slopes)
        exact = sizes * jnp.minimum(1.0, epsilon * weights)
        whole = jnp.floor(exact + 1e-6)  # a whole number may have been computed a little too small
        remainders = exact - whole
        earlier = np.tri(len(sizes), k=-1, dtype=bool)
        larger = remainders[None] > remainders[:, None]
        rank = jnp.sum(larger | ((remainders[None] == remainders[:, None]) & earlier), 1)
        whole = whole.astype(jnp.int32)
        # the largest remainders are rounded up
        return whole + (rank < total - jnp.sum(whole, dtype=jnp.int32)).astype(jnp.int32)


COUNTS = {"erk": erdos_renyi_kernel_counts, "uniform": uniform_counts}  # by the value of `pruning.scope`
