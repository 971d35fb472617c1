"""Distances between masked trees (section 4.1, appendix B).

Two networks are compared on the intersection m = m₁⊙m₂ of their masks: d(θ₁⊙m, θ₂⊙m). Parameters that are
never pruned (biases, normalisation) belong to every mask and so to every comparison (ours).
All functions are pure and may be jitted and vmapped.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax import masking
from imp_jax.masking import Mask, Params


def inner_product(params_a: Params, params_b: Params) -> Float[Array, ""]:
    """⟨a, b⟩ over all leaves, multiplied and summed in float32 or better."""

    def leaf_product(a, b):
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return jnp.sum(a.astype(wide) * b.astype(wide))

    return sum(jax.tree.leaves(jax.tree.map(leaf_product, params_a, params_b)))


def angular_distance(params_a: Params, mask_a: Mask, params_b: Params, mask_b: Mask) -> Float[Array, ""]:
    """2·∠(a, b)/π on the shared weights (section 4.1): 0 the same direction, 1 orthogonal, 2 opposite.

    nan where a direction is missing: an empty intersection, or a network that is zero on it.
    """
    a, b = _on_intersection(params_a, mask_a, params_b, mask_b)
    a, b = _unit(a), _unit(b)
    # Kahan's form: arccos(a·b) loses half its digits near 0 and leaves its domain by rounding
    difference = _norm(jax.tree.map(jnp.subtract, a, b))
    total = _norm(jax.tree.map(jnp.add, a, b))
    return 4 * jnp.arctan2(difference, total) / jnp.pi


def cosine_distance(params_a: Params, mask_a: Mask, params_b: Params, mask_b: Mask) -> Float[Array, ""]:
    """1 − cos(a, b) on the shared weights (appendix B), in [0, 2]; nan as in `angular_distance`."""
    a, b = _on_intersection(params_a, mask_a, params_b, mask_b)
    difference = jax.tree.map(jnp.subtract, _unit(a), _unit(b))
    return inner_product(difference, difference) / 2  # = 1 − cos, without its cancellation near 0


def euclidean_distance(params_a: Params, mask_a: Mask, params_b: Params, mask_b: Mask) -> Float[Array, ""]:
    """‖a − b‖₂ on the shared weights (appendix B); 0 on an empty intersection."""
    a, b = _on_intersection(params_a, mask_a, params_b, mask_b)
    return _norm(jax.tree.map(jnp.subtract, a, b))


def distance_matrix(
    params: Sequence[Params],
    masks: Sequence[Mask],
    distance: Callable[[Params, Mask, Params, Mask], Float[Array, ""]] = angular_distance,
) -> Float[Array, "networks networks"]:
    """Distances between all pairs of networks (figures 4, 9 to 11), each pair on its own intersection.

    The three distances of this module come from Gram products of all networks at once, right to float32 in the
    cosines, where an angular distance below 1e-3 is not told from 0, and in the squared distances from the mean
    network. Any other function is called pair by pair. nan as in `distance`; the diagonal is 0 elsewhere.
    """
    params, masks = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (params, masks))
    if distance in _BY_GRAM:
        return _BY_GRAM[distance](params, masks)

    def row(network):
        return jax.vmap(lambda p, m: distance(*network, p, m))(params, masks)

    return jax.lax.map(row, (params, masks))  # a row at a time: all pairs at once would need networks² trees


def distance_matrices(params: Params, masks: Mask) -> dict[str, Float[Array, "networks networks"]]:
    """The angular, cosine and Euclidean `distance_matrix` of stacked networks, which lead every leaf."""
    return {metric: _BY_GRAM[distance](params, masks) for metric, distance in METRICS.items()}


def gram_products(
    params: Params, masks: Mask
) -> tuple[Float[Array, "networks networks"], Float[Array, "networks networks"]]:
    """⟨θ_i, θ_j⟩ and ‖θ_i‖² at [i, j], both on m_i⊙m_j, of stacked networks, which lead every leaf.

    Two matrix products a leaf: θ⊙m with itself, and its square with the masks.
    """

    def leaf_products(p, m):
        networks = len(p)
        p = jnp.where(m, p, 0).astype(jnp.promote_types(p.dtype, jnp.float32)).reshape(networks, -1)
        m = m.astype(p.dtype).reshape(networks, -1)
        dot = functools.partial(jnp.matmul, precision="highest")  # a GPU would round to TF32
        return dot(p, p.T), dot(p * p, m.T)

    pairs = [leaf_products(*leaves) for leaves in zip(*map(jax.tree.leaves, (params, masks)), strict=True)]
    products, squares = map(sum, zip(*pairs, strict=True))
    return (products + products.T) / 2, squares  # symmetric to the bit


def _angular(params, masks):
    return _zero_diagonal(2 / jnp.pi * jnp.arccos(_cosines(params, masks)))


def _cosine(params, masks):
    return _zero_diagonal(1 - _cosines(params, masks))


def _euclidean(params, masks):
    def from_mean(leaf):  # networks far from 0 and near each other would cancel
        leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        return leaf - leaf.mean(0)

    products, squares = gram_products(jax.tree.map(from_mean, params), masks)
    return _zero_diagonal(jnp.sqrt(jnp.maximum(squares + squares.T - 2 * products, 0)))


_BY_GRAM = {angular_distance: _angular, cosine_distance: _cosine, euclidean_distance: _euclidean}
METRICS = {"angular": angular_distance, "cosine": cosine_distance, "euclidean": euclidean_distance}


def _cosines(params, masks):
    products, squares = gram_products(params, masks)
    # roots apart, as the product of two squared norms may overflow; rounding may leave [−1, 1]
    return jnp.clip(products / (jnp.sqrt(squares) * jnp.sqrt(squares.T)), -1, 1)


def _zero_diagonal(matrix):
    """Exact zeros where a network meets itself, but for nan."""
    return jnp.where(jnp.eye(len(matrix), dtype=bool) & ~jnp.isnan(matrix), 0, matrix)


def _on_intersection(params_a, mask_a, params_b, mask_b):
    mask = jax.tree.map(jnp.logical_and, mask_a, mask_b)
    return masking.apply(params_a, mask), masking.apply(params_b, mask)


def _norm(params):
    return jnp.sqrt(inner_product(params, params))


def _unit(params):
    norm = _norm(params)
    return jax.tree.map(lambda p: p / norm, params)  # in the norm's type, float32 or better
