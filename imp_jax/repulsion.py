"""J_r, the loss that repels a network from earlier optima or attracts it to them (section 3).

Every earlier optimum enters J_r masked by the mask of the round in training, so only its numbers on surviving
weights are kept. If a fifth of P parameters goes each round these are n · 0.8ⁿ · P in round n, at most 1.64 P,
where copies would need n · P.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from imp_jax import masking
from imp_jax.masking import Mask, Params
from imp_jax.similarity import inner_product

# Numbers of the store over parameters of the network, if the round does not need more: room for optima to come.
_CAPACITY = 1.7
# Positions rise and never repeat, those of unused slots included: a GPU needs no atomic additions.
_PROMISES = {"indices_are_sorted": True, "unique_indices": True}


class Optima(NamedTuple):
    """Θ, the earlier optima, on the surviving weights of a round; with several members all lead with them.

    Slots and rows beyond those in use are there so that one compiled program serves several rounds.
    """

    positions: PyTree[Int[Array, " slots"]]  # of the survivors in each flattened leaf; past its end if unused
    values: PyTree[Float[Array, "rows slots"]]  # each optimum's numbers there; 0 if unused
    inverse_norms: Float[Array, " rows"]  # 1/‖θ_r⊙m‖; 0 for an optimum that is zero there, or a row unused
    count: Int[Array, ""]  # |Θ|

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of rows, then of slots of every leaf."""
        return self.inverse_norms.shape[-1], *(leaf.shape[-1] for leaf in jax.tree.leaves(self.positions))


def repulsion_loss(
    params: Params, mask: Mask, earlier_params_list: Sequence[Params], strength: float = 2.0
) -> Float[Array, ""]:
    """J_r(θ) = λ_r / |Θ| · Σ_{θ_r ∈ Θ} cos²(θ⊙m, θ_r⊙m), the plain form of section 3.

    Args:
      params: θ, the network in training.
      mask: m, the mask of its round, all True for what is never pruned: that counts too (ours).
      earlier_params_list: Θ, the optima of earlier rounds; empty in round 0, where J_r is 0.
      strength: λ_r, 2 repels and −1 attracts in the paper.

    Returns: a scalar. A network that is zero on the mask has no direction: its cosine counts as 0, and the
      gradient there is 0 and not nan.
    """
    if not earlier_params_list:
        return jnp.zeros(())
    params = masking.apply(params, mask)
    norm = inner_product(params, params)
    total = 0.0
    for earlier in earlier_params_list:
        earlier = masking.apply(earlier, mask)
        norms = norm * inner_product(earlier, earlier)
        # the inner `where` keeps 0/0 out of the gradient, the outer one out of the value
        cosine_squared = inner_product(params, earlier) ** 2 / jnp.where(norms > 0, norms, 1)
        total += jnp.where(norms > 0, cosine_squared, 0)
    return strength / len(earlier_params_list) * total


def remember(
    optima: Optima | None, params: Params, masks: Mask, *, most: int, dtype: str = "float32"
) -> Optima:
    """Θ for the round that trains under `masks`: the optima of the round before it, and `params`, its result.

    Runs on the host, once a round, and returns NumPy arrays: the number of slots depends on the masks. Rows and
    slots stay as they are while they suffice and are not wasteful, as each new shape is compiled anew.

    Args:
      optima: Θ of the round before; None where there was none. Its masks must hold all of `masks`.
      params, masks: every leaf leads with the members, whose masks may differ.
      most: how many optima are remembered, the latest ones.
      dtype: of the stored values, float32 or bfloat16: half their memory, and in a repelled run of mnist5k an
        error of at most 4e-4 in a cosine and 0.4 % in the gradient.

    Raises:
      ValueError: a weight survives in `masks` that was pruned before.
    """
    leaves, tree = jax.tree.flatten(params)
    leaves, masks = (
        [np.asarray(leaf).reshape(len(leaf), -1) for leaf in of_tree]
        for of_tree in (leaves, jax.tree.leaves(masks))
    )
    if optima is None:
        shape, count, earlier = None, 0, [(None, None)] * len(leaves)
    else:
        shape, count = optima.shape, int(np.max(optima.count))
        earlier = list(zip(*map(jax.tree.leaves, (optima.positions, optima.values)), strict=True))
    kept = min(count, most - 1)
    needed = [max(1, int(mask.sum(1).max())) for mask in masks]  # Orbax saves no empty arrays
    rows, *slots = store_shape(shape, kept + 1, most, needed, sum(leaf.shape[1] for leaf in leaves))

    all_positions, all_values = [], []
    for leaf, mask, width, (before, values_before) in zip(leaves, masks, slots, earlier, strict=True):
        members, size = leaf.shape
        positions = np.tile(np.arange(size, size + width, dtype=np.int32), (members, 1))
        values = np.zeros((members, rows, width), jnp.dtype(dtype))
        for m in range(members):
            there = np.arange(size) if width == size else np.flatnonzero(mask[m])
            used = slice(len(there))
            positions[m, used] = there
            values[m, kept, used] = np.where(mask[m, there], leaf[m, there], 0)
            if kept:
                slots_before = np.searchsorted(before[m], there)
                if not np.array_equal(np.take(before[m], slots_before, mode="clip"), there):
                    raise ValueError("a mask holds a weight that the round before had pruned")
                latest = values_before[m][count - kept : count, slots_before]
                values[m, :kept, used] = np.where(mask[m, there], latest, 0)
        all_positions.append(positions)
        all_values.append(values)
    norms = np.sqrt(sum(np.square(values, dtype=np.float64).sum(-1) for values in all_values))
    inverse_norms = np.divide(1, norms, out=np.zeros_like(norms), where=norms > np.finfo(np.float32).tiny)
    counts = np.full(len(inverse_norms), kept + 1, np.int32)
    return Optima(
        tree.unflatten(all_positions), tree.unflatten(all_values), inverse_norms.astype(np.float32), counts
    )


