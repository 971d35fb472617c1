"""J_r, the loss that repels a network from earlier optima or attracts it to them (section 3).

J_r compares connections, the prunable weights on a mask: biases and the parameters of normalisation layers do
not count, nor do layers that `exclude` names, as in `masking`. The mask of the current round is applied to
every earlier optimum, so only its values on surviving weights are stored. If each round removes a fifth of the
P weights, these are n · 0.8ⁿ · P values in round n, at most 1.64 P; full copies would need n · P.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from imp_jax import masking
from imp_jax.masking import Mask, Params
from imp_jax.similarity import inner_product, scale_of, widen

# Size of a new store in units of P, with room for future optima, unless the round needs more.
_STORE_SIZE_IN_P = 1.7
# `positions` are strictly increasing, padding included: scatter and gather may assume sorted, unique indices.
_SCATTER_HINTS = {"indices_are_sorted": True, "unique_indices": True}


Strength = float | Float[Array, ""]  # λ_r


class GrownMaskError(ValueError):
    """A mask keeps a weight that the mask of the round before pruned: its earlier values are not stored."""


class Optima(NamedTuple):
    """Θ, the earlier optima, on the surviving weights of a round; with an optional leading member axis.

    Slots and rows are padded so that one compiled program serves several rounds.
    """

    # both by the name of a prunable leaf, such as "Dense_0/kernel"
    positions: dict[str, Int[Array, " slots"]]  # of survivors in the flattened leaf; unused: past its end
    values: dict[str, Float[Array, "rows slots"]]  # of each optimum, from the earliest; unused: 0
    inverse_norms: Float[Array, " rows"]  # 1/‖θ_r⊙m‖; 0 if θ_r⊙m is zero or the row unused
    count: Int[Array, ""]  # |Θ|

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of rows, followed by the number of slots of each leaf in the order of their names."""
        return self.inverse_norms.shape[-1], *(leaf.shape[-1] for leaf in jax.tree.leaves(self.positions))


def repulsion_loss(
    params: Params,
    mask: Mask,
    earlier_params_list: Sequence[Params],
    strength: float = 2.0,
    exclude: str | Sequence[str] = (),
) -> Float[Array, ""]:
    """Compute J_r(θ) = λ_r / |Θ| · Σ_{θ_r ∈ Θ} cos²(θ⊙m, θ_r⊙m), in the plain form of section 3.

    Args:
      params: θ, the network in training; only its prunable weights count.
      mask: m, the mask of its round.
      earlier_params_list: Θ, the optima of earlier rounds; empty in round 0, where J_r is 0.
      strength: λ_r; in the paper 2 repels and −1 attracts.
      exclude: patterns of layers that do not count.

    Returns: a scalar. A network that is zero on the mask has no direction; its cosine counts as 0, and the
      gradient is 0 instead of nan.

    Raises:
      ValueError: trees of different structures or shapes, or without a prunable leaf.
    """
    masking.require_same_shapes(params, mask, *earlier_params_list)
    if not earlier_params_list:
        return jnp.zeros(())
    keep = masking.prunable_leaves(mask, exclude)

    def direction(tree):
        leaves = masking.prunable_leaves(tree, exclude)
        leaves = [jnp.where(m, widen(leaf), 0) for leaf, m in zip(leaves, keep, strict=True)]
        scale = scale_of(leaves)
        leaves = [leaf / scale for leaf in leaves]
        square = inner_product(leaves, leaves)
        zero = square == 0  # in the denominator, to keep 1/0 out of value and gradient
        return [leaf * (~zero / jnp.sqrt(square + zero)) for leaf in leaves]

    network = direction(params)
    cosines = [inner_product(network, direction(earlier)) for earlier in earlier_params_list]
    return strength / len(cosines) * sum(cosine**2 for cosine in cosines)


