"""Hessian-vector products, largest eigenvalue and trace, compared with dense Hessians and closed forms."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imp_jax import curvature, masking, training
from imp_jax.models.fast_cpu import use_kernels
from imp_jax.runtime.execution import ExecutionMode


class ConvNet(nn.Module):
    """A convolution with BatchNorm and a dense layer."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(3, (3, 3), use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(images.reshape(len(images), -1))))


def make_network(model, seed=0):
    """Return variables, a mask that prunes about a third of the weights, and three batches of five images."""
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(3, 5, 4, 4, 2)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, (3, 5)), jnp.int32)
    variables = model.init(jax.random.key(seed), images[0])
    params, is_weight = variables["params"], masking.prunable(variables["params"])
    mask = jax.tree.map(lambda p, w: rng.random(p.shape) > w / 3, params, is_weight)
    return {**variables, "params": masking.apply(params, mask)}, mask, images, labels


def dense_hessian(model, variables, mask, images, labels):
    """Compute the Hessian of the mean loss over the batches with respect to the surviving weights."""
    flat, unravel = ravel_pytree(variables["params"])
    kept, _ = ravel_pytree(jax.tree.map(lambda m, w: m & w, mask, masking.prunable(mask)))

    def loss(flat):
        def batch_loss(images, labels):
            inputs = {**variables, "params": unravel(flat)}
            logits, _ = model.apply(inputs, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jnp.mean(jnp.stack([batch_loss(*batch) for batch in zip(images, labels, strict=True)]))

    kept = np.flatnonzero(kept)
    return np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64)[np.ix_(kept, kept)]


@functools.partial(jax.jit, static_argnames="spec")
def product(variables, images, labels, vector, *, spec):
    return curvature.training_loss_product(variables, images, labels, vector, spec=spec)


@pytest.mark.parametrize(("model", "convolutions"), [(DenseNet(), "flax"), (ConvNet(), "xla")])
def test_eigenvalue_and_trace_match_the_dense_hessian(model, convolutions):
    variables, mask, images, labels = make_network(model)
    spec = training.TrainSpec(model, execution=ExecutionMode(convolutions=convolutions))
    multiply = functools.partial(product, variables, images, labels, spec=spec)
    hessian = dense_hessian(model, variables, mask, images, labels)
    assert 20 < len(hessian) < 200  # Lanczos, not the whole Hessian
    largest = np.linalg.eigvalsh(hessian)[-1]
    assert curvature.largest_eigenvalue(multiply, mask) == pytest.approx(largest, rel=1e-3)
    trace, error = curvature.hutchinson_trace(multiply, mask, jax.random.key(0), probes=400)
    off_diagonal = hessian - np.diag(np.diag(hessian))
    expected_error = math.sqrt(2 * np.sum(off_diagonal**2) / 400)  # the variance for random signs
    assert error == pytest.approx(expected_error, rel=0.2)
    assert trace == pytest.approx(np.trace(hessian), abs=4 * expected_error)


def quadratic(matrix, shape):
    """Return the product of ½ xᵀAx, for weights x of `shape`, and a dense mask; a bias has curvature too."""

    def loss(params):
        weights = params["kernel"].ravel()
        return weights @ matrix @ weights / 2 + 50 * jnp.sum(params["bias"] ** 2)

    params = {"kernel": jnp.ones(shape), "bias": jnp.ones(2)}
    multiply = jax.jit(lambda vector: curvature.hessian_vector_product(loss, params, vector))
    return multiply, masking.ones_like(params)


def random_matrix(eigenvalues, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))
    return jnp.asarray(basis * eigenvalues @ basis.T, jnp.float32)


@pytest.mark.parametrize(
    ("eigenvalues", "shape"),
    [
        (np.array([2.5]), (1, 1)),
        (np.array([-3.0, 0.5]), (2, 1)),
        (np.linspace(-1, 4, 20), (5, 4)),
        (np.linspace(-1, 4, 21), (7, 3)),
        (np.linspace(-9, 2, 60), (15, 4)),  # the largest in magnitude is negative
        (np.array([5.0, 5.0, *[0.1] * 48]), (10, 5)),
        (np.linspace(-4, -1, 30), (10, 3)),
        (1e-8 * np.linspace(-1, 4, 200), (20, 10)),
    ],
    ids=["one", "two", "dense", "lanczos", "mostly-negative", "double", "negative", "tiny"],
)
def test_eigenvalue_of_a_quadratic(eigenvalues, shape):
    multiply, mask = quadratic(random_matrix(eigenvalues), shape)
    largest = curvature.largest_eigenvalue(multiply, mask)
    assert largest == pytest.approx(eigenvalues.max(), rel=1e-3)
    assert largest == curvature.largest_eigenvalue(multiply, mask)  # the start vector is fixed


