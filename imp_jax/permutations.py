"""Permutations of the units of a network, which keep its function, and the alignment of two networks.

A model describes its permutations by a method `permutation_spec()`, which returns a `PermutationSpec`. Networks
are aligned by weight matching (Ainsworth et al. 2023, "Git Re-Basin", section 3.2), on the host.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from scipy.optimize import linear_sum_assignment

from imp_jax import masking

# For each permuted leaf, by its name: the order of the entries of each permuted axis. A pytree.
Permutations = dict[str, dict[int, Int[Array, " entries"]]]
Variables = dict[str, PyTree[Array]]  # params and other collections, as `model.init` returns them

_MAX_SWEEPS = 100  # over all groups; matching converges after a few
_TOLERANCE = 1e-9  # of the objective, relative to the product of the norms


class PermutationSpec(NamedTuple):
    """The groups of units of a model that can be permuted together, and the axes on which they lie.

    The axes of a leaf are given by its name, such as "Dense_0/kernel" or, in a collection of statistics,
    "BatchNorm_0/mean". An axis is () if its entries cannot be permuted, ("a",) if they are the units of group
    a, and ("a", "b") if they are the units of a, then those of b. The axis may be longer by a whole factor: its
    units are then repeated, like the channels in the inputs of a dense layer after a flattened [height, width,
    channels]. Leaves without an entry are not permuted.
    """

    sizes: dict[str, int]  # number of units of each group
    axes: dict[str, tuple[tuple[str, ...], ...]]


def layer_axes(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], rank: int = 2
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return the axes of a dense layer, or of a convolution if the rank of its kernel is 4."""
    return {f"{name}/kernel": ((),) * (rank - 2) + (inputs, outputs), f"{name}/bias": (outputs,)}


