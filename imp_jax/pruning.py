"""Pruning: from scores to a threshold and the next mask.

By default pruning is global: the weights of all layers are ranked together, and exactly
round(fraction · survivors) of those with the lowest scores are removed (section 2.1, appendix A.3). The score
functions are in `scores`.
"""

import fnmatch
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from imp_jax import masking
from imp_jax.masking import Mask, Params

Scores = PyTree[Float[Array, "..."]]  # a tree like the parameters
LayerFactors = Sequence[tuple[str, float]]  # pairs of a name pattern of layers and a factor


def prune_by_magnitude(
    params: Params, mask: Mask, fraction: float = 0.2, exclude: str | Sequence[str] = ()
) -> tuple[Mask, Float[Array, ""]]:
    """Prune once: remove the `fraction` of the survivors with the smallest magnitudes, over all layers.

    Args:
      params: any Flax parameters; leaves called "kernel" are ranked together, others are never pruned.
      mask: the current mask, shaped like `params`.
      fraction: share of the survivors to remove in [0, 1], a static Python number under `jit`. The decimal is
        taken exactly: 0.7 of 45 is 31.5 and rounds to 32.
      exclude: layers that are never pruned, as patterns of their names such as "projection_*"; a string is one
        pattern.

    Returns:
      The next mask, a subset of `mask` with exactly round(fraction · survivors) fewer weights (ties are
      removed in tree order), and the pruning threshold of figures 6 and 7: the largest magnitude
      removed, 0 if none was.

    Raises:
      ValueError: `fraction` outside [0, 1], trees of different structures or shapes, or no leaf of `params` is
        prunable.
    """
    return prune_by_score(jax.tree.map(jnp.abs, params), params, mask, fraction, exclude)


