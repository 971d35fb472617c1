"""Distances between masked trees (section 4.1, appendix B).

Two networks are compared on the intersection m = m₁⊙m₂ of their masks: d(θ₁⊙m, θ₂⊙m). Parameters that are
never pruned (biases, normalisation) belong to every mask and so to every comparison (ours).
All functions are pure and may be jitted and vmapped.
"""

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
    """Distances between all pairs of networks (figures 4, 9 to 11), each pair on its own intersection."""
    params, masks = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (params, masks))

    def row(network):
        return jax.vmap(lambda p, m: distance(*network, p, m))(params, masks)

    return jax.lax.map(row, (params, masks))  # a row at a time: all pairs at once would need networks² trees


def _on_intersection(params_a, mask_a, params_b, mask_b):
    mask = jax.tree.map(jnp.logical_and, mask_a, mask_b)
    return masking.apply(params_a, mask), masking.apply(params_b, mask)


def _norm(params):
    return jnp.sqrt(inner_product(params, params))


def _unit(params):
    norm = _norm(params)
    return jax.tree.map(lambda p: p / norm, params)  # in the norm's type, float32 or better
