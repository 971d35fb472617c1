"""Linear paths between networks, and the error barrier on them (sections 2.1 and 4.3)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from imp_jax import data, masking
from imp_jax.data import InMemory, Streamed
from imp_jax.masking import Params
from imp_jax.models.fast_cpu import use_kernels
from imp_jax.models.fast_cpu.convolution import conv_general_dilated_by
from imp_jax.training import TrainSpec, Variables, example_sums, sum_over_batches

ESTIMATION_IMAGES = 5000  # of the training set, that normalisation statistics are re-estimated from (ours)


def linear_path(params_a: Params, params_b: Params, num_points: int = 20) -> Params:
    """θ(α) = (1 − α)·θ_a + α·θ_b at `num_points` equidistant α in [0, 1], ends included and exact.

    Returns: a tree like `params_a` whose leaves lead with an axis of `num_points`; vmap an evaluation over it.

    Raises:
      ValueError: `num_points` below 2; ends of different structures or shapes.
    """
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; a path needs at least its 2 ends")
    masking.require_same_shapes(params_a, params_b)
    points = jax.vmap(_point, in_axes=(None, None, 0))
    return points(params_a, params_b, jnp.linspace(0.0, 1.0, num_points))


def _point(tree_a, tree_b, alpha):
    """(1 − α)·a + α·b, leaf by leaf in the type of a; the ends themselves also where they are not finite."""

    def between(a, b):
        inside = ((1 - alpha) * a + alpha * b).astype(a.dtype)
        return jnp.where(alpha == 0, a, jnp.where(alpha == 1, b.astype(a.dtype), inside))

    return jax.tree.map(between, tree_a, tree_b)


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


def path_metrics(
    variables_a: Variables,
    variables_b: Variables,
    split: InMemory | Streamed,
    *,
    spec: TrainSpec,
    num_points: int = 20,
    batch_norm: str = "interpolate",
    train: InMemory | Streamed | None = None,
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Mean cross-entropy (nats) and error, in [0, 1], of the networks at the points of `linear_path`.

    Points are vmapped, as many at once as the device's memory holds with their activations. They are taken one
    by one where `spec` unrolls its members, and all in one pass where the split is streamed. A first layer
    that is Flax's own dense layer or convolution sees the same images at every point and is affine in its
    weights: it is computed for the two ends only, and a path of LeNet costs five evaluations and not twenty.

    Args:
      variables_a, variables_b: what `model.init` returns, of one network each.
      split: what the networks are evaluated on, whole.
      batch_norm: "interpolate" takes normalisation statistics to lie on the path like the weights (ours);
        "reestimate" takes them from 5,000 images of `train`, anew at every point.

    Raises:
      ValueError: `num_points` below 2; an unknown `batch_norm`, or "reestimate" without `train` or with a model
        that has statistics but no field `norm_momentum`; networks of different structures or shapes.
    """
    masking.require_same_shapes(variables_a, variables_b)
    (params_a, state_a), (params_b, state_b) = map(_split_params, (variables_a, variables_b))
    states = linear_path(state_a, state_b, num_points)
    path = (params_a, params_b, jnp.linspace(0.0, 1.0, num_points), states)
    if batch_norm == "reestimate":
        path = (*path[:3], _reestimated(path, train, spec))
    elif batch_norm != "interpolate":
        raise ValueError(f"batch_norm is {batch_norm!r}; it should be one of 'interpolate', 'reestimate'")
    losses, correct = _over_chunks(_path_sums, path, split, spec)
    return losses / split.examples, 1 - correct / split.examples


def _split_params(variables):
    return variables["params"], {name: leaves for name, leaves in variables.items() if name != "params"}


def _over_chunks(function, path, split, spec, batch_size=None):
    """`sum_over_batches` of a function of a path, a few of its points at a time."""
    params_a, params_b, alphas, states = path
    batch_size = batch_size or min(1000, split.examples)
    chunk = len(alphas)
    if isinstance(split, Streamed):  # it would be decoded again for every chunk
        batch_size = min(250, batch_size)
    elif not spec.execution.unroll:  # or they follow each other
        chunk = _max_points_per_pass(params_a, states, split, batch_size, spec)
    sums = []
    for first in range(0, len(alphas), chunk):
        points = jax.tree.map(lambda leaf: leaf[first : first + chunk], (alphas, states))  # noqa: B023
        networks = (params_a, params_b, *points)
        sums.append(sum_over_batches(function, networks, split, spec=spec, batch_size=batch_size))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *sums)


