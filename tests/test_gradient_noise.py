"""The gradient noise scale, compared with problems whose noise is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import gradient_noise


def test_noise_scale_inverts_the_expected_squared_norms():
    """E‖g_B‖² = ‖G‖² + tr Σ / B, with ‖G‖² = 3 and tr Σ = 60."""
    estimates = gradient_noise.noise_scale(3 + 60 / 5, 3 + 60 / 40, 5, 40)
    np.testing.assert_allclose(estimates, (3, 60, 20), rtol=1e-5)


def test_noise_scale_is_nan_if_noise_hides_the_gradient():
    estimates = gradient_noise.noise_scale(jnp.array([10.0, 2.0]), jnp.array([1.0, 1.0]), 1, 5)
    np.testing.assert_allclose(estimates.gradient, [-1.25, 0.75])
    np.testing.assert_allclose(estimates.noise_scale, [np.nan, 1.25 / 0.75])


@pytest.mark.parametrize("sizes", [(5, 5), (6, 5), (0, 5)])
def test_the_small_batch_must_be_smaller(sizes):
    with pytest.raises(ValueError, match="it should be above 0 and below big_batch, 5"):
        gradient_noise.noise_scale(1.0, 1.0, *sizes)


def test_squared_norms_match_numpy():
    batches = np.random.default_rng(0).normal(size=(7, 4, 3)).astype(np.float32)
    small, big = gradient_noise.squared_norms(lambda batch: {"a": batch.mean(0), "b": batch[0, :1]}, batches)
    gradients = np.concatenate([batches.mean(1), batches[:, 0, :1]], 1)
    assert small == pytest.approx(np.mean(np.sum(gradients**2, 1)), rel=1e-5)
    assert big == pytest.approx(np.sum(gradients.mean(0) ** 2), rel=1e-5)


def test_estimates_of_a_quadratic_with_known_noise_are_unbiased():
    """The loss ½ θᵀAθ − (b + ε)ᵀθ has the gradient Aθ − b − ε, with independent ε of known variances."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 6))
    matrix, b, theta = (jnp.asarray(x, jnp.float32) for x in (matrix @ matrix.T, *rng.normal(size=(2, 6))))
    deviations = jnp.linspace(1, 6, 6)
    parts, small, draws = 8, 5, 4000

    def gradient(noise):
        def loss(theta):
            return jnp.mean(theta @ matrix @ theta / 2 - (b + noise) @ theta)

        return jax.grad(loss)(theta)

    @jax.jit
    @jax.vmap
    def estimate(key):
        noise = deviations * jax.random.normal(key, (parts, small, 6))
        norms = gradient_noise.squared_norms(gradient, noise)
        return gradient_noise.noise_scale(*norms, small, parts * small)

    estimates = estimate(jax.random.split(jax.random.key(0), draws))
    expected = float(jnp.sum((matrix @ theta - b) ** 2)), 91.0  # Σ k² for k = 1 … 6
    for values, exact in zip(estimates, expected, strict=False):
        values = np.asarray(values, np.float64)
        standard_error = values.std(ddof=1) / np.sqrt(draws)
        assert standard_error < 0.02 * exact  # the test can fail
        assert values.mean() == pytest.approx(exact, abs=4 * standard_error)