def norm_axes(name: str, units: tuple[str, ...]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return the axes of a normalisation layer, with its statistics."""
    return {f"{name}/{leaf}": (units,) for leaf in ("scale", "bias", "mean", "var")}


def chain_spec(layers: Sequence[tuple[str, int]], sizes: Sequence[int]) -> PermutationSpec:
    """Return the spec of layers that follow one another; the units of each but the last can be permuted.

    Args:
      layers: name and rank of the kernel of each layer.
      sizes: number of units of each layer but the last.
    """
    groups = [(), *((name,) for name, _ in layers[:-1]), ()]
    axes = {}
    for (name, rank), inputs, outputs in zip(layers, groups, groups[1:], strict=False):
        axes |= layer_axes(name, inputs, outputs, rank)
    return PermutationSpec(dict(zip([name for name, _ in layers[:-1]], sizes, strict=True)), axes)


def permute(tree: PyTree[Array], permutations: Permutations) -> PyTree[Array]:
    """Permute the units of a tree like `params`, a mask, or a collection of statistics."""

    def permute_leaf(path, leaf):
        for axis, order in permutations.get(masking.name(path), {}).items():
            leaf = jnp.take(leaf, order, axis)
        return leaf

    return jax.tree_util.tree_map_with_path(permute_leaf, tree)


def identity(spec: PermutationSpec, params: PyTree[Array]) -> Permutations:
    """Return the permutations that leave a tree like `params` unchanged."""
    orders = {group: np.arange(size) for group, size in spec.sizes.items()}
    return _expand(spec.sizes, spec.axes, orders, _shapes(params))


def from_orders(
    spec: PermutationSpec, orders: dict[str, Int[np.ndarray, " units"]], *trees: PyTree[Array]
) -> Permutations:
    """Return the permutations of the leaves of trees, such as parameters and statistics.

    Args:
      orders: the order of the units of each group: unit j of the result is unit `orders[group][j]`.
    """
    return _expand(spec.sizes, spec.axes, orders, {k: v for tree in trees for k, v in _shapes(tree).items()})


def match_weights(
    spec: PermutationSpec, target: PyTree[Array], source: PyTree[Array], seed: int = 0
) -> Permutations:
    """Return the permutations of `source` that bring it close to `target`, two trees like `params`.

    Maximises ⟨target, permute(source)⟩ by coordinate ascent: the order of one group after the other is the
    solution of a linear assignment problem, until no group improves it. The result is a local optimum; it
    depends on the sequence of the groups, which `seed` determines.
    """
    return from_orders(spec, _match_orders(spec, target, source, seed), source)


def align(spec: PermutationSpec, target: Variables, source: Variables, seed: int = 0) -> Variables:
    """Return `source` with its units permuted to match `target`, statistics included; see `match_weights`.

    Both are variables as `model.init` returns them; the statistics have no influence on the permutation. The
    result computes the same function as `source`.
    """
    orders = _match_orders(spec, target["params"], source["params"], seed)
    permutations = from_orders(spec, orders, *source.values())
    return {collection: permute(tree, permutations) for collection, tree in source.items()}


def _match_orders(spec, target, source, seed) -> dict[str, Int[np.ndarray, " units"]]:
    """Return the order of the units of each group of `source` that `match_weights` finds."""
    target, source = (_named_leaves(tree) for tree in (target, source))
    orders = {group: np.arange(size) for group, size in spec.sizes.items()}
    scale = np.sqrt(np.prod([sum(np.sum(leaf**2) for leaf in tree.values()) for tree in (target, source)]))
    # the products of leaves with a single permuted axis do not depend on other groups; they are computed once
    single = {name: leaf for name, leaf in source.items() if sum(map(bool, spec.axes.get(name, ()))) == 1}
    several = {name: leaf for name, leaf in source.items() if name not in single}
    constant = {group: _products(spec, group, orders, target, single) for group in spec.sizes}
    generator = np.random.default_rng(seed)
    for _ in range(_MAX_SWEEPS):
        improved = False
        for group in generator.permutation(sorted(spec.sizes)):
            products = constant[group] + _products(spec, group, orders, target, several)
            units, order = linear_sum_assignment(products, maximize=True)
            gain = products[units, order].sum() - products[units, orders[group]].sum()
            if gain > _TOLERANCE * scale:
                orders[group], improved = order, True
        if not improved:
            return orders
    return orders


def _expand(sizes, axes, orders, shapes) -> Permutations:
    """Return the order of the entries of each permuted axis of the leaves with the given shapes."""

    def order_of(groups, length):
        starts = np.cumsum([0, *(sizes[group] for group in groups)])
        order = np.concatenate([start + orders[g] for start, g in zip(starts, groups, strict=False)])
        repeats = np.arange(length // max(len(order), 1))
        return (repeats[:, None] * len(order) + order).ravel().astype(np.int32)

    return {
        name: {i: order_of(groups, shapes[name][i]) for i, groups in enumerate(leaf_axes) if groups}
        for name, leaf_axes in axes.items()
        if name in shapes
    }


def _shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {masking.name(path): jnp.shape(leaf) for path, leaf in leaves}


def _named_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {masking.name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def _products(spec, group, orders, target, source) -> Float[np.ndarray, "units units"]:
    """Compute the inner products of the units of `target` and `source`, with other groups permuted."""
    size = spec.sizes[group]
    total = np.zeros((size, size))
    for name in source:
        axes = spec.axes.get(name, ())
        for axis, groups in enumerate(axes):
            if group not in groups:
                continue
            other_axes = {name: (*axes[:axis], (), *axes[axis + 1 :])}
            permuted = source[name]
            for i, order in _expand(spec.sizes, other_axes, orders, {name: permuted.shape})[name].items():
                permuted = np.take(permuted, order, i)
            length = sum(spec.sizes[g] for g in groups)
            start = sum(spec.sizes[g] for g in groups[: groups.index(group)])
            a, b = (_rows(leaf, axis, length)[start : start + size] for leaf in (target[name], permuted))
            total += a @ b.T
    return total


def _rows(leaf, axis, length):
    """Return a matrix with a row for each of the `length` units on an axis, which may be repeated."""
    moved = np.moveaxis(leaf, axis, 0)
    return moved.reshape(-1, length, *moved.shape[1:]).swapaxes(0, 1).reshape(length, -1)
