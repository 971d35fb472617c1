import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import masking, similarity

DISTANCES = (similarity.angular_distance, similarity.cosine_distance, similarity.euclidean_distance)


def make_vector(*values):
    """Return parameters with one kernel."""
    return {"kernel": jnp.array(values, jnp.float32)}


def dense_distance(distance, a, b):
    """Compute the distance between networks without pruned weights."""
    return distance(a, masking.ones_like(a), b, masking.ones_like(b))


@pytest.mark.parametrize(
    ("a", "b", "angular", "cosine", "euclidean"),
    [
        ((1, 0), (0, 1), 1, 1, np.sqrt(2)),  # orthogonal
        ((1, 0), (1, 1), 0.5, 1 - np.sqrt(0.5), 1),  # 45°
        ((1, 2), (3, 6), 0, 0, np.sqrt(20)),  # parallel
        ((1, 2), (-1, -2), 2, 2, np.sqrt(20)),  # opposite
        ((3, 4), (3, 4), 0, 0, 0),
    ],
)
def test_distances_equal_closed_forms(a, b, angular, cosine, euclidean):
    got = [dense_distance(distance, make_vector(*a), make_vector(*b)) for distance in DISTANCES]
    np.testing.assert_allclose(got, [angular, cosine, euclidean], atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 0.37, 1e6])
def test_parallel_and_opposite_networks_give_no_nan(scale):
    a = {"kernel": jax.random.normal(jax.random.key(0), (1000,))}
    b = jax.tree.map(lambda x: scale * x, a)
    assert dense_distance(similarity.angular_distance, a, b) == pytest.approx(0, abs=1e-5)
    assert dense_distance(similarity.angular_distance, a, jax.tree.map(jnp.negative, b)) == pytest.approx(
        2, abs=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_distances_are_accurate_for_very_small_and_large_weights(dtype):
    """Squares of the weights overflow or underflow float32; sums in 16 bits would lose most digits."""
    draws = jax.random.normal(jax.random.key(0), (2, 3000)).astype(dtype)
    a, b = ({"kernel": draw} for draw in draws)
    u, v = np.asarray(draws, float)
    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    for exponent in (0, 4) if dtype == "float16" else (-80, -23, 0, 50, 80):
        scale = 2.0**exponent
        scaled = [jax.tree.map(lambda p: (p * scale).astype(dtype), tree) for tree in (a, b)]  # noqa: B023
        expected = [2 * np.arccos(cosine) / np.pi, 1 - cosine, scale * np.linalg.norm(u - v)]
        got = [dense_distance(distance, *scaled) for distance in DISTANCES]
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        masks = [masking.ones_like(a)] * 2
        got = [similarity.distance_matrix(scaled, masks, distance)[0, 1] for distance in DISTANCES]
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_distances_without_jit_and_in_double_precision():
    params, masks = random_networks(2)
    arguments = params[0], masks[0], params[1], masks[1]
    expected = [distance(*arguments) for distance in DISTANCES]
    for setting in (jax.disable_jit(), jax.enable_x64(True)):
        with setting:
            got = [distance(*arguments) for distance in DISTANCES]
            matrices = similarity.distance_matrices(
                *(jax.tree.map(lambda *x: jnp.stack(x), *t) for t in (params, masks))
            )
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        np.testing.assert_allclose([matrix[0, 1] for matrix in matrices.values()], expected, rtol=1e-4)


def test_small_angles_are_precise():
    """The arccos of the cosine in float32 would be 0."""
    angle = 1e-4
    a, b = make_vector(1, 0), make_vector(np.cos(angle), np.sin(angle))
    assert dense_distance(similarity.angular_distance, a, b) == pytest.approx(2 * angle / np.pi, rel=1e-3)


def test_distances_on_the_intersection_of_masks_equal_numpy():
    rng = np.random.default_rng(0)

    def random_tree():
        return {"a": {"kernel": rng.normal(size=(7, 5)), "bias": rng.normal(size=5)}}

    a, b = random_tree(), random_tree()
    mask_a, mask_b = ({"a": {"kernel": rng.random((7, 5)) < 0.6, "bias": np.ones(5, bool)}} for _ in range(2))
    keep = (mask_a["a"]["kernel"] & mask_b["a"]["kernel"]).ravel()
    u, v = (t["a"]["kernel"].ravel()[keep] for t in (a, b))  # biases do not count
    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    expected = [2 * np.arccos(cosine) / np.pi, 1 - cosine, np.linalg.norm(u - v)]
    a, b = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in (a, b))
    got = [jax.jit(distance)(a, mask_a, b, mask_b) for distance in DISTANCES]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_only_prunable_weights_count(distance):
    """Networks that differ only in biases, scales and excluded layers have the distance 0."""

    def make_network(key):
        stem, bias = (jax.random.normal(k, (3, 3)) for k in jax.random.split(key))
        head = {"kernel": jnp.arange(9.0).reshape(3, 3), "bias": bias[0]}
        return {"head": head, "norm": {"scale": bias[1], "bias": bias[2]}, "stem": {"kernel": stem}}

    a, b = make_network(jax.random.key(0)), make_network(jax.random.key(1))
    masks = masking.ones_like(a), masking.ones_like(b)
    assert distance(a, masks[0], b, masks[1], exclude=("stem",)) == 0
    assert distance(a, masks[0], b, masks[1]) > 0.01
    matrix = similarity.distance_matrix([a, b], masks, distance, exclude="stem")
    np.testing.assert_allclose(matrix, 0, atol=1e-3)
    stems = [{"stem": tree["stem"]} for tree in (a, b)]
    expected = similarity.distance_matrix(stems, [masking.ones_like(stem) for stem in stems], distance)
    got = similarity.distance_matrix([a, b], masks, distance, exclude=["head"])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_distances_on_an_empty_intersection_of_masks():
    a, b = make_vector(1, 2), make_vector(3, 4)
    mask_a, mask_b = {"kernel": jnp.array([True, False])}, {"kernel": jnp.array([False, True])}
    assert np.isnan(similarity.angular_distance(a, mask_a, b, mask_b))
    assert np.isnan(similarity.cosine_distance(a, mask_a, b, mask_b))
    assert similarity.euclidean_distance(a, mask_a, b, mask_b) == 0


