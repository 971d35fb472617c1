"""Masks of parameter trees, and the optax transform that keeps pruned weights at zero.

A mask is a tree shaped like `params` with boolean leaves: True survives, False is pruned. Only weights
(the leaves called "kernel") may be pruned, appendix A.3; every other leaf of a mask is all True.
All functions are pure and may be jitted, and vmapped over a leading axis of members. Where they take `exclude`,
it names layers that are not to be pruned either, as patterns such as "projection_*".
"""

import fnmatch
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

Params = PyTree[Float[Array, "..."]]
Mask = PyTree[Bool[Array, "..."]]


def prunable(params: PyTree, exclude: Sequence[str] = ()) -> PyTree[bool]:
    """Which leaves of `params` (or of a mask) may be pruned: the kernels, the output layer's included.

    Decided by the names on a leaf's path, so it works on any Flax parameters; biases and the parameters of
    normalisation layers never count (appendix A.3), nor does what lies in a layer that `exclude` names.
    """

    def is_prunable(path, _):
        names = [str(getattr(key, "key", getattr(key, "name", None))) for key in path]
        excluded = any(fnmatch.filter(names[:-1], pattern) for pattern in exclude)
        return names[-1:] == ["kernel"] and not excluded

    return jax.tree_util.tree_map_with_path(is_prunable, params)


def prunable_leaves(tree: PyTree[Array], exclude: Sequence[str] = ()) -> list[Array]:
    """The prunable leaves of `tree`, in tree order.

    Raises:
      ValueError: `tree` has no leaf called "kernel", or `exclude` names them all: there is nothing to prune.
    """
    keep = jax.tree.leaves(prunable(tree, exclude))
    leaves = [leaf for leaf, prunable in zip(jax.tree.leaves(tree), keep, strict=True) if prunable]
    if not leaves:
        left = f" outside of {', '.join(exclude)}" if exclude else ""
        raise ValueError(f"the tree has no leaf called 'kernel'{left}, so there is nothing to prune")
    return leaves


def ones_like(params: Params) -> Mask:
    """The dense mask: nothing pruned."""
    return jax.tree.map(lambda p: jnp.ones(jnp.shape(p), bool), params)


def apply(params: Params, mask: Mask) -> Params:
    """θ⊙m: the parameters with exact zeros where they are pruned, also where they were nan."""
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, mask)


def survivors(mask: Mask, exclude: Sequence[str] = ()) -> Int[Array, ""]:
    """The number of prunable weights that survive.

    Raises:
      ValueError: no leaf is prunable.
    """
    return sum(jnp.sum(m, dtype=jnp.int32) for m in prunable_leaves(mask, exclude))


def size(tree: PyTree[Array], exclude: Sequence[str] = ()) -> int:
    """The number of prunable weights, pruned or not.

    Raises:
      ValueError: no leaf is prunable.
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in prunable_leaves(tree, exclude))


def density(mask: Mask, exclude: Sequence[str] = ()) -> Float[Array, ""]:
    """The surviving fraction of the prunable weights, in [0, 1]; sparsity is 1 − density.

    Raises:
      ValueError: no leaf is prunable.
    """
    return survivors(mask, exclude) / size(mask, exclude)


def masked(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transform `inner`, blind to pruned weights: `update(grads, state, params, mask=mask)`.

    Gradients are masked before `inner` sees them, so its moments and norms hold surviving weights only,
    and its updates are masked after it, so a weight that starts a round at zero stays exactly zero whatever
    `inner` adds (momentum, moments left from before, weight decay). The mask is an argument of `update`, not
    part of the state: one compiled step serves every round.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, *, mask, **extra_args):
        updates, state = inner.update(apply(updates, mask), state, params, **extra_args)
        return apply(updates, mask), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
