"""Similarity of networks: distances (section 4.1, appendix B), overlap of masks, agreement of predictions.

Two networks are compared by their connections, the prunable weights, on the intersection m = m₁⊙m₂ of their
masks: d(θ₁⊙m, θ₂⊙m). Biases and the parameters of normalisation layers do not count. All functions are pure
and may be jitted and vmapped; `exclude` names further layers that do not count, as in `masking`. Distances are
accurate for weights of any scale; sums are in float32 or better.

Functions of networks raise a ValueError for trees that differ in structure or shapes, or have no prunable leaf.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from imp_jax import masking
from imp_jax.masking import Mask, Params

DEFINITION = 2  # version of what is compared, also in J_r; version 1 included biases and normalisation


def inner_product(params_a: PyTree[Array], params_b: PyTree[Array]) -> Float[Array, ""]:
    """Compute ⟨a, b⟩ over all leaves, in float32 or better."""
    masking.require_same_shapes(params_a, params_b)
    products = jax.tree.map(lambda a, b: jnp.sum(widen(a) * widen(b)), params_a, params_b)
    return sum(jax.tree.leaves(products))


def angular_distance(
    params_a: Params, mask_a: Mask, params_b: Params, mask_b: Mask, exclude: str | Sequence[str] = ()
) -> Float[Array, ""]:
    """Compute 2·∠(a, b)/π on the shared weights (section 4.1): 0 same direction, 1 orthogonal, 2 opposite.

    The result is nan if a direction is undefined: the intersection is empty, or a network is zero on it.
    """
    a, b = map(_unit, _on_intersection(params_a, mask_a, params_b, mask_b, exclude))
    # Kahan's form: arccos(a·b) loses half its digits near 0 and leaves its domain by rounding
    difference = _norm(jax.tree.map(jnp.subtract, a, b))
    total = _norm(jax.tree.map(jnp.add, a, b))
    return 4 * jnp.arctan2(difference, total) / jnp.pi


def cosine_distance(
    params_a: Params, mask_a: Mask, params_b: Params, mask_b: Mask, exclude: str | Sequence[str] = ()
) -> Float[Array, ""]:
    """Compute 1 − cos(a, b) on the shared weights (appendix B), in [0, 2]; nan as in `angular_distance`."""
    a, b = map(_unit, _on_intersection(params_a, mask_a, params_b, mask_b, exclude))
    difference = jax.tree.map(jnp.subtract, a, b)
    return inner_product(difference, difference) / 2  # = 1 − cos, without its cancellation near 0


def euclidean_distance(
    params_a: Params, mask_a: Mask, params_b: Params, mask_b: Mask, exclude: str | Sequence[str] = ()
) -> Float[Array, ""]:
    """Compute ‖a − b‖₂ on the shared weights (appendix B); 0 on an empty intersection."""
    a, b = _on_intersection(params_a, mask_a, params_b, mask_b, exclude)
    return _norm(jax.tree.map(jnp.subtract, a, b))


def distance_matrix(
    params: Sequence[Params],
    masks: Sequence[Mask],
    distance: Callable[[Params, Mask, Params, Mask], Float[Array, ""]] = angular_distance,
    exclude: str | Sequence[str] = (),
) -> Float[Array, "networks networks"]:
    """Compute the distances between all pairs of networks (figures 4, 9 to 11), each on its own intersection.

    The three distances of this module are computed from Gram products of all networks at once. The cosines, and
    the squared distances relative to the mean network, have float32 precision; so angular distances below 1e-3
    are not resolved. Entries are nan as in `distance`; the rest of the diagonal is 0. Any other function is
    vmapped over one row after the other, without `exclude`; it must be traceable.
    """
    masking.require_same_shapes(*params, *masks)
    params, masks = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (params, masks))
    if distance in _BY_GRAM:
        return _BY_GRAM[distance](params, masks, exclude)

    def row(network):
        return jax.vmap(lambda p, m: distance(*network, p, m))(params, masks)

    return jax.lax.map(row, (params, masks))  # row by row: all pairs at once would need networks² trees


def distance_matrices(
    params: Params, masks: Mask, exclude: str | Sequence[str] = ()
) -> dict[str, Float[Array, "networks networks"]]:
    """Compute the angular, cosine and Euclidean `distance_matrix` of networks stacked along axis 0."""
    return {metric: _BY_GRAM[distance](params, masks, exclude) for metric, distance in METRICS.items()}


def gram_products(
    params: Params, masks: Mask, exclude: str | Sequence[str] = ()
) -> tuple[Float[Array, "networks networks"], Float[Array, "networks networks"]]:
    """Compute ⟨θ_i, θ_j⟩ and ‖θ_i‖² at [i, j], both on m_i⊙m_j, of networks stacked along axis 0.

    Computes two matrix products per leaf: of θ⊙m with itself, and of its square with the masks. The squares of
    weights below 1e-19 or above 1e19 leave the range of float32.
    """
    return _gram_products(*_weights_and_masks(params, masks, exclude))


def jaccard_index(mask_a: Mask, mask_b: Mask, exclude: str | Sequence[str] = ()) -> Float[Array, ""]:
    """Compute |A∩B| / |A∪B| of the weights that survive in two masks, in [0, 1]; nan if none survives.

    Only prunable weights count. `chance_jaccard` says how large it is for independent masks.
    """
    a, b = _masks_of_layers(mask_a, mask_b, exclude)
    shared = sum(map(_count, map(jnp.logical_and, a, b)))
    return shared / sum(map(_count, map(jnp.logical_or, a, b)))


def chance_jaccard(mask_a: Mask, mask_b: Mask, exclude: str | Sequence[str] = ()) -> Float[Array, ""]:
    """Compute the Jaccard index that chance gives at the layer densities of two masks; nan if none survives.

    Two masks that are drawn independently and uniformly within each layer, with a_l and b_l survivors of n_l
    weights, share Σ_l a_l·b_l/n_l weights in expectation (hypergeometric distribution). The result is the ratio
    of expectations, E|A∩B| / (|A| + |B| − E|A∩B|), which is near the expectation of the ratio if many weights
    survive (ours).
    """
    a, b = _masks_of_layers(mask_a, mask_b, exclude)
    sizes = [leaf.size for leaf in a]
    a, b = (list(map(_count, leaves)) for leaves in (a, b))
    # divided first: a product of two counts may leave the range of integers
    shared = sum(count_a * (count_b / size) for count_a, count_b, size in zip(a, b, sizes, strict=True))
    return shared / (sum(a) + sum(b) - shared)


def prediction_agreement(
    logits_a: Float[Array, "*networks examples classes"], logits_b: Float[Array, "*networks examples classes"]
) -> Float[Array, "*networks"]:
    """Compute the share of examples to which two networks give the same class, in [0, 1].

    It is one minus the disagreement of Fort et al. 2019. The result is nan if a logit is nan.

    Raises:
      ValueError: the logits differ in shape.
    """
    masking.require_same_shapes(logits_a, logits_b)
    agreement = jnp.mean(logits_a.argmax(-1) == logits_b.argmax(-1), axis=-1)
    undefined = jnp.isnan(logits_a).any((-2, -1)) | jnp.isnan(logits_b).any((-2, -1))
    return jnp.where(undefined, jnp.nan, agreement)


def ensemble_accuracy(
    logits: Float[Array, "networks examples classes"], labels: Int[Array, " examples"]
) -> Float[Array, ""]:
    """Compute the accuracy, in [0, 1], of the class with the largest mean of the networks' probabilities.

    The ensemble averages softmax probabilities, as deep ensembles do (Lakshminarayanan et al. 2017). The result
    is nan if a probability is nan.
    """
    probabilities = jax.nn.softmax(widen(logits)).mean(0)
    accuracy = jnp.mean(probabilities.argmax(-1) == labels)
    return jnp.where(jnp.isnan(probabilities).any(), jnp.nan, accuracy)


def _masks_of_layers(mask_a, mask_b, exclude):
    masking.require_same_shapes(mask_a, mask_b)
    return (masking.prunable_leaves(mask, exclude) for mask in (mask_a, mask_b))


def _count(mask):
    """Count the survivors of a layer exactly; as a float32, because the sum over layers may leave int32."""
    return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)


def widen(leaf: Array) -> Array:
    """Convert a leaf to float32, unless its type is wider."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def scale_of(leaves: Sequence[Array], axis: int | tuple[int, ...] | None = None) -> Array:
    """Return the largest magnitude in `leaves`, or 1 if all are 0.

    Squares of weights divided by it stay in the range of float32. Its gradient is stopped, because the
    results that use it do not depend on it.
    """
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(leaf), axis, initial=0) for leaf in leaves))
    return jax.lax.stop_gradient(jnp.where(largest == 0, 1, largest))


