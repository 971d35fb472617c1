import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import connectivity


def test_path_has_exact_ends_and_equidistant_points():
    a = {"w": jax.random.normal(jax.random.key(0), (3, 2)), "b": jnp.zeros(2)}
    b = {"w": jax.random.normal(jax.random.key(1), (3, 2)), "b": jnp.full(2, 19.0)}
    path = connectivity.linear_path(a, b)
    assert path["w"].shape == (20, 3, 2)
    for name in a:
        np.testing.assert_array_equal(path[name][0], a[name])
        np.testing.assert_array_equal(path[name][-1], b[name])
    np.testing.assert_allclose(path["b"][:, 0], np.arange(20), rtol=1e-6)


def test_a_path_keeps_the_type_of_its_ends():
    ends = {"w": jnp.ones(3, jnp.bfloat16)}
    assert connectivity.linear_path(ends, ends)["w"].dtype == jnp.bfloat16


def test_a_path_needs_two_points():
    with pytest.raises(ValueError, match="num_points is 1"):
        connectivity.linear_path({"w": jnp.ones(1)}, {"w": jnp.ones(1)}, num_points=1)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    # f(α) = 4α(1 − α) + 2α: ends 0 and 2, top 9/4 at α = 3/4; less the line 2α, top 1 at α = 1/2
    [("mean", 9 / 4 - 1), ("linear", 1.0), ("max", 9 / 4 - 2)],
)
def test_barrier_of_a_parabola(baseline, expected):
    alpha = np.linspace(0, 1, 101)
    errors = 4 * alpha * (1 - alpha) + 2 * alpha
    assert connectivity.error_barrier(errors, baseline=baseline) == pytest.approx(expected, abs=1e-5)


def test_no_barrier_in_a_bowl_and_many_paths_at_once():
    alpha = np.linspace(-1, 1, 21)
    errors = np.stack([alpha**2, 1 - alpha**2, np.ones(21)])
    np.testing.assert_allclose(connectivity.error_barrier(errors, "linear"), [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(jax.jit(connectivity.error_barrier)(errors), [0, 1, 0], atol=1e-6)


def test_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="baseline is 'median'"):
        connectivity.error_barrier(jnp.ones(3), baseline="median")
