"""Masks of parameter trees, and the optax transform that keeps pruned weights at zero.

A mask is a tree shaped like `params` with boolean leaves: True survives, False is pruned. Only weights
(the leaves called "kernel") may be pruned, appendix A.3; every other leaf of a mask is all True.
All functions are pure and may be jitted, and vmapped over a leading axis of members.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

Params = PyTree[Float[Array, "..."]]
Mask = PyTree[Bool[Array, "..."]]


def prunable(params: PyTree) -> PyTree[bool]:
    """Which leaves of `params` (or of a mask) may be pruned: the kernels, the output layer's included.

    Decided by the last name on a leaf's path, so it works on any Flax parameters; biases and the
    parameters of normalisation layers never count (appendix A.3).
    """

    def is_kernel(path, _):
        name = getattr(path[-1], "key", getattr(path[-1], "name", None)) if path else None
        return name == "kernel"

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def prunable_leaves(tree: PyTree[Array]) -> list[Array]:
    """The prunable leaves of `tree`, in tree order.

    Raises:
      ValueError: `tree` has no leaf called "kernel", so there is nothing to prune.
    """
    leaves = [x for x, keep in zip(jax.tree.leaves(tree), jax.tree.leaves(prunable(tree)), strict=True) if keep]
    if not leaves:
        raise ValueError("the tree has no leaf called 'kernel', so there is nothing to prune")
    return leaves


def ones_like(params: Params) -> Mask:
    """The dense mask: nothing pruned."""
    return jax.tree.map(lambda p: jnp.ones(jnp.shape(p), bool), params)


def apply(params: Params, mask: Mask) -> Params:
    """θ⊙m: the parameters with exact zeros where they are pruned, also where they were nan."""
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, mask)


def survivors(mask: Mask) -> Int[Array, ""]:
    """The number of prunable weights that survive.

    Raises:
      ValueError: no leaf is prunable.
    """
    return sum(jnp.sum(m, dtype=jnp.int32) for m in prunable_leaves(mask))


def size(tree: PyTree[Array]) -> int:
    """The number of prunable weights, pruned or not.

    Raises:
      ValueError: no leaf is prunable.
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in prunable_leaves(tree))


def density(mask: Mask) -> Float[Array, ""]:
    """The surviving fraction of the prunable weights, in [0, 1]; sparsity is 1 − density.

    Raises:
      ValueError: no leaf is prunable.
    """
    return survivors(mask) / size(mask)


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