def random_networks(count=5):
    keys = jax.random.split(jax.random.key(0), count)
    params = [{"kernel": jax.random.normal(key, (30,)), "bias": jax.random.normal(key, (3,))} for key in keys]
    masks = [{"kernel": jax.random.bernoulli(key, 0.7, (30,)), "bias": jnp.ones(3, bool)} for key in keys]
    return params, masks


@pytest.mark.parametrize("distance", DISTANCES)
def test_distance_matrix_equals_pairwise_distances(distance):
    params, masks = random_networks()
    matrix = jax.jit(lambda *trees: similarity.distance_matrix(*trees, distance=distance))(params, masks)
    expected = [
        [distance(p, m, q, n) for q, n in zip(params, masks, strict=True)]
        for p, m in zip(params, masks, strict=True)
    ]
    np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.diag(matrix), 0)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_nan_in_pruned_weights_does_not_count():
    params, masks = random_networks()
    params_with_nan = [
        jax.tree.map(lambda p, m: jnp.where(m, p, jnp.nan), *pair) for pair in zip(params, masks, strict=True)
    ]
    for distance in similarity.METRICS.values():
        np.testing.assert_allclose(
            similarity.distance_matrix(params_with_nan, masks, distance=distance),
            similarity.distance_matrix(params, masks, distance=distance),
            rtol=1e-5,
            atol=1e-6,
        )


def test_distance_matrices_has_the_matrix_of_each_distance():
    params, masks = random_networks()
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (params, masks)]
    matrices = jax.jit(similarity.distance_matrices)(*stacked)
    assert list(matrices) == ["angular", "cosine", "euclidean"]
    for matrix, distance in zip(matrices.values(), DISTANCES, strict=True):
        expected = similarity.distance_matrix(params, masks, distance=distance)
        np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_distance_matrix_of_parallel_opposite_and_disjoint_networks():
    a = {"kernel": jax.random.normal(jax.random.key(0), (100_000,)).at[0].set(2.0)}
    params = [a, a, jax.tree.map(lambda x: 1e-3 * x, a), jax.tree.map(jnp.negative, a)]
    matrix = similarity.distance_matrix(params, [masking.ones_like(a)] * 4)
    expected = [[0, 0, 0, 2], [0, 0, 0, 2], [0, 0, 0, 2], [2, 2, 2, 0]]
    np.testing.assert_allclose(matrix, expected, atol=1e-3)

    first = {"kernel": jnp.zeros(100_000, bool).at[0].set(True)}
    all_others = jax.tree.map(jnp.logical_not, first)
    empty = {"kernel": jnp.zeros(100_000, bool)}
    for distance in (similarity.angular_distance, similarity.cosine_distance):
        matrix = similarity.distance_matrix([a, a, a], [first, all_others, empty], distance=distance)
        np.testing.assert_array_equal(matrix, np.where(np.diag([1, 1, 0]) == 1, 0, np.nan))
    matrix = similarity.distance_matrix([a] * 3, [first, all_others, empty], similarity.euclidean_distance)
    np.testing.assert_array_equal(matrix, 0)


