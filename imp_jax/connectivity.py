"""Linear paths between networks, and the error barrier on them (sections 2.1 and 4.3)."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from imp_jax import data, masking, models
from imp_jax.masking import Params
from imp_jax.models.kernels import conv_general_dilated_by
from imp_jax.runtime import devices
from imp_jax.runtime.devices import DATA, MEMBER
from imp_jax.runtime.execution import shard_over_mesh
from imp_jax.training import TrainSpec, Variables, example_sums, sum_over_batches

ESTIMATION_IMAGES = 1000  # training images to re-estimate normalisation statistics from (ours)
PATH_BATCH_SIZE = 500  # at most: the layer outputs at 20 points of a small network fit in the caches of a CPU


def linear_path(params_a: Params, params_b: Params, num_points: int = 20) -> Params:
    """Compute θ(α) = (1 − α)·θ_a + α·θ_b at `num_points` equidistant α in [0, 1]; both ends are exact.

    Returns: a tree like `params_a` with a leading axis of `num_points`; vmap an evaluation over it.

    Raises:
      ValueError: `num_points` is below 2; the two trees differ in structure or shapes.
    """
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; a path needs at least its 2 ends")
    masking.require_same_shapes(params_a, params_b)
    interpolate = jax.vmap(_interpolate, in_axes=(None, None, 0))
    return interpolate(params_a, params_b, jnp.linspace(0.0, 1.0, num_points))


def _interpolate(tree_a, tree_b, alpha):
    """Compute (1 − α)·a + α·b, leaf by leaf in the type of a; the ends are exact even if not finite."""

    def interpolate_leaf(a, b):
        inside = ((1 - alpha) * a + alpha * b).astype(a.dtype)
        return jnp.where(alpha == 0, a, jnp.where(alpha == 1, b.astype(a.dtype), inside))

    return jax.tree.map(interpolate_leaf, tree_a, tree_b)


def error_barrier(errors: Float[Array, "*paths points"], baseline: str = "mean") -> Float[Array, "*paths"]:
    """Compute the largest increase of the error on a path over its `baseline` (figures 2, 8, 20 and 23).

    Args:
      errors: error (or loss) at equidistant points of one or many paths, ends included, in any unit.
      baseline: the error from which the increase is measured: `mean` of the two ends, as in the paper that
        introduced instability (Frankle et al. 2020; our choice); `linear`, the straight line between the ends;
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


def sublevel_excess(*legs: Float[Array, "*paths _"]) -> Float[Array, "*paths"]:
    """Compute how far the error on a path of several legs exceeds the larger error of its two ends.

    It is at least 0. If it is at most ε, the path stays in the set of networks whose error is at most ε above
    that of its worse end, so both ends are in one connected sublevel set (Paul et al. 2023). A pruned network
    and the solution trained from its mask are the ends of such a path over the projection on the mask.

    Args:
      legs: the error (or loss) at points of each leg, in any unit; each leg starts where the one before ends.
    """
    # the points need not be equidistant, because this baseline is constant along the path
    return error_barrier(jnp.concatenate(legs, axis=-1), baseline="max")