def test_eigenvalue_and_trace_are_those_of_the_surviving_weights():
    eigenvalues = np.linspace(0.1, 3, 60)
    matrix = random_matrix(eigenvalues)
    multiply, mask = quadratic(matrix, (20, 3))
    mask["kernel"] = jnp.arange(60).reshape(20, 3) % 2 == 0
    block = np.asarray(matrix)[::2, ::2]
    assert curvature.largest_eigenvalue(multiply, mask) == pytest.approx(
        np.linalg.eigvalsh(block)[-1], rel=1e-3
    )
    trace, error = curvature.hutchinson_trace(multiply, mask, jax.random.key(1))
    assert abs(trace - np.trace(block)) < 4 * error
    assert error < np.trace(block) / 10


def test_trace_of_a_diagonal_quadratic_is_exact():
    multiply, mask = quadratic(jnp.diag(jnp.arange(1.0, 31)), (10, 3))
    trace, error = curvature.hutchinson_trace(multiply, mask, jax.random.key(0), probes=2)
    assert trace == pytest.approx(465)
    assert error == pytest.approx(0, abs=1e-4)


def test_excluded_layers_do_not_count():
    def loss(params):
        return 2 * jnp.sum(params["a"]["kernel"] ** 2) + 8 * jnp.sum(params["b"]["kernel"] ** 2)

    params = {name: {"kernel": jnp.ones((6, 5))} for name in "ab"}

    def multiply(vector):
        return curvature.hessian_vector_product(loss, params, vector)

    mask = masking.ones_like(params)
    assert curvature.largest_eigenvalue(multiply, mask) == pytest.approx(16, rel=1e-3)
    assert curvature.largest_eigenvalue(multiply, mask, "b") == pytest.approx(4, rel=1e-3)
    assert curvature.hutchinson_trace(multiply, mask, jax.random.key(0), "b")[0] == pytest.approx(4 * 30)


def test_eigenvalue_without_a_finite_hessian_or_curvature():
    zero, mask = quadratic(jnp.zeros((30, 30)), (10, 3))
    assert curvature.largest_eigenvalue(zero, mask) == 0
    for matrix, shape in ((jnp.full((30, 30), jnp.nan), (10, 3)), (jnp.full((2, 2), jnp.nan), (2, 1))):
        multiply, mask = quadratic(matrix, shape)
        assert math.isnan(curvature.largest_eigenvalue(multiply, mask))
    mask = jax.tree.map(jnp.zeros_like, mask)
    assert math.isnan(curvature.largest_eigenvalue(multiply, mask))


def test_a_custom_vjp_is_differentiated_in_reverse_over_reverse():
    """Forward mode fails if the gradient itself calls a function with a custom_vjp."""

    @jax.custom_vjp
    def square(x):
        return x**2

    @jax.custom_vjp
    def cube(x):
        return x**3

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * square(x) * g,))
    params, vector = {"kernel": jnp.array([[1.0, 2.0, -3.0]])}, {"kernel": jnp.array([[1.0, -1.0, 2.0]])}

    def loss(params):
        return jnp.sum(cube(params["kernel"])) * params["kernel"].sum()

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(jax.grad(loss), (params,), (vector,))
    x, v = params["kernel"][0], vector["kernel"][0]
    # ∇ = 3x²·Σx + Σx³, so Hv = 6x·Σx·v + 3x²·Σv + Σ3x²v
    expected = 6 * x * x.sum() * v + 3 * x**2 * v.sum() + jnp.sum(3 * x**2 * v)
    jitted = jax.jit(curvature.hessian_vector_product, static_argnums=0)
    for multiply in (curvature.hessian_vector_product, jitted):
        np.testing.assert_allclose(multiply(loss, params, vector)["kernel"][0], expected, rtol=1e-5)


def test_kernels_for_a_cpu_are_differentiated_in_reverse_over_reverse():
    model = ConvNet()
    variables, mask, images, labels = make_network(model)
    vector = masking.apply(jax.tree.map(lambda p: jax.random.normal(jax.random.key(3), p.shape), mask), mask)

    def loss(params, implementation):
        with use_kernels(implementation):
            inputs = {**variables, "params": params}
            logits, _ = model.apply(inputs, images[0], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[0]).mean()

    params = variables["params"]
    losses = [functools.partial(loss, implementation=name) for name in ("flax", "xla")]
    with pytest.raises(TypeError):
        jax.jvp(jax.grad(losses[1]), (params,), (vector,))
    results = [
        jax.jit(functools.partial(curvature.hessian_vector_product, of_kernels))(params, vector)
        for of_kernels in losses
    ]
    flax, xla = (ravel_pytree(result)[0] for result in results)
    np.testing.assert_allclose(xla, flax, rtol=1e-3, atol=1e-4 * np.abs(flax).max())