def test_euclidean_distance_of_close_networks_is_precise():
    a = {"kernel": jax.random.normal(jax.random.key(0), (100_000,))}
    b = jax.tree.map(lambda x: x + 1e-4 * jax.random.normal(jax.random.key(1), x.shape), a)
    matrix = similarity.distance_matrix([a, b], [masking.ones_like(a)] * 2, similarity.euclidean_distance)
    assert matrix[0, 1] == pytest.approx(1e-4 * np.sqrt(100_000), rel=0.01)


def test_distance_matrix_accepts_a_users_distance():
    params, masks = random_networks()

    def bias_distance(params_a, mask_a, params_b, mask_b):
        return jnp.abs(params_a["bias"] - params_b["bias"]).sum()

    matrix = similarity.distance_matrix(params, masks, distance=bias_distance)
    biases = np.stack([p["bias"] for p in params])
    np.testing.assert_allclose(matrix, np.abs(biases[:, None] - biases).sum(-1), rtol=1e-5)


def make_mask(**layers):
    """Return a mask with these kernels, lists of 0 and 1, and a bias in each layer, which does not count."""
    return {
        name: {"kernel": jnp.array(kernel, bool), "bias": jnp.ones(7, bool)} for name, kernel in layers.items()
    }


def test_jaccard_index_of_planted_overlaps():
    a = make_mask(first=[1, 1, 1, 0, 0, 0], second=[1, 1, 0, 0])
    b = make_mask(first=[0, 1, 1, 1, 0, 0], second=[0, 0, 1, 1])
    assert similarity.jaccard_index(a, b) == pytest.approx(2 / 8)
    assert similarity.jaccard_index(a, b, exclude="second") == pytest.approx(2 / 4)
    assert similarity.jaccard_index(a, b, exclude=("first",)) == 0
    assert similarity.jaccard_index(a, a) == 1


def test_chance_jaccard_is_the_ratio_of_expectations_over_all_masks_of_these_layer_densities():
    a = make_mask(first=[1, 1, 0, 0], second=[1, 0, 0, 0, 0])
    b = make_mask(first=[0, 1, 1, 1], second=[0, 0, 0, 1, 1])

    def expect_shared(size, count_a, count_b):
        pairs = itertools.product(
            itertools.combinations(range(size), count_a), itertools.combinations(range(size), count_b)
        )
        return np.mean([len(set(one) & set(other)) for one, other in pairs])

    shared = expect_shared(4, 2, 3) + expect_shared(5, 1, 2)
    assert similarity.chance_jaccard(a, b) == pytest.approx(shared / (3 + 5 - shared))
    shared = expect_shared(4, 2, 3)
    assert similarity.chance_jaccard(a, b, exclude="second") == pytest.approx(shared / (2 + 3 - shared))


def test_masks_drawn_independently_have_the_chance_jaccard_in_the_mean():
    sizes, counts_a, counts_b = (300, 60), (30, 45), (90, 12)

    def draw(counts):
        kernels = [np.arange(size) < count for size, count in zip(sizes, counts, strict=True)]
        draws = np.random.default_rng(sum(counts)).permuted
        return {
            f"{i}": {"kernel": draws(np.tile(kernel, (400, 1)), axis=1)} for i, kernel in enumerate(kernels)
        }

    a, b = draw(counts_a), draw(counts_b)
    indices = jax.jit(jax.vmap(similarity.jaccard_index))(a, b)
    chance = jax.vmap(similarity.chance_jaccard)(a, b)
    np.testing.assert_allclose(chance, chance[0])
    # 400 draws with a standard deviation of 0.02
    assert indices.mean() == pytest.approx(float(chance[0]), abs=4e-3)
    pair = (jax.tree.map(lambda leaf: leaf[7], tree) for tree in (a, b))
    assert similarity.jaccard_index(*pair) == pytest.approx(float(indices[7]))


