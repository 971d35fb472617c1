from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imp_jax import masking, pruning, scores

# few distinct magnitudes, so that most trees have ties and zeros
weights = st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.25, 1.0, -1.0, 3.0, 1e-30, -1e30])
fractions = st.sampled_from([0.0, 0.01, 0.125, 0.2, 0.25, 0.5, 0.7, 0.99, 1.0])


@st.composite
def trees(draw):
    """Draw parameters with kernels of 1 to 12 weights, and a mask of them."""
    params, mask = {}, {}
    for layer in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from([(1,), (2, 1), (3, 4), (1, 2, 3)]))
        size = int(np.prod(shape))
        kernel = draw(st.lists(weights, min_size=size, max_size=size))
        keep = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        params[f"layer{layer}"] = {
            "kernel": np.float32(kernel).reshape(shape),
            "bias": np.zeros(2, np.float32),
        }
        mask[f"layer{layer}"] = {"kernel": np.reshape(keep, shape), "bias": np.ones(2, bool)}
    return params, mask


def prune_by_stable_sort(params, mask, fraction):
    """Remove the smallest surviving weights, ties by position; return the survivors and the threshold."""
    alive = np.concatenate([mask[name]["kernel"].ravel() for name in sorted(params)])
    magnitude = np.abs(np.concatenate([params[name]["kernel"].ravel() for name in sorted(params)]))
    order = [i for i in np.argsort(magnitude, kind="stable") if alive[i]]
    removed = order[: round(fraction * len(order))]
    alive[removed] = False
    return alive, max((magnitude[i] for i in removed), default=0.0)


@settings(max_examples=60, deadline=None)
@given(trees(), fractions)
def test_prune_by_magnitude_equals_a_stable_sort(tree, fraction):
    params, mask = tree
    expected, expected_threshold = prune_by_stable_sort(params, mask, fraction)
    next_mask, threshold = pruning.prune_by_magnitude(params, mask, fraction)
    np.testing.assert_array_equal(
        np.concatenate([np.ravel(m) for m in masking.prunable_leaves(next_mask)]), expected
    )
    assert threshold == np.float32(expected_threshold)
    assert all(np.all(layer["bias"]) for layer in next_mask.values())
    assert jax.tree.all(jax.tree.map(lambda n, m: np.all(np.asarray(n) <= m), next_mask, mask))  # a subset


def test_lenet_has_exact_counts_over_25_rounds():
    """The density after n rounds is 0.8ⁿ up to the rounding of counts to integers."""
    sizes = {"a": (784, 300), "b": (300, 100), "c": (100, 10)}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {n: {"kernel": jax.random.normal(k, s)} for k, (n, s) in zip(keys, sizes.items(), strict=True)}
    prune = jax.jit(pruning.prune_by_magnitude)
    mask, expected, last_threshold = masking.ones_like(params), 266_200, 0.0
    for number in range(25):
        assert masking.survivors(mask) == expected
        assert masking.density(mask) == pytest.approx(0.8**number, abs=3 / 266_200)
        mask, threshold = prune(params, mask)
        assert threshold >= last_threshold  # the weights do not change, so the threshold increases
        expected, last_threshold = expected - round(0.2 * expected), threshold


@pytest.mark.parametrize(
    ("total", "fraction", "share"),
    [
        (266200, 1e-05, 3),
        (266200, 2e-05, 5),
        (266200, 0.99999, 266197),
        (45, 0.7, 32),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (25502912, 0.123456789, round(Fraction("0.123456789") * 25502912)),
        (9, np.float32(0.2), 2),
    ],
)
def testrounded_share_of_fractions_near_ties(total, fraction, share):
    assert int(pruning.rounded_share(jnp.int32(total), fraction)) == share


@given(st.integers(0, 2**31 - 1), st.floats(1e-6, 1))
@settings(max_examples=100, deadline=None)
def testrounded_share_is_within_half_a_weight_for_any_float(total, fraction):
    assert abs(int(pruning.rounded_share(jnp.int32(total), fraction)) - Fraction(fraction) * total) <= 0.50001