def _gram_products(weights, masks):
    dot = functools.partial(jnp.matmul, precision="highest")  # a GPU would round to TF32
    pairs = [(dot(p, p.T), dot(p * p, m.T.astype(p.dtype))) for p, m in zip(weights, masks, strict=True)]
    products, squares = map(sum, zip(*pairs, strict=True))
    return (products + products.T) / 2, squares  # exactly symmetric


def _weights_and_masks(params, masks, exclude):
    """Return θ⊙m and m of the prunable leaves of stacked networks, each [networks, weights]."""
    masking.require_same_shapes(params, masks)
    params, masks = (masking.prunable_leaves(tree, exclude) for tree in (params, masks))
    pairs = [(jnp.where(m, widen(p), 0), m) for p, m in zip(params, masks, strict=True)]
    return zip(*((p.reshape(len(p), -1), m.reshape(len(m), -1)) for p, m in pairs), strict=True)


def _angular(params, masks, exclude):
    return _zero_diagonal(2 / jnp.pi * jnp.arccos(_cosines(params, masks, exclude)))


def _cosine(params, masks, exclude):
    return _zero_diagonal(1 - _cosines(params, masks, exclude))


def _euclidean(params, masks, exclude):
    weights, masks = _weights_and_masks(params, masks, exclude)
    weights = [_from_mean(*pair) for pair in zip(weights, masks, strict=True)]
    scale = scale_of(weights)
    products, squares = _gram_products([leaf / scale for leaf in weights], masks)
    return _zero_diagonal(scale * jnp.sqrt(jnp.maximum(squares + squares.T - 2 * products, 0)))


