"""BatchNorm with shortcut and ReLU, plain and fused, against Flax's layers and closed forms."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax.models.fast_cpu import normalization, use_kernels
from imp_jax.models.fast_cpu.normalization import batch_norm
from imp_jax.models.layers import BatchNorm

SHAPE = (6, 4, 5, 3)


def arrays(dtype="float32"):
    """Return inputs with different channel means, a shortcut, and the weights of a loss."""
    keys = jax.random.split(jax.random.key(0), 3)
    images, shortcut, weights = (jax.random.normal(key, SHAPE) for key in keys)
    return [array.astype(dtype) for array in (2 * images + jnp.array([0.5, 3.0, -1.0]), shortcut, weights)]


class Reference(nn.Module):
    """`layers.BatchNorm` composed of Flax's layers."""

    affine: bool
    relu: bool
    train: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs, shortcut=None):
        options = {"momentum": 0.8, "use_scale": self.affine, "use_bias": self.affine, "dtype": self.dtype}
        outputs = nn.BatchNorm(use_running_average=not self.train, name="norm", **options)(inputs)
        outputs = outputs if shortcut is None else outputs + shortcut
        return nn.relu(outputs) if self.relu else outputs


class Ours(Reference):
    """`layers.BatchNorm` with the same fields."""

    @nn.compact
    def __call__(self, inputs, shortcut=None):
        options = {"momentum": 0.8, "use_scale": self.affine, "use_bias": self.affine, "dtype": self.dtype}
        norm = BatchNorm(use_running_average=not self.train, relu=self.relu, name="norm", **options)
        return norm(inputs, shortcut)


def outputs_and_gradients(model, variables, images, shortcut, weights):
    """Return outputs with new statistics, the gradients of a loss, and those of the gradients' squared norm."""
    statistics, params = variables["batch_stats"], variables.get("params", {})

    def outputs(params, images, shortcut):
        merged = {"params": params, "batch_stats": statistics}
        return model.apply(merged, images, shortcut, mutable=["batch_stats"])

    def loss(arguments):
        return jnp.sum(jnp.sin(weights * outputs(*arguments)[0]))

    def squared_gradient_norm(arguments):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(loss)(arguments)))

    arguments = (params, images, shortcut)
    return outputs(*arguments), jax.grad(loss)(arguments), jax.grad(squared_gradient_norm)(arguments)


def results(model, kernels, variables, *arguments):
    """Return the leaves of `outputs_and_gradients` of a model with these kernels."""
    with use_kernels(kernels):
        return jax.tree.leaves(jax.jit(functools.partial(outputs_and_gradients, model))(variables, *arguments))


def perturb(variables):
    """Return variables of a normalisation that all differ from their initial values."""
    noise = jax.random.uniform(jax.random.key(1), (3,), minval=0.5, maxval=1.5)
    return jax.tree.map(lambda leaf: leaf + noise, variables)