def add_optimum(
    optima: Optima | None,
    params: Params,
    masks: Mask,
    *,
    max_optima: int,
    dtype: str = "float32",
    exclude: str | Sequence[str] = (),
) -> Optima:
    """Add `params`, the result of a round, to the earlier optima, for the next round under `masks`.

    Runs on the host once per round and returns NumPy arrays, because the number of slots depends on the masks.
    The store keeps its padded shape as long as it is large enough and not mostly empty, because every new shape
    recompiles the step.

    Args:
      optima: Θ of that round; None if it is empty. Its masks must include every weight that `masks` keep.
      params, masks: with a leading member axis; masks of members may differ.
      max_optima: number of optima to keep, the latest ones.
      dtype: of the stored values, float32 or bfloat16, which halves their memory; measured on a repelled run
        of mnist5k, its errors are at most 4e-4 in a cosine and 0.4 % in the gradient.
      exclude: patterns of layers that do not count.

    Raises:
      GrownMaskError: a weight survives in `masks` that was pruned in the round of `optima`; not detected in a
        leaf with one slot for each of its weights.
      ValueError: trees of different structures or shapes, or without a prunable leaf.
    """
    masking.require_same_shapes(params, masks)
    params, masks = (masking.prunable_by_name(tree, exclude) for tree in (params, masks))
    names = sorted(params)  # as JAX orders a dict
    leaves, masks = (
        [np.asarray(by_name[name]).reshape(len(by_name[name]), -1) for name in names]
        for by_name in (params, masks)
    )
    if optima is None:
        shape, count, earlier = None, 0, [(None, None)] * len(names)
    else:
        shape, count = optima.shape, int(np.max(optima.count))
        earlier = [(optima.positions[name], optima.values[name]) for name in names]
    kept = min(count, max_optima - 1)
    needed = [max(1, int(mask.sum(1).max())) for mask in masks]  # Orbax saves no empty arrays
    rows, *widths = next_store_shape(shape, kept + 1, max_optima, needed, sum(leaf.shape[1] for leaf in leaves))

    all_positions, all_values = [], []
    for leaf, mask, width, (stored, stored_values) in zip(leaves, masks, widths, earlier, strict=True):
        members, size = leaf.shape
        positions = np.tile(np.arange(size, size + width, dtype=np.int32), (members, 1))
        values = np.zeros((members, rows, width), jnp.dtype(dtype))
        for m in range(members):
            survivors = np.arange(size) if width == size else np.flatnonzero(mask[m])
            used = slice(len(survivors))
            positions[m, used] = survivors
            values[m, kept, used] = np.where(mask[m, survivors], leaf[m, survivors], 0)
            if kept:
                slots = np.searchsorted(stored[m], survivors)
                if not np.array_equal(np.take(stored[m], slots, mode="clip"), survivors):
                    raise GrownMaskError("a mask holds a weight that the round before had pruned")
                latest = stored_values[m][count - kept : count, slots]
                values[m, :kept, used] = np.where(mask[m, survivors], latest, 0)
        all_positions.append(positions)
        all_values.append(values)
    norms = np.sqrt(sum(np.square(values, dtype=np.float64).sum(-1) for values in all_values))
    inverse_norms = np.divide(1, norms, out=np.zeros_like(norms), where=norms > np.finfo(np.float32).tiny)
    counts = np.full(len(inverse_norms), kept + 1, np.int32)
    positions, values = (dict(zip(names, leaves, strict=True)) for leaves in (all_positions, all_values))
    return Optima(positions, values, inverse_norms.astype(np.float32), counts)


def join_members(stores: Sequence[Optima], sizes: dict[str, int]) -> Optima:
    """Join the earlier optima of several groups of members, padded to the largest store.

    Args:
      stores: with a leading member axis, from `add_optimum`.
      sizes: number of weights of each leaf, by the name of the leaf.
    """
    rows, *widths = (max(numbers) for numbers in zip(*(store.shape for store in stores), strict=True))
    widths = dict(zip(sorted(stores[0].positions), widths, strict=True))

    def widen_store(store):
        added_rows = rows - store.shape[0]
        positions, values = {}, {}
        for name, width in widths.items():
            old_positions, old_values = store.positions[name], store.values[name]
            old_width = old_positions.shape[-1]
            if width == sizes[name] > old_width:  # a slot for each weight, in order
                new_positions = jnp.broadcast_to(jnp.arange(width), (len(old_positions), width))
                empty = jnp.zeros((*old_values.shape[:2], width), old_values.dtype)
                new_values = jax.vmap(lambda e, p, v: e.at[:, p].set(v, mode="drop"))(
                    empty, old_positions, old_values
                )
            else:
                unused = jnp.arange(sizes[name] + old_width, sizes[name] + width, dtype=old_positions.dtype)
                unused = jnp.broadcast_to(unused, (len(old_positions), len(unused)))
                new_positions = jnp.concatenate([old_positions, unused], -1)
                new_values = jnp.pad(old_values, ((0, 0), (0, 0), (0, width - old_width)))
            positions[name] = new_positions.astype(old_positions.dtype)
            values[name] = jnp.pad(new_values, ((0, 0), (0, added_rows), (0, 0)))
        inverse_norms = jnp.pad(store.inverse_norms, ((0, 0), (0, added_rows)))
        return Optima(positions, values, inverse_norms, store.count)

    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *map(widen_store, stores))