def _from_mean(weights, masks):
    """Subtract the mean network: differences of networks far from 0 and near each other would cancel."""
    mean = weights.sum(0) / jnp.maximum(masks.sum(0), 1)
    return jnp.where(masks, weights - mean, 0)


_BY_GRAM = {angular_distance: _angular, cosine_distance: _cosine, euclidean_distance: _euclidean}
METRICS = {"angular": angular_distance, "cosine": cosine_distance, "euclidean": euclidean_distance}


def _cosines(params, masks, exclude):
    weights, masks = _weights_and_masks(params, masks, exclude)
    scale = scale_of(weights, axis=1)[:, None]
    products, squares = _gram_products([leaf / scale for leaf in weights], masks)
    # separate roots: the product of two squares may leave the range of float32; clipped against rounding
    return jnp.clip(products / (jnp.sqrt(squares) * jnp.sqrt(squares.T)), -1, 1)


def _zero_diagonal(matrix):
    """Set the diagonal to exact zeros, except for nan."""
    return jnp.where(jnp.eye(len(matrix), dtype=bool) & ~jnp.isnan(matrix), 0, matrix)


def _on_intersection(params_a, mask_a, params_b, mask_b, exclude):
    """Return the prunable leaves of both networks, in float32 or better, zero outside of the intersection."""
    masking.require_same_shapes(params_a, mask_a, params_b, mask_b)
    a, keep_a, b, keep_b = (
        masking.prunable_leaves(tree, exclude) for tree in (params_a, mask_a, params_b, mask_b)
    )
    keep = [jnp.logical_and(*masks) for masks in zip(keep_a, keep_b, strict=True)]
    return tuple(
        [jnp.where(m, widen(leaf), 0) for leaf, m in zip(leaves, keep, strict=True)] for leaves in (a, b)
    )


def _norm(leaves):
    scale = scale_of(leaves)
    leaves = [leaf / scale for leaf in leaves]
    return scale * jnp.sqrt(inner_product(leaves, leaves))


def _unit(leaves):
    scale = scale_of(leaves)
    leaves = [leaf / scale for leaf in leaves]  # scaled first: the norm may leave the range of float32
    norm = jnp.sqrt(inner_product(leaves, leaves))
    return [leaf / norm for leaf in leaves]