def store_shape(
    before: Sequence[int] | None, count: int, most: int, needed: Sequence[int], parameters: int
) -> tuple[int, ...]:
    """The shape of a store: as before, if that suffices and is not mostly empty.

    A new one has rows for optima to come, up to 1.7 P numbers; where those that are there need more, as under
    slower pruning, it has a quarter more rows than they need.

    Args:
      before: the shape of the round before.
      count, most: how many optima there are, and how many there may ever be.
      needed: how many weights survive in each leaf.
      parameters: of the network.

    Returns: the number of rows, then of slots of each leaf.
    """
    if before is not None:
        rows, *slots = before
        wasteful = sum(slots) > max(4 * sum(needed), parameters / 10)
        suffices = count <= rows and all(a <= b for a, b in zip(needed, slots, strict=True))
        if suffices and not wasteful:
            return rows, *slots
    rows = int(_CAPACITY * parameters / max(sum(needed), 1))
    return min(most, rows if rows >= count else -(-5 * count // 4)), *needed


def add_gradient(gradients: Params, params: Params, optima: Optima, strength: float) -> Params:
    """`gradients` plus that of J_r at θ⊙m = `params`, which is zero on pruned weights."""
    of_survivors = jax.grad(compact_loss)(compact(params, optima), optima, strength)

    def add(gradient, positions, of_leaf):
        flat = gradient.reshape(-1)
        if positions.size == flat.size:
            return (flat + of_leaf).reshape(gradient.shape)
        return flat.at[positions].add(of_leaf, mode="drop", **_PROMISES).reshape(gradient.shape)

    return jax.tree.map(add, gradients, optima.positions, of_survivors)


def compact(params: Params, optima: Optima) -> PyTree[Float[Array, " slots"]]:
    """The surviving weights of θ⊙m, leaf by leaf; 0 in unused slots."""

    def take(leaf, positions):
        flat = leaf.reshape(-1)
        if positions.size == flat.size:  # a slot a weight: as it is
            return flat
        return flat.at[positions].get(mode="fill", fill_value=0, **_PROMISES)

    return jax.tree.map(take, params, optima.positions)


def compact_loss(
    survivors: PyTree[Float[Array, " slots"]], optima: Optima, strength: float
) -> Float[Array, ""]:
    """J_r of the surviving weights, as `repulsion_loss`."""
    return strength / optima.count * (cosines(survivors, optima) ** 2).sum()


def cosines(survivors: PyTree[Float[Array, " slots"]], optima: Optima) -> Float[Array, " rows"]:
    """cos(θ⊙m, θ_r⊙m) with every earlier optimum; 0 where one has no direction, and in unused rows.

    Operators alone, to serve traced arrays and those of NumPy.
    """
    pairs = list(zip(*map(jax.tree.leaves, (optima.values, survivors)), strict=True))
    with jax.default_matmul_precision("highest"):  # a GPU would round to TF32
        products = sum(values.astype(x.dtype) @ x for values, x in pairs)
        square = sum(x @ x for _, x in pairs)
    zero = square == 0  # in the denominator, to keep 1/0 out of value and gradient
    return products * optima.inverse_norms * (~zero / (square + zero) ** 0.5)


def summary(params: Params, optima: Optima, strength: float) -> tuple[Float[np.ndarray, " members"], ...]:
    """J_r at θ⊙m = `params`, and the mean cosine with the earlier optima, of members that lead every leaf.

    On the host, where no program has to be compiled for it.
    """

    def of_member(m):
        params_m, optima_m = jax.tree.map(lambda leaf: np.asarray(leaf[m]), (params, optima))
        survivors = jax.tree.map(
            lambda leaf, positions: np.append(leaf, leaf.dtype.type(0))[np.minimum(positions, leaf.size)],
            params_m,
            optima_m.positions,
        )
        mean_cosine = cosines(survivors, optima_m).sum() / optima_m.count
        return compact_loss(survivors, optima_m, strength), mean_cosine

    return tuple(np.array(column) for column in zip(*map(of_member, range(len(optima.count))), strict=True))