@given(st.integers(0, 2**31 - 1), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def testrounded_share_is_exact_for_decimal_fractions(total, numerator):
    fraction = numerator / 10_000
    share = pruning.rounded_share(jnp.int32(total), fraction)
    assert int(share) == round(Fraction(numerator, 10_000) * total)


def test_ties_are_pruned_in_order_of_position():
    params = {"a": {"kernel": jnp.array([1.0, -1.0, 1.0])}, "b": {"kernel": jnp.array([-1.0, 1.0])}}
    mask, threshold = pruning.prune_by_magnitude(params, masking.ones_like(params), fraction=0.6)
    np.testing.assert_array_equal(mask["a"]["kernel"], [False, False, False])
    np.testing.assert_array_equal(mask["b"]["kernel"], [True, True])
    assert threshold == 1


def test_pruned_weights_stay_pruned():
    params = {"kernel": jnp.array([5.0, 0.0, 1.0, 2.0, 3.0])}
    mask = {"kernel": jnp.array([False, True, True, True, True])}
    mask, threshold = pruning.prune_by_magnitude(params, mask, fraction=0.5)
    np.testing.assert_array_equal(mask["kernel"], [False, False, False, True, True])
    assert threshold == 1


def test_excluded_layers_keep_their_weights():
    params = {name: {"kernel": jnp.arange(1.0, 11.0)} for name in ("projection_1", "conv", "head")}
    params["conv"]["kernel"] *= 100
    mask, threshold = pruning.prune_by_magnitude(
        params, masking.ones_like(params), 0.25, exclude=("projection_*",)
    )
    assert mask["projection_1"]["kernel"].all()
    np.testing.assert_array_equal(mask["head"]["kernel"], np.arange(10) >= 5)  # 5 of 20, the smallest
    assert mask["conv"]["kernel"].all()
    assert threshold == 5


def test_vmap_over_members_equals_single_members():
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 50))}
    mask = {"kernel": jax.random.bernoulli(jax.random.key(1), 0.7, (4, 50))}
    masks, thresholds = jax.jit(jax.vmap(pruning.prune_by_magnitude))(params, mask)
    for i in range(4):
        expected, threshold = pruning.prune_by_magnitude(
            {"kernel": params["kernel"][i]}, {"kernel": mask["kernel"][i]}
        )
        np.testing.assert_array_equal(masks["kernel"][i], expected["kernel"])
        assert thresholds[i] == threshold


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lowest_scores_are_pruned_also_negative_ones(dtype):
    """GraSP, for example, has negative scores."""
    score_tree = {"kernel": jnp.array([0.5, -2.0, 3.0, -0.5, 0.0, -0.0], dtype)}
    params = {"kernel": jnp.arange(1.0, 7.0)}
    mask, threshold = pruning.prune_by_score(score_tree, params, masking.ones_like(params), 0.5)
    np.testing.assert_array_equal(mask["kernel"], [True, False, True, False, False, True])
    assert threshold == 5  # the threshold is a magnitude of weights, not a score


def random_inputs(params, seed):
    return scores.ScoreInputs(params, masking.ones_like(params), jax.random.key(seed), loss=None, flow=None)


def test_random_score_is_uniform_over_layers():
    params = {"a": {"kernel": jnp.ones(8_000)}, "b": {"kernel": 100 * jnp.ones(2_000)}}
    first, second = (scores.random(random_inputs(params, seed)) for seed in (0, 1))
    mask, _ = pruning.prune_by_score(first, params, masking.ones_like(params), 0.5)
    assert masking.survivors(mask) == 5_000
    kept = int(mask["b"]["kernel"].sum())  # 1,000 expected, with a standard deviation of 20
    assert 800 < kept < 1_200
    assert not np.array_equal(first["a"]["kernel"], second["a"]["kernel"])


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_outside_0_to_1_is_rejected(fraction):
    params = {"kernel": jnp.ones(3)}
    with pytest.raises(ValueError, match="fraction"):
        pruning.prune_by_magnitude(params, masking.ones_like(params), fraction)


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_integer_scores_are_rejected(dtype):
    params = {"kernel": jnp.asarray([1.0, 2.0, 3.0, 4.0])}
    score_tree = {"kernel": jnp.asarray([3, 1, 4, 2], dtype)}
    with pytest.raises(ValueError, match=f"scores are of type {dtype}; they should be floating-point"):
        pruning.prune_by_score(score_tree, params, masking.ones_like(params), 0.25)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_scores_are_pruned_last(dtype):
    nan = np.float32([np.nan, -np.nan])
    assert list(np.signbit(nan)) == [False, True]
    score_tree = {"kernel": jnp.asarray([1.0, *nan, -np.inf, 2.0, np.inf, 0.5]).astype(dtype)}
    params = {"kernel": jnp.ones(7, dtype)}
    for count, kept in ((2, [0, 1, 2, 4, 5]), (5, [1, 2]), (6, [2])):
        mask, _ = pruning.prune_by_score(score_tree, params, masking.ones_like(params), count / 7)
        np.testing.assert_array_equal(np.flatnonzero(mask["kernel"]), kept)