def _max_points_per_pass(params, states, split, batch_size, spec):
    """How many networks, with the outputs of all their layers on a batch, fit into a quarter of the device."""
    state = jax.tree.map(lambda leaf: leaf[0], states)
    images = jax.ShapeDtypeStruct((batch_size, *split.image_shape), jnp.float32)

    def outputs(params, images):
        options = {"capture_intermediates": True, "mutable": ["intermediates"]}
        return spec.model.apply({"params": params, **state}, images, train=False, **options)[1]

    held = jax.tree.leaves((params, jax.eval_shape(outputs, params, images)))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in held)
    return max(1, data.device_memory() // 4 // needed)


def _over_points(function, alphas, states, spec):
    """`function(alpha, state)` at each point, stacked."""
    if spec.execution.unroll:
        return jax.lax.map(lambda point: function(*point), (alphas, states))
    return jax.vmap(function)(alphas, states)


def _path_sums(path, images, labels, counted, *, spec):
    """The sums of `example_sums` at each point."""
    params_a, params_b, alphas, states = path
    images = spec.normalize(images)

    def at(alpha, state):
        logits = _apply_interpolated(spec, params_a, params_b, alpha, state, images, train=False)
        return example_sums(logits, labels, counted)

    return _over_points(at, alphas, states, spec)


def _batch_statistics(path, images, labels, counted, *, spec):
    """The normalisation statistics of one batch, at each point."""
    del labels, counted
    params_a, params_b, alphas, states = path
    images = spec.normalize(images)
    # keeps nothing of the statistics before
    spec = spec._replace(model=spec.model.copy(norm_momentum=0.0))

    def at(alpha, state):
        options = {"train": True, "mutable": list(state)}
        return _apply_interpolated(spec, params_a, params_b, alpha, state, images, **options)[1]

    return _over_points(at, alphas, states, spec)


def _reestimated(path, train, spec):
    """The mean of the statistics of some batches of training images, at each point."""
    states = path[3]
    if not states:
        return states
    if train is None or not hasattr(spec.model, "norm_momentum"):
        raise ValueError(
            "batch_norm is 'reestimate'; it needs `train` and a model with the field norm_momentum"
        )
    batch_size = min(250, train.examples)
    batches = min(ESTIMATION_IMAGES, train.examples) // batch_size
    examples = range(batches * batch_size)
    if isinstance(train, Streamed):
        parts = zip(*train.evaluation_batches(batch_size, examples), strict=True)
        images, labels = map(jnp.concatenate, parts)
    else:
        images, labels = train.images[: len(examples)], train.labels[: len(examples)]
    sums = _over_chunks(_batch_statistics, path, InMemory(images, labels), spec, batch_size)
    return jax.tree.map(lambda leaf: leaf / batches, sums)


def _apply_interpolated(spec, params_a, params_b, alpha, state, images, **options):
    """`model.apply` at θ(α); the output of a first layer that is affine in its weights comes from the ends."""
    params = _point(params_a, params_b, alpha)
    first = True

    def intercept(layer, args, kwargs, context):
        nonlocal first
        if not (first and isinstance(context.module, nn.Dense | nn.Conv)):
            return layer(*args, **kwargs)
        first = False
        if not _is_affine(context.module, params, spec.execution.convolutions):
            return layer(*args, **kwargs)
        module = context.module.clone(parent=None, name=None)

        def output(params):
            return module.apply({"params": _at(params, context.module.path)}, *args, **kwargs)

        return _point(output(params_a), output(params_b), alpha)

    with use_kernels(spec.execution.convolutions), nn.intercept_methods(intercept):
        return spec.model.apply({"params": params, **state}, images, **options)


def _is_affine(module, params, implementation):
    """Whether the output of a dense layer or convolution is certainly affine in its leaves of `params`.

    Not of a subclass, a part replaced by the user's, or weights that a wrapper makes from others; nor where
    rounding in fewer than 32 bits would depend on where it is done.
    """
    own = {
        nn.Dense: {"dot_general": (None,), "dot_general_cls": (None,)},
        nn.Conv: {
            "conv_general_dilated": (None, conv_general_dilated_by(implementation)),
            "conv_general_dilated_cls": (None,),
        },
    }.get(type(module))
    if own is None or any(getattr(module, field) not in known for field, known in own.items()):
        return False
    leaves = _at(params, module.path)
    same = isinstance(leaves, Mapping) and all(
        module.get_variable("params", name) is leaf for name, leaf in leaves.items()
    )
    types = [leaf.dtype for leaf in jax.tree.leaves(leaves)] + [module.dtype or jnp.float32]
    return same and module.promote_dtype is promote_dtype and all(jnp.finfo(kind).bits >= 32 for kind in types)


def _at(params, path):
    """The part of `params` at the path of a module, None if there is none."""
    for name in path:
        params = params.get(name) if isinstance(params, Mapping) else None
    return params