def path_metrics(
    variables_a: Variables,
    variables_b: Variables,
    split: data.Split,
    *,
    spec: TrainSpec,
    num_points: int = 20,
    batch_norm: str = "interpolate",
    train: data.Split | None = None,
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Compute the mean cross-entropy (nats) and the error, in [0, 1], at the points of `linear_path`.

    Evaluates as many points per pass over the data as fit in a quarter of the device memory (vmap), and a
    streamed split in a single pass. For convolutional networks (`spec.execution.repeats_convolutions`), the
    points are divided over the devices of this process, and each evaluates one at a time (`lax.map`). If
    the first layer is Flax's own dense layer or convolution in float32, its output is affine in its weights and
    is computed for the two ends only: 20 points of LeNet cost as much as five evaluations.

    Args:
      variables_a, variables_b: the variables of the two ends, as `model.init` returns them.
      split: the whole split to evaluate on.
      batch_norm: "interpolate" interpolates normalisation statistics like the weights (ours); "reestimate"
        averages those of batches of at most 1,000 images of `train`, at equal distances, at every point.
      train: the training set; used by "reestimate" only.

    Raises:
      ValueError: `num_points` below 2; networks of different structures or shapes; an unknown `batch_norm`; or,
        for a model with statistics, "reestimate" without `train` or without a field `norm_momentum`.
    """
    masking.require_same_shapes(variables_a, variables_b)
    (params_a, state_a), (params_b, state_b) = map(_split_params, (variables_a, variables_b))
    states = linear_path(state_a, state_b, num_points)
    path = (params_a, params_b, jnp.linspace(0.0, 1.0, num_points), states)
    spec = spec._replace(mesh=_make_mesh_of_points(num_points) if spec.execution.repeats_convolutions else None)
    if batch_norm == "reestimate":
        path = (*path[:3], _reestimate_statistics(path, train, spec))
    elif batch_norm != "interpolate":
        raise ValueError(f"batch_norm is {batch_norm!r}; it should be one of 'interpolate', 'reestimate'")
    losses, correct = _sum_in_chunks(_path_sums, path, split, spec)
    return losses / split.examples, 1 - correct / split.examples


def _split_params(variables):
    return variables["params"], {name: leaves for name, leaves in variables.items() if name != "params"}


def _sum_in_chunks(function, path, split, spec, batch_size=None):
    """Call `sum_over_batches` for a function of a path, with as many points at a time as fit in memory."""
    params_a, params_b, alphas, states = path
    batch_size = min(batch_size or PATH_BATCH_SIZE, split.evaluation_batch_size, split.examples)
    if spec.mesh:
        split = split.put_on_mesh(spec.mesh)
        points = devices.shard_members((alphas, states), spec.mesh)
        sums = sum_over_batches(
            function, (params_a, params_b, *points), split, spec=spec, batch_size=batch_size
        )
        return devices.gather_members(sums, len(alphas))
    chunk = len(alphas)
    # a streamed split would be decoded again for every chunk; points in a loop follow each other in any case
    if split.in_memory and not spec.execution.repeats_convolutions:
        chunk = _max_points_per_pass(split.image_shape, batch_size, spec)
    sums = []
    for first in range(0, len(alphas), chunk):
        points = jax.tree.map(lambda leaf: leaf[first : first + chunk], (alphas, states))  # noqa: B023
        networks = (params_a, params_b, *points)
        sums.append(sum_over_batches(function, networks, split, spec=spec, batch_size=batch_size))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *sums)


def _make_mesh_of_points(num_points):
    """Return a mesh that divides the points over the devices of this process; None if it is one device."""
    available = jax.local_devices()
    per_device = -(-num_points // len(available))
    used = available[: -(-num_points // per_device)]  # the fewest that are as fast as all
    return Mesh(np.array(used)[:, None], (MEMBER, DATA)) if len(used) > 1 else None


def _max_points_per_pass(image_shape, batch_size, spec):
    """Return how many networks, with all layer outputs for a batch, fit in a quarter of the device memory."""
    return max(1, data.device_memory() // 4 // _bytes_per_network(spec.model, image_shape, batch_size))


@functools.lru_cache(maxsize=16)  # tracing takes as long as evaluating a small network
def _bytes_per_network(model, image_shape, batch_size):
    """Return the size of the parameters of a network and of all layer outputs for a batch."""
    variables = models.shapes(model, image_shape)
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)

    def outputs(variables, images):
        options = {"capture_intermediates": True, "mutable": ["intermediates"]}
        return model.apply(variables, images, train=False, **options)[1]

    arrays = jax.tree.leaves((variables["params"], jax.eval_shape(outputs, variables, images)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


def _map_points(function, alphas, states, spec):
    """Compute `function(alpha, state)` at each point, stacked; on a mesh, each device computes its points."""
    if not spec.execution.repeats_convolutions:
        return jax.vmap(function)(alphas, states)

    def compute_in_turn(alphas, states):
        return jax.lax.map(lambda point: function(*point), (alphas, states))

    return shard_over_mesh(compute_in_turn, (P(MEMBER), P(MEMBER)), spec.mesh)(alphas, states)


def _path_sums(path, images, labels, valid, *, spec):
    """Compute `example_sums` at each point."""
    params_a, params_b, alphas, states = path
    images = spec.normalize(images)

    def sum_point(alpha, state):
        logits = _apply_interpolated(spec, params_a, params_b, alpha, state, images, train=False)
        return example_sums(logits, labels, valid)

    return _map_points(sum_point, alphas, states, spec)


def _batch_statistics(path, images, labels, valid, *, spec):
    """Compute the normalisation statistics of one batch at each point."""
    del labels, valid
    params_a, params_b, alphas, states = path
    images = spec.normalize(images)
    # momentum 0: the result depends on this batch only
    spec = spec._replace(model=spec.model.copy(norm_momentum=0.0))

    def update_statistics(alpha, state):
        options = {"train": True, "mutable": list(state)}
        return _apply_interpolated(spec, params_a, params_b, alpha, state, images, **options)[1]

    return _map_points(update_statistics, alphas, states, spec)


def _reestimate_statistics(path, train, spec):
    """Average the normalisation statistics of batches of training images, at each point."""
    states = path[3]
    if not states:
        return states
    if train is None or not hasattr(spec.model, "norm_momentum"):
        raise ValueError(
            "batch_norm is 'reestimate'; it needs `train` and a model with the field norm_momentum"
        )
    batch_size = min(250, train.examples)
    batches = min(ESTIMATION_IMAGES, train.examples) // batch_size
    # not the first images, and shuffled: a data set may be sorted by class
    chosen = np.linspace(0, train.examples - 1, batches * batch_size).astype(int)
    examples = train.take(np.random.default_rng(0).permutation(chosen))
    sums = _sum_in_chunks(_batch_statistics, path, examples, spec, batch_size)
    return jax.tree.map(lambda leaf: leaf / batches, sums)


def _apply_interpolated(spec, params_a, params_b, alpha, state, images, **options):
    """Apply the model at θ(α); the output of an affine first layer is interpolated from the two ends."""
    params = _interpolate(params_a, params_b, alpha)
    is_first = True

    def intercept(layer, args, kwargs, context):
        nonlocal is_first
        if not (is_first and isinstance(context.module, nn.Dense | nn.Conv)):
            return layer(*args, **kwargs)
        is_first = False
        if not _is_affine(context.module, params, spec.execution.convolutions):
            return layer(*args, **kwargs)
        module = context.module.clone(parent=None, name=None)

        def output(params):
            return module.apply({"params": _params_of_module(params, context.module.path)}, *args, **kwargs)

        return _interpolate(output(params_a), output(params_b), alpha)

    with spec.use_kernels(), nn.intercept_methods(intercept):
        return spec.model.apply({"params": params, **state}, images, **options)


def _is_affine(module, params, implementation):
    """Return whether the output of a dense layer or convolution is certainly affine in its leaves of `params`.

    False for a subclass, for a replaced dot product or convolution, for weights that a wrapper computes from
    others, and for computation in fewer than 32 bits, where interpolating outputs would round differently.
    """
    allowed = {
        nn.Dense: {"dot_general": (None,), "dot_general_cls": (None,)},
        nn.Conv: {
            "conv_general_dilated": (None, conv_general_dilated_by(implementation)),
            "conv_general_dilated_cls": (None,),
        },
    }.get(type(module))
    if allowed is None or any(getattr(module, field) not in values for field, values in allowed.items()):
        return False
    leaves = _params_of_module(params, module.path)
    is_unwrapped = isinstance(leaves, Mapping) and all(
        module.get_variable("params", name) is leaf for name, leaf in leaves.items()
    )
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(leaves)] + [module.dtype or jnp.float32]
    if not is_unwrapped or module.promote_dtype is not promote_dtype:
        return False
    return all(jnp.finfo(dtype).bits >= 32 for dtype in dtypes)


def _params_of_module(params, path):
    """Return the part of `params` at the path of a module; None if there is none."""
    for name in path:
        params = params.get(name) if isinstance(params, Mapping) else None
    return params
