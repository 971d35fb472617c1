"""Linear paths between networks, and the error barrier on them (sections 2.1 and 4.3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imp_jax.masking import Params


def linear_path(params_a: Params, params_b: Params, num_points: int = 20) -> Params:
    """θ(α) = (1 − α)·θ_a + α·θ_b at `num_points` equidistant α in [0, 1], ends included and exact.

    Returns: a tree like `params_a` whose leaves lead with an axis of `num_points`; vmap an evaluation over it.

    Raises:
      ValueError: `num_points` below 2.
    """
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; a path needs at least its 2 ends")
    alphas = jnp.linspace(0.0, 1.0, num_points)

    def leaf_path(a, b):
        return jax.vmap(lambda alpha: ((1 - alpha) * a + alpha * b).astype(a.dtype))(alphas)

    return jax.tree.map(leaf_path, params_a, params_b)


def error_barrier(errors: Float[Array, "*paths points"], baseline: str = "mean") -> Float[Array, "*paths"]:
    """The largest increase of the error on a path over its `baseline` (figures 2, 8, 20 and 23).

    Args:
      errors: error (or loss) at equidistant points of one or many paths, ends included, in any unit.
      baseline: what the increase is measured from. `mean` of the two ends, as the paper that introduced
        instability defines it (Frankle et al. 2020, ours); `linear`, the straight line between the ends;
        or `max`, the worse of the two ends.

    Raises:
      ValueError: an unknown baseline.
    """
    errors = jnp.asarray(errors)
    first, last = errors[..., :1], errors[..., -1:]
    if baseline == "mean":
        base = (first + last) / 2
    elif baseline == "linear":
        alphas = jnp.linspace(0.0, 1.0, errors.shape[-1])
        base = (1 - alphas) * first + alphas * last
    elif baseline == "max":
        base = jnp.maximum(first, last)
    else:
        raise ValueError(f"baseline is {baseline!r}; it should be one of 'mean', 'linear', 'max'")
    return jnp.max(errors - base, axis=-1)
