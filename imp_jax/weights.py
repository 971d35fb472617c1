"""What the surviving weights of a network look like: how they are distributed (figure 5), and where they lie.

All functions are pure and may be jitted and vmapped; `exclude` is that of `masking`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imp_jax import masking
from imp_jax.masking import Mask, Params


def histogram(
    params: Params, mask: Mask, limit: Float[Array, ""], bins: int = 101, exclude: Sequence[str] = ()
) -> Int[Array, " bins"]:
    """How many surviving weights lie in each of `bins` equal intervals of [−limit, limit] (figure 5).

    An odd number of bins has one that is centred on 0. A weight beyond the limits counts in the outermost.
    """
    counts = jnp.zeros(bins, jnp.int32)
    for values, survives in _leaves(params, mask, exclude):
        place = jnp.floor((values.astype(jnp.float32) / limit + 1) / 2 * bins)
        place = jnp.clip(place, 0, bins - 1).astype(jnp.int32)
        counts = counts.at[place.ravel()].add(survives.ravel().astype(jnp.int32))
    return counts


def bimodality(params: Params, mask: Mask, exclude: Sequence[str] = ()) -> Float[Array, ""]:
    """Sarle's coefficient (skewness² + 1) / kurtosis of the surviving weights.

    1/3 for a normal distribution, 5/9 for a uniform one, 1 for two points; nan where all survivors are equal.
    """
    leaves = _leaves(params, mask, exclude)
    count = sum(jnp.sum(survives) for _, survives in leaves)

    def mean(function):
        return sum(jnp.sum(function(values), where=survives) for values, survives in leaves) / count

    centre = mean(lambda values: values)
    second, third, fourth = (mean(lambda values, k=k: (values - centre) ** k) for k in (2, 3, 4))
    return (third**2 / second**3 + 1) / (fourth / second**2)


def share_near_zero(
    params: Params, mask: Mask, threshold: Float[Array, ""], exclude: Sequence[str] = ()
) -> Float[Array, ""]:
    """The share of the survivors with a magnitude below half of `threshold`, such as the pruning threshold."""
    leaves = _leaves(params, mask, exclude)
    near = sum(jnp.sum(survives & (jnp.abs(values) < threshold / 2)) for values, survives in leaves)
    return near / sum(jnp.sum(survives) for _, survives in leaves)


def survivors_by_layer(mask: Mask) -> dict[str, Int[Array, ""]]:
    """The number of surviving weights of each layer that has weights, by its name; pruned or not."""
    return {name: jnp.sum(kernel, dtype=jnp.int32) for name, kernel in kernels(mask).items()}


def dead_units(
    model: nn.Module, variables: dict[str, Any], mask: Mask, image_shape: tuple[int, int, int]
) -> dict[str, Int[Array, ""]]:
    """The number of units (or channels) of each layer through which no path of surviving weights leads.

    A path goes from the image to the output: what has no way in, or no way out, is dead. In a residual network
    the shortcut goes round a unit, and does not keep it alive. Whether a ReLU ever opens is not asked.

    What flows through a weight, when every layer averages over its surviving inputs and an image of ones comes
    in, is positive exactly on such paths; it is weight times gradient, as in SynFlow (Tanaka et al. 2020).
    """

    def averaging(path, leaf):
        name = path[-1].key
        if name == "kernel":
            alive = leaf.astype(jnp.float32)
            return alive / jnp.maximum(alive.sum(tuple(range(alive.ndim - 1)), keepdims=True), 1)
        return jnp.full(leaf.shape, float(name == "scale"))

    def neutral(path, leaf):  # statistics under which normalisation does nothing
        return jnp.full(leaf.shape, float(path[-1].key == "var"))

    weights = jax.tree_util.tree_map_with_path(averaging, mask)
    state = {name: leaves for name, leaves in variables.items() if name != "params"}
    state = jax.tree_util.tree_map_with_path(neutral, state)
    apply = functools.partial(model.copy(dtype=jnp.float32).apply, train=False)
    gradients = jax.grad(
        lambda weights: apply({"params": weights, **state}, jnp.ones((1, *image_shape))).sum()
    )(weights)
    flows = jax.tree.map(jnp.multiply, weights, gradients)
    return {
        name: jnp.sum(flow.sum(tuple(range(flow.ndim - 1))) <= 0, dtype=jnp.int32)
        for name, flow in kernels(flows).items()
    }


def _leaves(params, mask, exclude):
    """Weights and whether they survive, leaf by leaf."""
    pairs = (masking.prunable_leaves(tree, exclude) for tree in (params, mask))
    return list(zip(*pairs, strict=True))


def kernels(tree):
    """The leaves called kernel, by the name of their layer."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(key.key for key in path[:-1]): leaf for path, leaf in leaves if path[-1].key == "kernel"}
