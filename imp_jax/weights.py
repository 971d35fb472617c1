"""Statistics of the surviving weights: their distribution (figure 5) and the units that they connect.

All functions are pure and may be jitted and vmapped; `exclude` is as in `masking`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, Bool, Float, Int, PyTree

from imp_jax import masking
from imp_jax.masking import Mask, Params
from imp_jax.similarity import widen


def histogram(
    params: Params, mask: Mask, limit: Float[Array, ""], bins: int = 101, exclude: str | Sequence[str] = ()
) -> Int[Array, " bins"]:
    """Count the surviving weights in each of `bins` equal intervals of [−limit, limit] (figure 5).

    With an odd number of bins, one is centred on 0. Weights beyond the limits count in the outermost bins.
    """
    counts = jnp.zeros(bins, jnp.int32)
    for values, survives in _leaves(params, mask, exclude):
        place = jnp.floor((values / limit + 1) / 2 * bins)
        place = jnp.clip(place, 0, bins - 1).astype(jnp.int32)
        counts = counts.at[place.ravel()].add(survives.ravel().astype(jnp.int32))
    return counts


def bimodality(params: Params, mask: Mask, exclude: str | Sequence[str] = ()) -> Float[Array, ""]:
    """Compute Sarle's coefficient (skewness² + 1) / kurtosis of the surviving weights.

    It is 1/3 for a normal distribution, 5/9 for a uniform one, 1 for two points, and nan if all survivors are
    equal.
    """
    leaves = _leaves(params, mask, exclude)
    count = sum(jnp.sum(survives) for _, survives in leaves)
    low = functools.reduce(jnp.minimum, [jnp.min(v, where=m, initial=jnp.inf) for v, m in leaves])
    high = functools.reduce(jnp.maximum, [jnp.max(v, where=m, initial=-jnp.inf) for v, m in leaves])
    # scaled to [0, 1], so that no power leaves the range of float32
    leaves = [((values - low) / (high - low), survives) for values, survives in leaves]

    def mean(function):
        return sum(jnp.sum(function(values), where=survives) for values, survives in leaves) / count

    centre = mean(lambda values: values)
    second, third, fourth = (mean(lambda values, k=k: (values - centre) ** k) for k in (2, 3, 4))
    return (third**2 / second**3 + 1) / (fourth / second**2)


def share_near_zero(
    params: Params, mask: Mask, threshold: Float[Array, ""], exclude: str | Sequence[str] = ()
) -> Float[Array, ""]:
    """Compute the share of survivors with a magnitude below half of `threshold`."""
    leaves = _leaves(params, mask, exclude)
    near = sum(jnp.sum(survives & (jnp.abs(values) < threshold / 2)) for values, survives in leaves)
    return near / sum(jnp.sum(survives) for _, survives in leaves)


def survivors_by_layer(mask: Mask) -> dict[str, Int[Array, ""]]:
    """Count the surviving weights of each layer with a kernel, by its name."""
    return {name: jnp.sum(kernel, dtype=jnp.int32) for name, kernel in kernels(mask).items()}


def dead_units(
    model: nn.Module, variables: dict[str, Any], mask: Mask, image_shape: tuple[int, int, int]
) -> dict[str, Int[Array, ""]]:
    """Count the dead units (or channels) of each layer; see `connectivity_of_units`."""
    alive = connectivity_of_units(model, variables, mask, image_shape)
    return {name: jnp.sum(~units, dtype=jnp.int32) for name, units in alive.items()}


def connectivity_of_units(
    model: nn.Module, variables: dict[str, Any], mask: Mask, image_shape: tuple[int, int, int]
) -> dict[str, Bool[Array, "..."]]:
    """Return whether each unit (or channel) of each layer is on a path of surviving weights.

    A path connects the image with the output: a unit without an incoming or without an outgoing path is dead.
    In a residual network the shortcut bypasses a unit and does not keep it alive. Purely structural: a unit
    that is connected but never active (dead ReLU) is not counted as dead, and the statistics of Flax's
    normalisation layers do not count as paths.

    Paths are propagated through the operations that JAX traces. Layers that are not evaluated are left out. The
    result is empty for a model with an operation whose paths are unknown, such as the products of attention.
    """
    masking.require_same_shapes(variables["params"], mask)
    mask = meta.unbox(mask)
    masks = {name: leaf.astype(jnp.float32) for name, leaf in masking.prunable_by_name(mask).items()}

    def constant(leaf):  # 0.7 and not 1, because arithmetic such as 1 − 1 may give zero
        return jnp.full(leaf.shape, 0.7, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    state = {name: leaves for name, leaves in variables.items() if name != "params"}
    params, state = jax.tree.map(constant, meta.unbox((variables["params"], state)))

    def apply(weights, images):
        merged = jax.tree_util.tree_map_with_path(lambda path, p: weights.get(masking.name(path), p), params)
        with nn.intercept_methods(_without_statistics):
            return model.apply({"params": merged, **state}, images, train=False)

    images = jnp.ones((1, *image_shape))
    closed = jax.make_jaxpr(apply)(masks, images)
    unit_axes = {}

    def outputs(masks):
        weights = [_Weight(name, masks[name]) for name in sorted(masks)]  # as JAX orders a dict
        reached = _propagate(closed, [*weights, _Reached(images)], unit_axes)
        return sum((flow.indicator.sum() for flow in reached if isinstance(flow, _Reached)), jnp.zeros(()))

    try:
        paths = jax.grad(outputs)(masks)
    except _UnknownError:
        return {}
    return {
        _layer(name): jnp.any(
            (paths[name] > 0) & (masks[name] > 0), [i for i in range(masks[name].ndim) if i not in axes]
        )
        for name, axes in unit_axes.items()
    }


class _Weight(NamedTuple):
    """The mask of a kernel, as floats."""

    name: str
    mask: Float[Array, "..."]


class _Reached(NamedTuple):
    """A mask of the elements of an array that a path from the image reaches, as floats."""

    indicator: Float[Array, "..."]


class _UnknownError(Exception):
    """An operation whose paths are unknown."""


_NORMALISATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
_CALLS = {"jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}
_REARRANGEMENTS = {"reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "rev"}
_REARRANGEMENTS |= {"concatenate", "pad", "split"}
_SELECTIONS = {"dynamic_slice", "gather"}  # by indices
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"}
_WINDOWS = {"reduce_window_sum", "reduce_window_max", "reduce_window_min"}
# fmt: off
_ELEMENTWISE = {
    "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "copy", "copy_p", "cos", "cosh",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or",
    "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
}
# fmt: on


def _without_statistics(layer, args, kwargs, context):
    """Replace normalisation layers by the identity, and a custom `conv_general_dilated` by that of `lax`."""
    module = context.module
    method = getattr(context.orig_method, "func", context.orig_method)  # Flax's own also under a subclass
    is_flax_call = method.__module__ == nn.LayerNorm.__module__ and context.method_name == "__call__"
    if isinstance(module, _NORMALISATIONS) and is_flax_call:
        return args[0] if args else kwargs["x"]
    if type(module) is nn.Conv and (module.conv_general_dilated or module.conv_general_dilated_cls):
        plain = module.clone(parent=None, name=None, conv_general_dilated=None, conv_general_dilated_cls=None)
        return plain.apply(module.variables, *args, **kwargs)
    return layer(*args, **kwargs)


def _propagate(closed, inputs, unit_axes):
    """Evaluate a jaxpr on arrays, `_Weight`s and `_Reached`s; record the unit axes of each weight."""
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known |= zip(closed.jaxpr.invars, inputs, strict=True)

    def read(variable):
        return variable.val if isinstance(variable, Literal) else known[variable]

    for equation in closed.jaxpr.eqns:
        outputs = _outputs(equation, [read(variable) for variable in equation.invars], unit_axes)
        known |= zip(equation.outvars, outputs, strict=True)
    return [read(variable) for variable in closed.jaxpr.outvars]


def _outputs(equation, inputs, unit_axes):
    """Evaluate one operation."""
    primitive, params = equation.primitive, equation.params
    if primitive.name in _CALLS:
        inner = next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params)
        inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return _propagate(inner, inputs, unit_axes)
    if not any(isinstance(value, _Weight | _Reached) for value in inputs):
        outputs = primitive.bind(*inputs, **params)
        return outputs if primitive.multiple_results else [outputs]
    if primitive.name in ("optimization_barrier", "convert_element_type"):
        return inputs
    if primitive.name in ("dot_general", "conv_general_dilated"):
        return [_Reached(_binary(_contract(primitive, params, inputs, unit_axes)))]
    if any(isinstance(value, _Weight) for value in inputs):
        raise _UnknownError
    counts = _counts(primitive, params, inputs, equation.outvars[0].aval.shape)
    return [_Reached(_binary(count)) for count in (counts if primitive.multiple_results else [counts])]


def _contract(primitive, params, inputs, unit_axes):
    """Count the paths through a dense layer, a convolution or a product with a constant."""
    if sum(isinstance(value, _Reached) for value in inputs) != 1:
        raise _UnknownError
    operands = []
    for side, value in enumerate(inputs):
        if isinstance(value, _Reached):
            operands.append(value.indicator)
        elif isinstance(value, _Weight):
            axes = _unit_axes(params, side, value.mask.ndim)
            if unit_axes.setdefault(value.name, axes) != axes:  # shared by layers of different kinds
                raise _UnknownError
            operands.append(value.mask)
        else:
            operands.append((value != 0).astype(jnp.float32))
    return primitive.bind(*operands, **{**params, "preferred_element_type": jnp.float32, "precision": None})


def _unit_axes(params, side, rank):
    """Return the axes of a kernel, on one side of a product, that are the units of its layer."""
    dimensions = params["dimension_numbers"]
    if isinstance(dimensions, lax.ConvDimensionNumbers):
        batched = side == 0 or params["batch_group_count"] != 1
        axes = dimensions.rhs_spec[:1]
    else:
        contracted, batched = (axes[side] for axes in dimensions)
        axes = tuple(axis for axis in range(rank) if axis not in contracted)
    if batched:
        raise _UnknownError
    return axes


def _counts(primitive, params, inputs, shape):
    """Count, for each element of an output with this shape, the reached elements that it is computed from."""

    def flow(value):
        return value.indicator if isinstance(value, _Reached) else jnp.zeros(jnp.shape(value))

    name, flows = primitive.name, [flow(value) for value in inputs]
    if name in _REARRANGEMENTS:
        return primitive.bind(*flows, **params)
    if name in _SELECTIONS and not any(isinstance(value, _Reached) for value in inputs[1:]):
        return primitive.bind(flows[0], *inputs[1:], **params)
    if name in _REDUCTIONS:
        return flows[0].sum(params["axes"])
    if name in _WINDOWS:
        return lax.reduce_window_sum_p.bind(*flows, **params)
    if name == "select_n" and not isinstance(inputs[0], _Reached):
        return lax.select_n(inputs[0], *flows[1:])
    if name in ("mul", "and") and not all(isinstance(value, _Reached) for value in inputs):
        factors = [value.indicator if isinstance(value, _Reached) else value != 0 for value in inputs]
        return factors[0] * factors[1]
    if name in _ELEMENTWISE:
        return sum(jnp.broadcast_to(elements, shape) for elements in flows)
    raise _UnknownError


@jax.custom_vjp
def _binary(counts):
    """Return 1 for positive counts, else 0, in gradients too: numbers of paths cannot overflow or underflow."""
    return (counts > 0).astype(jnp.float32)


_binary.defvjp(lambda counts: (_binary(counts), None), lambda _, paths: ((paths > 0).astype(jnp.float32),))


def _leaves(params, mask, exclude):
    """Return the weights, in float32 or better, and their masks, leaf by leaf."""
    masking.require_same_shapes(params, mask)
    values, masks = (masking.prunable_leaves(tree, exclude) for tree in (params, mask))
    return list(zip(map(widen, values), masks, strict=True))


def kernels(tree: PyTree[Array]) -> dict[str, Array]:
    """Return the leaves called kernel, by the name of their layer."""
    return {_layer(name): leaf for name, leaf in masking.prunable_by_name(tree).items()}


def _layer(name):
    return name.rpartition("/")[0]