def is_fused(model, kernels, variables, images, shortcut=None, *_):
    """Return whether the fused kernel computes a normalisation layer of the model."""
    calls = []

    def normalize(*arguments):
        calls.append(arguments)
        return original(*arguments)

    original = normalization._normalize
    with use_kernels(kernels), pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalization, "_normalize", normalize)
        jax.eval_shape(functools.partial(model.apply, mutable=["batch_stats"]), variables, images, shortcut)
    return bool(calls)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("affine", "relu", "no_shortcut"), [(False, True, True), (True, True, False), (True, False, True)]
)
def test_batch_norm_with_shortcut_and_relu_equals_flax(affine, relu, no_shortcut, train):
    images, shortcut, weights = arrays()
    shortcut = None if no_shortcut else shortcut
    reference, ours = (kind(affine, relu, train) for kind in (Reference, Ours))
    variables = reference.init(jax.random.key(0), images, shortcut)
    for kernels in ("flax", "xla"):
        with use_kernels(kernels):
            initialized = ours.init(jax.random.key(0), images, shortcut)
        jax.tree.map(np.testing.assert_array_equal, initialized, variables)
    variables = perturb(variables)
    arguments = (variables, images, shortcut, weights)
    expected = results(reference, "flax", *arguments)
    for a, b in zip(results(ours, "flax", *arguments), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(results(ours, "xla", *arguments), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    assert is_fused(ours, "xla", *arguments)
    assert not is_fused(ours, "flax", *arguments)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_in_bfloat16_equals_flax_up_to_rounding(train):
    """The fused kernel rounds once, after adding the shortcut; Flax rounds the output of each layer."""
    images, shortcut, weights = arrays("bfloat16")
    reference, ours = (kind(True, True, train, jnp.bfloat16) for kind in (Reference, Ours))
    variables = perturb(reference.init(jax.random.key(0), images, shortcut))
    arguments = (variables, images, shortcut)
    assert is_fused(ours, "xla", *arguments)

    def gradients_and_outputs(model, kernels):
        def loss(params, images, shortcut):
            merged = {"params": params, "batch_stats": variables["batch_stats"]}
            outputs, state = model.apply(merged, images, shortcut, mutable=["batch_stats"])
            assert outputs.dtype == jnp.bfloat16
            return jnp.sum(outputs.astype(jnp.float32) * weights), (outputs, state)

        with use_kernels(kernels):
            return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(variables["params"], images, shortcut)

    gradients, (outputs, state) = gradients_and_outputs(ours, "xla")
    expected_gradients, (expected, expected_state) = gradients_and_outputs(reference, "flax")
    dtypes, expected_dtypes = (
        jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (gradients, expected_gradients)
    )
    assert dtypes == expected_dtypes
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    leaves, expected_leaves = map(jax.tree.leaves, ((outputs, gradients), (expected, expected_gradients)))
    for a, b in zip(leaves, expected_leaves, strict=True):
        a, b = (np.asarray(leaf, np.float32) for leaf in (a, b))
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


def test_a_batch_divided_over_a_mesh_axis_equals_the_whole_batch():
    """Compare outputs, statistics and gradients."""
    batch = arrays()
    options = {"use_running_average": False, "momentum": 0.8}
    variables = perturb(BatchNorm(**options).init(jax.random.key(0), *batch[:2]))

    def gradients(axis_name, images, shortcut, weights):
        def loss(images, shortcut):
            norm = BatchNorm(axis_name=axis_name, **options)
            outputs, state = norm.apply(variables, images, shortcut, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(weights * outputs)), (outputs, state)

        return jax.grad(loss, (0, 1), has_aux=True)(images, shortcut)

    for kernels in ("flax", "xla"):
        with use_kernels(kernels):
            whole_gradients, (whole, whole_state) = gradients(None, *batch)
            parts = [array.reshape(2, -1, *SHAPE[1:]) for array in batch]
            apply = jax.vmap(functools.partial(gradients, "data"), axis_name="data")
            part_gradients, (outputs, state) = apply(*parts)
        for a, b in zip((*part_gradients, outputs), (*whole_gradients, whole), strict=True):
            np.testing.assert_allclose(a.reshape(SHAPE), b, rtol=1e-3, atol=1e-5)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole_state), strict=True):
            np.testing.assert_allclose(a, jnp.stack([b, b]), rtol=1e-5)


# --- nn.BatchNorm in a user's model ---


class Plain(nn.Module):
    """A network of plain Flax layers."""

    train: bool
    options: tuple = ()

    @nn.compact
    def __call__(self, images, shortcut=None):
        del shortcut
        norm = nn.BatchNorm(use_running_average=not self.train, **dict(self.options))
        x = nn.Conv(3, (3, 3))(norm(images))
        return nn.Dense(3)(nn.relu(nn.BatchNorm(momentum=0.8)(x, use_running_average=not self.train)))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        (),
        (("epsilon", 0.1), ("momentum", 0.5)),
        (("use_scale", False),),
        (("use_bias", False), ("axis", 3), ("scale_init", nn.initializers.constant(2.0))),
    ],
)
def test_a_network_with_flax_layers_is_the_same_with_the_kernels(options, train):
    images, _, weights = arrays()
    model = Plain(train, options)
    variables = model.init(jax.random.key(0), images)
    with use_kernels("xla"):
        jax.tree.map(np.testing.assert_array_equal, model.init(jax.random.key(0), images), variables)
    variables = {**variables, "batch_stats": perturb(variables["batch_stats"])}
    arguments = (variables, images, None, weights)
    assert is_fused(model, "xla", *arguments)
    ours, expected = (results(model, kernels, *arguments) for kernels in ("xla", "flax"))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