def test_exclude_accepts_a_string_as_one_pattern():
    """Its characters are not patterns: layer `D` is pruned."""
    params = {name: {"kernel": jnp.arange(1.0, 5.0)} for name in ("Dense_0", "Dense_1", "D")}
    mask, _ = pruning.prune_by_magnitude(params, masking.ones_like(params), 0.5, exclude="Dense_1")
    assert [int(mask[name]["kernel"].sum()) for name in params] == [2, 4, 2]


def test_prune_by_magnitude_without_jit_and_in_double_precision():
    params = {"kernel": np.random.default_rng(0).normal(size=40)}
    expected = np.abs(params["kernel"]) > np.sort(np.abs(params["kernel"]))[9]
    mask = {"kernel": np.ones(40, bool)}
    with jax.disable_jit():
        got, threshold = pruning.prune_by_magnitude(params, mask, 0.25)
        assert masking.survivors(got) == 30
    np.testing.assert_array_equal(got["kernel"], expected)
    with jax.enable_x64(True):
        got, threshold = pruning.prune_by_magnitude(params, mask, 0.25)
        assert threshold == np.sort(np.abs(params["kernel"]))[9]
    np.testing.assert_array_equal(got["kernel"], expected)


def test_layer_scope_prunes_the_fraction_of_each_layer():
    generator = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(scale * generator.normal(size=size)), "bias": jnp.zeros(3)}
        for name, scale, size in (("a", 1, 45), ("b", 100, 20), ("out", 0.01, 30))
    }
    scores_tree = jax.tree.map(jnp.abs, params)
    mask, previous = masking.ones_like(params), {"a": 45, "b": 20, "out": 30}
    for _ in range(3):
        earlier = mask
        mask, threshold = pruning.prune_by_score(
            scores_tree, params, mask, 0.2, scope="layer", layer_factors=(("o*", 0.5), ("out", 3.0))
        )
        removed_magnitudes = []
        for name, share in (("a", 0.2), ("b", 0.2), ("out", 0.1)):
            keep, before = mask[name]["kernel"], earlier[name]["kernel"]
            assert keep.sum() == previous[name] - round(share * previous[name])
            previous[name] = int(keep.sum())
            magnitudes = np.abs(params[name]["kernel"])
            removed_magnitudes.append(magnitudes[before & ~keep].max())
            assert removed_magnitudes[-1] <= magnitudes[keep].min()
            assert mask[name]["bias"].all()
        assert threshold == max(removed_magnitudes)


def test_layer_factors_need_the_layer_scope():
    params = {"a": {"kernel": jnp.ones(4)}}
    mask = masking.ones_like(params)
    with pytest.raises(ValueError, match="with the scope 'global' it should be"):
        pruning.prune_by_score(params, params, mask, 0.2, layer_factors=(("a", 0.5),))
    with pytest.raises(ValueError, match="scope is 'unit'; it should be 'global' or 'layer'"):
        pruning.prune_by_score(params, params, mask, 0.2, scope="unit")


@pytest.mark.parametrize("count", [0, 1, 17, 40])
def test_keep_highest_keeps_exactly_the_highest(count):
    values = jax.random.normal(jax.random.key(0), (40,)).round(1)  # with ties
    tree = {"a": {"kernel": values[:15]}, "b": {"kernel": values[15:].reshape(5, 5)}}
    kept = pruning.keep_highest(tree, masking.ones_like(tree), jnp.int32(count))
    flat = np.concatenate([leaf.ravel() for leaf in masking.prunable_leaves(kept)])
    expected = np.zeros(40, bool)
    expected[np.argsort(values, kind="stable")[40 - count :]] = True
    np.testing.assert_array_equal(flat, expected)