def next_store_shape(
    present: Sequence[int] | None, count: int, max_optima: int, needed: Sequence[int], weights: int
) -> tuple[int, ...]:
    """Compute the shape of a store: that of the last round, if it is large enough and not mostly empty.

    A new shape has rows for future optima, up to 1.7 P values in all. If the optima so far need more, as with
    slower pruning, it has a quarter more rows than they need.

    Args:
      present: the shape of the present store; None if there is none.
      count: number of optima to store.
      max_optima: the number that no store exceeds.
      needed: number of surviving weights of each leaf.
      weights: P, the number of prunable weights of the network, pruned or not.

    Returns: the number of rows, followed by the number of slots of each leaf.
    """
    if present is not None:
        rows, *slots = present
        wasteful = sum(slots) > max(4 * sum(needed), weights / 10)
        suffices = count <= rows and all(a <= b for a, b in zip(needed, slots, strict=True))
        if suffices and not wasteful:
            return rows, *slots
    rows = int(_STORE_SIZE_IN_P * weights / max(sum(needed), 1))
    return min(max_optima, rows if rows >= count else -(-5 * count // 4)), *needed


def add_gradient(gradients: Params, params: Params, optima: Optima, strength: Strength) -> Params:
    """Add the gradient of J_r at θ⊙m = `params` to `gradients`; it is zero on pruned weights."""
    d_survivors = jax.grad(survivor_loss)(gather_survivors(params, optima), optima, strength)

    def add(path, gradient):
        name = masking.name(path)
        if name not in d_survivors:
            return gradient
        flat, positions = gradient.reshape(-1), optima.positions[name]
        if positions.size == flat.size:
            flat += d_survivors[name]
        else:
            flat = flat.at[positions].add(d_survivors[name], mode="drop", **_SCATTER_HINTS)
        return flat.reshape(gradient.shape)

    return jax.tree_util.tree_map_with_path(add, gradients)


def gather_survivors(params: Params, optima: Optima) -> dict[str, Float[Array, " slots"]]:
    """Gather the surviving weights of θ⊙m = `params`, leaf by leaf as in `optima`; 0 in unused slots."""

    def take(name, leaf):
        flat, positions = leaf.reshape(-1), optima.positions[name]
        if positions.size == flat.size:  # one slot per weight: no gather
            return flat
        return flat.at[positions].get(mode="fill", fill_value=0, **_SCATTER_HINTS)

    return {name: take(name, leaf) for name, leaf in _stored_leaves(optima, params).items()}


def survivor_loss(
    survivors: dict[str, Float[Array, " slots"]], optima: Optima, strength: Strength
) -> Float[Array, ""]:
    """Compute J_r of the surviving weights, like `repulsion_loss`."""
    return strength / optima.count * (cosines(survivors, optima) ** 2).sum()


def cosines(survivors: dict[str, Float[Array, " slots"]], optima: Optima) -> Float[Array, " rows"]:
    """Compute cos(θ⊙m, θ_r⊙m) with every earlier optimum; 0 if one of them is zero, and in unused rows.

    Computes in float32 or better. Norms must lie between 1e-18 and 1e18, because rescaling would take another
    pass over all weights. Uses only operators, so that it works on traced and on NumPy arrays.
    """
    pairs = [(optima.values[name], widen(x)) for name, x in survivors.items()]
    with jax.default_matmul_precision("highest"):  # a GPU would round to TF32
        products = sum(values.astype(x.dtype) @ x for values, x in pairs)
        square = sum(x @ x for _, x in pairs)
    zero = square == 0  # in the denominator, to keep 1/0 out of value and gradient
    return products * optima.inverse_norms * (~zero / (square + zero) ** 0.5)


def summary(params: Params, optima: Optima, strength: float) -> tuple[Float[np.ndarray, " members"], ...]:
    """Compute J_r at θ⊙m = `params` and the mean cosine with the earlier optima, for all members.

    Runs on the host, so that no program is compiled. All trees have a leading member axis.
    """

    def summarize_member(m):
        optima_m = jax.tree.map(lambda leaf: np.asarray(leaf[m]), optima)
        survivors = {}
        for name, leaf in _stored_leaves(optima, params).items():
            leaf = np.asarray(leaf[m])
            positions = np.minimum(optima_m.positions[name], leaf.size)  # unused slots take the 0 at the end
            survivors[name] = np.append(leaf, leaf.dtype.type(0))[positions]
        mean_cosine = cosines(survivors, optima_m).sum() / optima_m.count
        return survivor_loss(survivors, optima_m, strength), mean_cosine

    pairs = map(summarize_member, range(len(optima.count)))
    return tuple(np.array(column) for column in zip(*pairs, strict=True))


def _stored_leaves(optima, params):
    """Return the leaves of `params` that `optima` stores, by name."""
    leaves = masking.prunable_by_name(params)
    return {name: leaves[name] for name in optima.positions}