class OwnNorm(nn.BatchNorm):
    """A subclass that doubles the outputs of its parent."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 2 * super().__call__(x, use_running_average)


@pytest.mark.parametrize("wrap", [lambda kind: kind, nn.remat, nn.jit])
@pytest.mark.parametrize("kind", [nn.BatchNorm, OwnNorm])
def test_a_subclass_or_transformed_layer_is_the_same_with_the_kernels(kind, wrap):
    images, _, weights = arrays()
    layer = wrap(kind)(use_running_average=False, momentum=0.8)
    variables = perturb(layer.init(jax.random.key(0), images))

    def loss(params, images):
        merged = {**variables, "params": params}
        outputs, state = layer.apply(merged, images, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(weights * outputs)), (outputs, state)

    def compute(kernels):
        with use_kernels(kernels):
            return jax.tree.leaves(jax.grad(loss, (0, 1), has_aux=True)(variables["params"], images))

    for a, b in zip(compute("onednn"), compute("flax"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "call", "shape"),
    [
        ({"axis": 1}, {}, SHAPE),
        ({"axis": (1, 3)}, {}, SHAPE),
        ({"use_fast_variance": False}, {}, SHAPE),
        ({"param_dtype": jnp.bfloat16}, {}, SHAPE),
        ({"force_float32_reductions": False}, {}, SHAPE),
        ({"dtype": jnp.bfloat16}, {}, SHAPE),  # inputs are float32
        ({}, {"mask": np.arange(6).reshape(6, 1, 1, 1) < 4}, SHAPE),
        ({}, {}, (6, 3)),
        ({}, {}, (2, 3, 4, 5, 3)),
    ],
)
def test_flax_computes_layers_with_unsupported_options(options, call, shape):
    images = jax.random.normal(jax.random.key(0), shape)
    layer = nn.BatchNorm(use_running_average=False, **options)
    variables = layer.init(jax.random.key(0), images)

    def trace(kernels):
        def apply(variables, images):
            return layer.apply(variables, images, mutable=["batch_stats"], **call)

        with use_kernels(kernels):
            return str(jax.make_jaxpr(apply)(variables, images))

    assert trace("xla") == trace("flax")


@pytest.mark.parametrize("flags", [(None, None), (True, True)])
def test_use_running_average_must_be_given_exactly_once(flags):
    images = arrays()[0]
    with use_kernels("xla"), pytest.raises(ValueError, match="use_running_average"):
        nn.BatchNorm(flags[0]).init(jax.random.key(0), images, flags[1])


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation is 'mkl'; it should be one of"), use_kernels("mkl"):
        pass


# --- the kernel ---


def test_the_gradient_of_the_inputs_equals_the_formula_of_the_paper():
    """Ioffe & Szegedy 2015, section 3, in double precision and without ReLU."""
    images, _, weights = (np.asarray(array, np.float64) for array in arrays())
    scale, epsilon = np.array([1.0, 2.0, 0.5]), 1e-5
    n = images.size / 3
    centred = images - images.mean((0, 1, 2))
    var = (centred**2).mean((0, 1, 2))
    d_x_hat = weights * scale
    d_var = (d_x_hat * centred).sum((0, 1, 2)) * -0.5 * (var + epsilon) ** -1.5
    d_mean = -d_x_hat.sum((0, 1, 2)) / np.sqrt(var + epsilon) + d_var * (-2 * centred).mean((0, 1, 2))
    expected = d_x_hat / np.sqrt(var + epsilon) + d_var * 2 * centred / n + d_mean / n

    def loss(images):
        outputs, *_ = batch_norm(images, None, jnp.asarray(scale, jnp.float32), jnp.zeros(3), None, False)
        return jnp.sum(outputs * weights.astype(np.float32))

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(images, jnp.float32)), expected, rtol=1e-3, atol=1e-5)


def test_statistics_of_bfloat16_inputs_have_float32_precision():
    images, shortcut, _ = arrays("bfloat16")
    outputs, mean, var = batch_norm(images, shortcut, jnp.ones(3), jnp.zeros(3), None, True)
    assert outputs.dtype == jnp.bfloat16
    exact = np.asarray(images, np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)
    gradients = jax.grad(lambda *a: batch_norm(*a, jnp.ones(3), jnp.zeros(3), None, True)[0].sum(), (0, 1))
    assert {leaf.dtype for leaf in gradients(images, shortcut)} == {jnp.dtype("bfloat16")}


def test_a_constant_channel_is_mapped_to_its_bias():
    images = jnp.full(SHAPE, 2.0)
    outputs, _, var = batch_norm(images, None, jnp.ones(3), jnp.array([0.0, 1.0, -1.0]), None, True)
    np.testing.assert_array_equal(var, 0)
    np.testing.assert_array_equal(outputs[..., 1], 1)
    np.testing.assert_array_equal(outputs[..., 2], 0)


def test_nan_inputs_give_nan_outputs():
    """Otherwise a diverged training would not be detected."""
    images = arrays()[0].at[0, 0, 0, 0].set(jnp.nan)
    outputs, *_ = batch_norm(images, None, jnp.ones(3), jnp.zeros(3), None, True)
    assert jnp.isnan(outputs[..., 0]).all()
    assert not jnp.isnan(outputs[..., 1:]).any()