def test_jaccard_index_of_empty_masks():
    empty, half = make_mask(layer=[0, 0, 0, 0]), make_mask(layer=[1, 1, 0, 0])
    for function in (similarity.jaccard_index, similarity.chance_jaccard):
        assert np.isnan(function(empty, empty))
        assert function(empty, half) == 0


def test_masks_with_more_weights_than_an_int32_counts():
    """XLA computes the sums of these constants when it compiles, so no array of a gigabyte is made."""

    @jax.jit
    def compare():
        layers = {name: {"kernel": jnp.ones(2**30, bool)} for name in "abc"}
        return [
            function(layers, {**layers, "c": {"kernel": jnp.zeros(2**30, bool)}})
            for function in (similarity.jaccard_index, similarity.chance_jaccard)
        ]

    np.testing.assert_allclose(compare(), 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("function", [similarity.jaccard_index, similarity.chance_jaccard])
def test_masks_of_other_shapes_or_without_kernels_raise_a_value_error(function):
    with pytest.raises(ValueError, match=r"has shape \(4,\) in one tree and \(1,\)"):
        function(make_mask(layer=[1, 1, 0, 0]), make_mask(layer=[1]))
    with pytest.raises(ValueError, match="no leaf called 'kernel'"):
        function({"bias": jnp.ones(3, bool)}, {"bias": jnp.ones(3, bool)})


def to_logits(*classes):
    """Return logits whose largest entry is that of the given class of each example."""
    return 5.0 * jax.nn.one_hot(jnp.array(classes), 3)


def test_prediction_agreement_is_the_share_of_equal_classes():
    a, b = to_logits(0, 1, 2, 2), to_logits(0, 2, 2, 1)
    assert similarity.prediction_agreement(a, b) == 0.5
    assert similarity.prediction_agreement(a, 3 * a - 1) == 1
    agreement = jax.jit(similarity.prediction_agreement)(jnp.stack([a, b]), jnp.stack([a, a]))
    np.testing.assert_array_equal(agreement, [1, 0.5])
    with pytest.raises(ValueError, match=r"has shape \(4, 3\) in one tree and \(1, 3\)"):
        similarity.prediction_agreement(a, a[:1])


def test_agreement_and_ensemble_of_nan_are_nan():
    a, labels = to_logits(0, 1, 2, 2), jnp.array([0, 1, 2, 2])
    with_nan = a.at[1, 0].set(jnp.nan)
    agreement = similarity.prediction_agreement(jnp.stack([a, a]), jnp.stack([a, with_nan]))
    np.testing.assert_array_equal(agreement, [1, np.nan])
    assert np.isnan(similarity.ensemble_accuracy(jnp.stack([a, with_nan]), labels))
    assert similarity.ensemble_accuracy(jnp.stack([a, a]), labels) == 1


def test_an_ensemble_averages_probabilities():
    """The mean of the logits, which ranks the classes by the product of probabilities, has another winner."""
    probabilities = jnp.array([[[0.98, 0.01, 0.01]], [[0.001, 0.5, 0.499]]])
    logits = jnp.log(probabilities) + jnp.array([7.0, -3.0])[:, None, None]
    assert logits.mean(0).argmax(-1) == 1
    assert similarity.ensemble_accuracy(logits, jnp.array([0])) == 1
    assert similarity.ensemble_accuracy(logits, jnp.array([1])) == 0


def test_an_ensemble_of_equal_networks_gains_nothing_and_one_with_different_errors_does():
    labels = jnp.array([0, 1, 2])
    networks = [to_logits(1, 1, 2), to_logits(0, 0, 2), to_logits(0, 1, 1)]  # each has another error
    for network in networks:
        assert similarity.ensemble_accuracy(network[None], labels) == pytest.approx(2 / 3)
        assert similarity.ensemble_accuracy(jnp.stack([network] * 3), labels) == pytest.approx(2 / 3)
    assert similarity.ensemble_accuracy(jnp.stack(networks), labels) == 1
    assert similarity.ensemble_accuracy(jnp.stack(networks).astype(jnp.bfloat16), labels) == 1