def prune_by_score(
    scores: Scores,
    params: Params,
    mask: Mask,
    fraction: float,
    exclude: str | Sequence[str] = (),
    *,
    scope: str = "global",
    layer_factors: LayerFactors = (),
) -> tuple[Mask, Float[Array, ""]]:
    """Prune like `prune_by_magnitude`, but by `scores`: the lowest are removed, negative ones first, nan last.

    The threshold is the largest |θ| removed, whatever the scores.

    Args:
      scope: "global" ranks all layers together; "layer" removes round(fraction · survivors) in each layer.
      layer_factors: with the scope "layer", factors of the fraction in the layers that a pattern names; the
        first pattern that matches counts. LeNet's output layer is often pruned at half the rate of the others
        (Frankle & Carbin 2019): (("Dense_2", 0.5),).

    Raises:
      ValueError: as `prune_by_magnitude`; scores that are not floating-point; an unknown scope; layer factors
        with the scope "global".
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it should lie in [0, 1]")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope is {scope!r}; it should be 'global' or 'layer'")
    if layer_factors and scope == "global":
        raise ValueError(f"layer_factors is {layer_factors}; with the scope 'global' it should be ()")
    masking.require_same_shapes(params, mask, scores)
    if scope == "layer":
        names = masking.prunable_by_name(mask, exclude)
        fractions = [fraction * _layer_factor(name, layer_factors) for name in names]
        counts = [
            alive - rounded_share(alive, share)
            for alive, share in zip(layer_survivors(mask, exclude), fractions, strict=True)
        ]
        next_mask = keep_highest_per_layer(scores, mask, jnp.stack(counts), exclude)
    else:
        alive = masking.survivors(mask, exclude)
        next_mask = keep_highest(scores, mask, alive - rounded_share(alive, fraction), exclude)
    removed = _concatenate(mask, exclude) & ~_concatenate(next_mask, exclude)
    threshold = jnp.max(jnp.abs(_concatenate(params, exclude)), where=removed, initial=0.0)
    return next_mask, threshold


def keep_highest(scores: Scores, mask: Mask, count: Int[Array, ""], exclude: str | Sequence[str] = ()) -> Mask:
    """Return the subset of `mask` with the `count` highest scores, over all layers; ties keep the later ones.

    Raises:
      ValueError: scores that are not floating-point, or no leaf is prunable.
    """
    _require_floating_point(scores, exclude)
    kept = _keep_highest(_concatenate(scores, exclude), _concatenate(mask, exclude), count)
    return _split(kept, mask, exclude)


def keep_highest_per_layer(
    scores: Scores, mask: Mask, counts: Int[Array, " layers"], exclude: str | Sequence[str] = ()
) -> Mask:
    """Return the subset of `mask` with the `counts` highest scores of each prunable leaf, in tree order.

    Raises:
      ValueError: scores that are not floating-point, or no leaf is prunable.
    """
    _require_floating_point(scores, exclude)
    pairs = zip(masking.prunable_leaves(scores, exclude), masking.prunable_leaves(mask, exclude), strict=True)
    kept = [_keep_highest(s.ravel(), m.ravel(), count) for (s, m), count in zip(pairs, counts, strict=True)]
    return _split(jnp.concatenate(kept), mask, exclude)


def layer_survivors(mask: Mask, exclude: str | Sequence[str] = ()) -> Int[Array, " layers"]:
    """Count the survivors of each prunable leaf, in tree order."""
    return jnp.stack([jnp.sum(leaf, dtype=jnp.int32) for leaf in masking.prunable_leaves(mask, exclude)])


def prune_in_steps(
    score: Callable[[Mask], Scores],
    mask: Mask,
    count: Int[Array, ""],
    steps: int,
    exclude: str | Sequence[str] = (),
) -> Mask:
    """Prune to `count` survivors in `steps` exponential steps, with new scores in each (Tanaka et al. 2020).

    After step k of n the density is (count / survivors)^(k/n) of that of `mask`, rounded to whole weights.

    Args:
      score: returns the scores of the network under a mask.
    """
    dense = masking.survivors(mask, exclude)

    def step(k, mask):
        kept = dense * (count / dense) ** ((k + 1) / steps)
        target = jnp.where(k == steps - 1, count, jnp.clip(jnp.round(kept).astype(jnp.int32), count, dense))
        return keep_highest(score(mask), mask, target, exclude)

    return jax.lax.fori_loop(0, steps, step, mask)


def _layer_factor(name, layer_factors):
    """Return the factor of the layer of a leaf; the first pattern that matches one of its names counts."""
    layers = name.split("/")[:-1]
    return next((factor for pattern, factor in layer_factors if fnmatch.filter(layers, pattern)), 1.0)


def _require_floating_point(scores, exclude):
    for leaf in masking.prunable_leaves(scores, exclude):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"scores are of type {leaf.dtype}; they should be floating-point")


def _keep_highest(
    scores: Float[Array, " n"], alive: Bool[Array, " n"], count: Int[Array, ""]
) -> Bool[Array, " n"]:
    """Return the `count` of the `alive` weights with the highest scores; ties are removed in order."""
    to_remove = jnp.sum(alive, dtype=jnp.int32) - count
    rank = _ordered_integers(scores)
    cut = _kth_smallest(rank, alive, to_remove)  # the highest score that is removed
    below, tied = alive & (rank < cut), alive & (rank == cut)
    ties_to_remove = to_remove - jnp.sum(below, dtype=jnp.int32)
    return alive & ~(below | (tied & (jnp.cumsum(tied, dtype=jnp.int32) <= ties_to_remove)))


def _ordered_integers(values: Float[Array, " n"]) -> UInt[Array, " n"]:
    """Map floats to unsigned integers in the same order: their bits, inverted for negative ones.

    nan comes last, whatever its bits: arithmetic on x86 gives it a sign.
    """
    width = 8 * values.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0, values), f"uint{width}")  # −0 ties with 0
    sign = bits.dtype.type(1 << (width - 1))
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(values), ~bits.dtype.type(0), ordered)


def _kth_smallest(values: UInt[Array, " n"], where: Bool[Array, " n"], k: Int[Array, ""]) -> UInt[Array, ""]:
    """Return the k-th smallest, k ≥ 1, of the values for which `where` is True.

    Determines its bits from the highest one down by counting smaller values: exact like a sort, in a tenth of
    the time on a CPU.
    """
    bits = 8 * values.dtype.itemsize

    def set_bit(i, smallest):
        candidate = smallest | (values.dtype.type(1) << jnp.asarray(bits - 1 - i, values.dtype))
        smaller = jnp.sum(where & (values < candidate), dtype=jnp.int32)
        return jnp.where(smaller < k, candidate, smallest)

    return jax.lax.fori_loop(0, bits, set_bit, values.dtype.type(0))


def rounded_share(total: Int[Array, ""], fraction: float) -> Int[Array, ""]:
    """Compute round-half-even(fraction · total) exactly; float32 would be off by one from 2²⁴ weights on."""
    ratio = Fraction(float(fraction)).limit_denominator(10**9)  # the decimal as the user wrote it, 0.2 = 1/5
    with jax.enable_x64(True):
        product = total.astype(jnp.uint64) * ratio.numerator  # at most 2³¹ · 10⁹, so it fits
        whole, rest = jnp.divmod(product, ratio.denominator)
        up = (2 * rest > ratio.denominator) | ((2 * rest == ratio.denominator) & (whole % 2 == 1))
        return (whole + up).astype(jnp.int32)


def _concatenate(tree: PyTree[Array], exclude) -> Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in masking.prunable_leaves(tree, exclude)])


def _split(flat: Array, mask: Mask, exclude) -> Mask:
    """Put `flat` into the prunable leaves of `mask`; the inverse of `_concatenate`."""
    leaves, treedef = jax.tree.flatten(mask)
    start = 0
    for i, keep in enumerate(jax.tree.leaves(masking.prunable(mask, exclude))):
        if keep:
            leaves[i] = flat[start : start + leaves[i].size].reshape(leaves[i].shape)
            start += leaves[i].size
    return treedef.unflatten(leaves)
