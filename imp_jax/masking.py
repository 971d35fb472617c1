"""Masks of parameter trees, and the optax transform that keeps pruned weights at zero.

A mask is a tree shaped like `params` with boolean leaves: True survives, False is pruned. Only weights (the
leaves called "kernel") may be pruned (appendix A.3); every other leaf of a mask is all True. Parameters may be
dicts, FrozenDicts, lists or an `nnx.State`, and may hold boxed leaves such as `nn.Partitioned`. All functions
are pure, and may be jitted and vmapped over a leading member axis. `exclude` names further layers that are
never pruned, as patterns such as "projection_*"; a string is one pattern. Trees whose structures or shapes
differ raise a ValueError, in this module and in those that build on it.
"""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

Params = PyTree[Float[Array, "..."]]
Mask = PyTree[Bool[Array, "..."]]


def prunable(params: PyTree, exclude: str | Sequence[str] = ()) -> PyTree[bool]:
    """Return which leaves of `params` (or of a mask) may be pruned: all kernels, including the output layer's.

    Only the names on the path of a leaf matter, so this works for any Flax parameters. Biases and the
    parameters of normalisation layers are never pruned (appendix A.3), nor are layers that `exclude` names.

    Raises:
      ValueError: a kernel is a container of an unknown kind, such as a quantised array.
    """
    patterns = (exclude,) if isinstance(exclude, str) else exclude

    def is_prunable(path, _):
        *layers, last = _names(path)
        excluded = any(fnmatch.filter(layers, pattern) for pattern in patterns)
        return last == "kernel" and not excluded

    return jax.tree_util.tree_map_with_path(is_prunable, params)


def prunable_by_name(tree: PyTree[Array], exclude: str | Sequence[str] = ()) -> dict[str, Array]:
    """Return the prunable leaves of `tree` in tree order, by names such as "Dense_0/kernel".

    Raises:
      ValueError: `tree` has no leaf called "kernel", or `exclude` names them all.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    keep = jax.tree.leaves(prunable(tree, exclude))
    named = {name(path): leaf for (path, leaf), kept in zip(leaves, keep, strict=True) if kept}
    if not named:
        patterns = (exclude,) if isinstance(exclude, str) else exclude
        scope = f" outside of {', '.join(patterns)}" if patterns else ""
        raise ValueError(f"the tree has no leaf called 'kernel'{scope}, so there is nothing to prune")
    return named


def prunable_leaves(tree: PyTree[Array], exclude: str | Sequence[str] = ()) -> list[Array]:
    """Return the prunable leaves of `tree` in tree order. Raises: see `prunable_by_name`."""
    return list(prunable_by_name(tree, exclude).values())


def require_same_shapes(tree: PyTree, *others: PyTree) -> None:
    """Check that trees have the same structure and shapes; JAX would broadcast different shapes silently.

    Raises:
      ValueError: two trees differ in structure, or two leaves in shape.
    """

    def compare(path, leaf, other):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"the leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)} in one tree and "
                f"{jnp.shape(other)} in another; they should be the same"
            )

    for other in others:
        jax.tree_util.tree_map_with_path(compare, tree, other)


def name(path: tuple[Any, ...]) -> str:
    """Return the name of the leaf at a path of `jax.tree_util`, such as "Dense_0/kernel"."""
    return "/".join(_names(path))


def _names(path):
    """Return the names on the path to a leaf, without the `value` of a Flax box."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path] or [""]
    if names[-2:-1] == ["kernel"] and not isinstance(path[-1], jax.tree_util.DictKey):
        if path[-1] != jax.tree_util.GetAttrKey("value"):
            raise ValueError(
                f"{'/'.join(names[:-1])} is a container of an unknown kind, not an array; "
                f"pass its array, as flax.core.meta.unbox returns it"
            )
        names.pop()
    return names


def ones_like(params: Params) -> Mask:
    """Make the dense mask, with nothing pruned."""
    return jax.tree.map(lambda p: jnp.ones(jnp.shape(p), bool), params)


def apply(params: Params, mask: Mask) -> Params:
    """Compute θ⊙m: the parameters with exact zeros where they are pruned, even where they are nan."""
    require_same_shapes(params, mask)
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, mask)


def survivors(mask: Mask, exclude: str | Sequence[str] = ()) -> Int[Array, ""]:
    """Count the prunable weights that survive.

    Raises:
      ValueError: no leaf is prunable.
    """
    return sum(jnp.sum(m, dtype=jnp.int32) for m in prunable_leaves(mask, exclude))


def size(tree: PyTree[Array], exclude: str | Sequence[str] = ()) -> int:
    """Count the prunable weights, pruned or not.

    Raises:
      ValueError: no leaf is prunable.
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in prunable_leaves(tree, exclude))


def density(mask: Mask, exclude: str | Sequence[str] = ()) -> Float[Array, ""]:
    """Compute the surviving fraction of the prunable weights, in [0, 1]; sparsity is 1 − density.

    Raises:
      ValueError: no leaf is prunable.
    """
    return survivors(mask, exclude) / size(mask, exclude)


def masked(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transform to ignore pruned weights: `update(grads, state, params, mask=mask)`.

    Gradients are masked before `inner`, so its moments and norms ignore pruned weights. Updates are masked
    after it, so a weight that starts a round at zero stays exactly zero whatever `inner` adds (momentum,
    old moments, weight decay). The mask is an argument of `update` and not part of the state, so one compiled
    step serves all rounds.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, *, mask, **extra_args):
        updates, state = inner.update(apply(updates, mask), state, params, **extra_args)
        return apply(updates, mask), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
