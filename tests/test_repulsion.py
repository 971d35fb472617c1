"""J_r: the plain form, `repulsion_loss`, compared with NumPy, and the store of optima with the plain form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imp_jax import imp, masking, pruning, repulsion, training
from imp_jax.arms import ARMS
from imp_jax.members import member_keys
from imp_jax.models.lenet import LeNet

MEMBERS = 2
SHAPES = {"a": {"kernel": (9, 8), "bias": (8,)}, "b": {"kernel": (8, 3), "bias": (3,)}}


def random_trees(count, seed=0):
    """Return random parameter trees, each with a leading axis of `MEMBERS` members."""
    draw = np.random.default_rng(seed)

    def leaf(shape):
        return jnp.asarray(draw.normal(size=(MEMBERS, *shape)), jnp.float32)

    return [jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple)) for _ in range(count)]


def shrinking_masks(count, seed=1):
    """Return masks of `count` rounds, each a subset of the previous one; the members have different masks."""
    draw = np.random.default_rng(seed)
    masks = [jax.tree.map(lambda p: np.ones(p.shape, bool), random_trees(1)[0])]
    for _ in range(count):
        mask = jax.tree.map(np.copy, masks[-1])
        for layer in mask.values():
            layer["kernel"] &= draw.random(layer["kernel"].shape) < 0.8
        masks.append(mask)
    return masks[1:]


def make_store(earlier, masks, max_optima=100, dtype="float32", exclude=()):
    """Return the store after rounds that ended in `earlier` and were then pruned to `masks`."""
    optima = None
    for params, mask in zip(earlier, masks, strict=True):
        optima = repulsion.add_optimum(
            optima, params, mask, max_optima=max_optima, dtype=dtype, exclude=exclude
        )
    return optima


def take_member(tree, i):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[i]), tree)


def flatten_connections(tree, mask):
    """Return the masked kernels as one vector, without biases."""
    kernels = [np.ravel(np.where(mask[layer]["kernel"], tree[layer]["kernel"], 0)) for layer in sorted(tree)]
    return np.concatenate(kernels).astype(float)


def plain_form(params, mask, earlier, strength, exclude=()):
    """Compute value and gradient of J_r in the plain form."""
    return jax.value_and_grad(repulsion.repulsion_loss)(params, mask, earlier, strength, exclude)


def store_form(params, mask, earlier, strength, exclude=()):
    """Compute value and gradient of J_r with the store, which adds the gradient to another one."""
    masks = [jax.tree.map(lambda m: np.ones_like(m)[None], mask)] * (len(earlier) - 1)
    masks.append(jax.tree.map(lambda m: np.asarray(m)[None], mask))
    optima = make_store([jax.tree.map(lambda p: p[None], tree) for tree in earlier], masks, exclude=exclude)
    optima = take_member(optima, 0)
    params = masking.apply(params, mask)
    value = repulsion.survivor_loss(repulsion.gather_survivors(params, optima), optima, strength)

    # as large as the gradient of J_r, about 1/|θ|; 0 for bfloat16, in which the sum would lose its digits
    def other_gradient(p):
        return jnp.full_like(p, 1 / max(1e-30, np.linalg.norm(p)) if p.dtype == "float32" else 0)

    others = jax.tree.map(other_gradient, params)
    gradient = repulsion.add_gradient(others, params, optima, strength)
    return value, jax.tree.map(jnp.subtract, gradient, others)


FORMS = pytest.mark.parametrize("form", [plain_form, store_form])


@FORMS
def test_value_and_gradient_equal_numpy(form):
    params, *earlier = (take_member(tree, 0) for tree in random_trees(4))
    mask = take_member(shrinking_masks(3)[-1], 0)
    u = flatten_connections(params, mask)
    expected, gradient = 0.0, np.zeros_like(u)
    for tree in earlier:
        v = flatten_connections(tree, mask)
        cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        expected += cosine**2
        # d cos²/du = 2 cos · (v/|u||v| − cos · u/|u|²)
        gradient += 2 * cosine * (v / np.linalg.norm(u) / np.linalg.norm(v) - cosine * u / (u @ u))
    value, got = form(params, mask, earlier, -1.0)
    assert value == pytest.approx(-expected / 3, rel=1e-5)
    np.testing.assert_allclose(flatten_connections(got, mask), -gradient / 3, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got["a"]["kernel"][~mask["a"]["kernel"]], 0)
    for layer in ("a", "b"):
        np.testing.assert_array_equal(got[layer]["bias"], 0)


@FORMS
def test_excluded_layers_do_not_count(form):
    params, *earlier = (take_member(tree, 0) for tree in random_trees(3))
    mask = take_member(shrinking_masks(2)[-1], 0)
    only_b = [{"b": tree["b"]} for tree in (params, mask, *earlier)]
    value, gradient = form(only_b[0], only_b[1], only_b[2:], 2.0)
    got, got_gradient = form(params, mask, earlier, 2.0, exclude=("a",))
    assert got == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(got_gradient["b"]["kernel"], gradient["b"]["kernel"], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got_gradient["a"]["kernel"], 0)


@FORMS
def test_value_does_not_depend_on_the_scale_of_the_weights(form):
    params, *earlier = (take_member(tree, 0) for tree in random_trees(3))
    mask = take_member(shrinking_masks(2)[-1], 0)
    scaled = jax.tree.map(lambda p: 7.5 * p, params)
    value, gradient = form(params, mask, earlier, 2.0)
    scaled_value, scaled_gradient = form(scaled, mask, earlier, 2.0)
    assert scaled_value == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(
        7.5 * flatten_connections(scaled_gradient, mask),
        flatten_connections(gradient, mask),
        rtol=1e-3,
        atol=1e-5,
    )
    # so the gradient is orthogonal to the weights
    assert abs(flatten_connections(gradient, mask) @ flatten_connections(params, mask)) < 1e-4 * np.linalg.norm(
        flatten_connections(params, mask)
    )


@FORMS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradient_are_accurate_for_very_small_and_large_weights(form, dtype):
    """1,000 weights of size 1e-12 to 1e15; products of their squared norms overflow or underflow float32."""
    draws = jax.random.normal(jax.random.key(0), (2, 1000))
    params, earlier = ({"kernel": (draw + 0.5).astype(dtype)} for draw in draws)
    mask = masking.ones_like(params)
    u, v = (flatten_connections({"a": tree}, {"a": mask}) for tree in (params, earlier))
    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    gradient = 4 * cosine * (v / np.linalg.norm(u) / np.linalg.norm(v) - cosine * u / (u @ u))
    rtol = 1e-4 if dtype == "float32" else 1e-2
    for scale in (2.0**-23, 2.0**-40, 1, 2.0**50):  # exact in both types
        scaled = [jax.tree.map(lambda p: (p * scale).astype(p.dtype), tree) for tree in (params, earlier)]  # noqa: B023
        value, got = form(scaled[0], mask, scaled[1:], 2.0)
        assert value == pytest.approx(2 * cosine**2, rel=1e-4)
        got = np.asarray(got["kernel"], float) * scale
        np.testing.assert_allclose(got, gradient, rtol=rtol, atol=rtol * np.abs(gradient).max())


@FORMS
def test_value_is_0_if_orthogonal_and_the_strength_if_parallel(form):
    mask = {"kernel": jnp.ones(2, bool)}
    along, across = {"kernel": jnp.array([3.0, 0.0])}, {"kernel": jnp.array([0.0, 2.0])}
    assert form(along, mask, [across], 2.0)[0] == 0
    assert form(along, mask, [along], 2.0)[0] == pytest.approx(2)
    assert form(along, mask, [along, across], 2.0)[0] == pytest.approx(1)
    assert form(along, mask, [along], -1.0)[0] == pytest.approx(-1)


def test_value_without_earlier_optima_is_0():
    params = random_trees(1)[0]
    assert repulsion.repulsion_loss(params, shrinking_masks(1)[0], []) == 0


@FORMS
def test_value_and_gradient_are_0_at_zero_norm(form):
    params = take_member(random_trees(1)[0], 0)
    mask = take_member(shrinking_masks(1)[0], 0)
    zero = jax.tree.map(jnp.zeros_like, params)
    for theta, earlier in ((zero, params), (params, zero)):
        value, gradient = form(theta, mask, [earlier], 2.0)
        assert value == 0
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_store_equals_the_plain_form_in_every_round():
    """Under jit and vmap, with different masks of members and with unused slots and rows."""
    params, *earlier = random_trees(9)
    masks = shrinking_masks(8)

    @jax.jit
    @jax.vmap
    def value_and_gradient(params, optima):
        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient = repulsion.add_gradient(zeros, params, optima, 2.0)
        return repulsion.survivor_loss(repulsion.gather_survivors(params, optima), optima, 2.0), gradient

    for count in range(1, 9):
        optima, mask = make_store(earlier[:count], masks[:count]), masks[count - 1]
        theta = masking.apply(params, mask)
        values, gradients = value_and_gradient(theta, optima)
        losses, cosines = repulsion.summary(theta, optima, 2.0)
        for i in range(MEMBERS):
            member_optima = [take_member(tree, i) for tree in earlier[:count]]
            value, gradient = plain_form(take_member(theta, i), take_member(mask, i), member_optima, 2.0)
            assert values[i] == pytest.approx(float(value), rel=1e-5)
            assert losses[i] == pytest.approx(float(value), rel=1e-5)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
                take_member(gradients, i),
                gradient,
            )
            u, *optimum_vectors = (
                flatten_connections(tree, take_member(mask, i))
                for tree in (take_member(theta, i), *member_optima)
            )
            expected = np.mean([u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in optimum_vectors])
            assert cosines[i] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("max_optima", [1, 2])
def test_bounded_store_holds_only_the_last_optima(max_optima):
    params, *earlier = random_trees(6)
    masks = shrinking_masks(5)
    theta = masking.apply(params, masks[-1])
    last = make_store(earlier, masks, max_optima=max_optima)
    expected = make_store(earlier[-max_optima:], masks[-max_optima:])
    assert last.shape[0] == max_optima
    np.testing.assert_allclose(
        repulsion.summary(theta, last, 2.0), repulsion.summary(theta, expected, 2.0), rtol=1e-6
    )


def lenet_stores(max_optima):
    """Yield the store after each of 24 rounds of LeNet, with random weights instead of trained ones."""
    initial = LeNet().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    masks = jax.tree.map(lambda p: jnp.ones((MEMBERS, *p.shape), bool), initial)
    prune = jax.jit(jax.vmap(lambda p, m: pruning.prune_by_magnitude(p, m, fraction=0.2)[0]))
    optima = None
    for number in range(24):
        key = jax.random.key(number)
        trained = jax.tree.map(
            lambda p: p.std() * jax.random.normal(key, (MEMBERS, *p.shape)),  # noqa: B023
            initial,
        )
        trained = masking.apply(trained, masks)
        masks = prune(trained, masks)
        optima = repulsion.add_optimum(optima, trained, masks, max_optima=max_optima)
        yield optima


def test_store_is_small_and_has_few_shapes():
    """For P weights it has at most 1.7 P numbers; 24 copies would be 24 P. Each shape compiles one program."""
    parameters = 266_200  # prunable ones
    stores = list(lenet_stores(max_optima=24))
    numbers = [rows * sum(slots) for rows, *slots in (optima.shape for optima in stores)]
    assert max(numbers) <= 1.7 * parameters
    for optima in stores:
        for positions in jax.tree.leaves(optima.positions):
            assert (np.diff(positions) > 0).all()  # sorted and unique, also in unused slots
    assert len({optima.shape for optima in stores}) <= 8
    assert [int(optima.count[0]) for optima in stores] == list(range(1, 25))
    used_slots = [np.count_nonzero(np.concatenate(jax.tree.leaves(o.values), -1)) / MEMBERS for o in stores]
    for number, used in enumerate(used_slots, start=1):
        assert used == pytest.approx(number * parameters * 0.8**number, abs=3 * number)

    last = list(lenet_stores(max_optima=1))
    assert max(sum(optima.shape[1:]) for optima in last) <= 0.81 * parameters
    assert len({optima.shape for optima in last}) <= 4
    for number, optima in enumerate(last, start=1):  # not mostly empty, unless it is small
        needed = parameters * 0.8**number
        assert sum(optima.shape[1:]) <= max(4.1 * needed, 0.1 * parameters)


@pytest.mark.parametrize(
    ("fraction", "max_shapes", "max_size"), [(0.05, 8, 9.3), (0.1, 8, 4.5), (0.2, 8, 1.7), (0.5, 2, 1.7)]
)
def test_store_has_few_shapes_for_any_pruned_fraction(fraction, max_shapes, max_size):
    """Slower pruning needs more numbers, n · (1 − fraction)ⁿ · P, but not a new shape in every round."""
    shape, shapes = None, []
    for count in range(1, 25):
        shape = repulsion.next_store_shape(
            shape, count, 24, [round((1 - fraction) ** count * 100_000), 100], 100_100
        )
        assert shape[0] >= count
        shapes.append(shape)
    assert len(set(shapes)) <= max_shapes
    assert max(rows * sum(slots) for rows, *slots in shapes) <= max_size * 100_100


def test_growing_masks_are_rejected():
    earlier, masks = random_trees(2), shrinking_masks(2)
    with pytest.raises(ValueError, match="had pruned"):
        make_store(earlier, masks[::-1])


def test_bfloat16_store_changes_cosines_by_at_most_one_percent():
    params, *earlier = random_trees(6)
    masks = shrinking_masks(5)
    earlier = [jax.tree.map(lambda p, e: p + e, params, tree) for tree in earlier]  # the cosines are about 0.7
    theta = masking.apply(params, masks[-1])
    exact, rounded = (make_store(earlier, masks, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(rounded.values))
    (losses, cosines), (rounded_losses, rounded_cosines) = (
        repulsion.summary(theta, optima, 2.0) for optima in (exact, rounded)
    )
    assert not np.array_equal(cosines, rounded_cosines)
    np.testing.assert_allclose(rounded_cosines, cosines, rtol=0.01)
    np.testing.assert_allclose(rounded_losses, losses, rtol=0.02)


# --- training with repulsion ---


def train_rounds(experiment, rounds):
    """Yield the `RoundEnd` of each round and the store of optima that it began with, which has no twins."""
    optima = None
    for end in itertools.islice(imp.rounds(experiment), rounds):
        yield end, optima
        optima = end.next_optima


@pytest.mark.parametrize("memory", ["all", "last"])
def test_rounds_equal_training_with_the_plain_form(tiny_experiment, memory):
    """The expected networks come from `jax.grad` of cross-entropy + J_r over all earlier networks."""
    experiment = tiny_experiment(
        rounds=5,
        **{
            "optimizer.name": "sgd",  # Adam would amplify the rounding of small gradients
            "optimizer.learning_rate": 0.3,
            "repulsion.strength": 2.0,
            "repulsion.memory": memory,
        },
    )
    images, labels = experiment.dataset.train
    spec = experiment.spec

    @jax.jit
    def step(params, mask, earlier, batch, rate):
        def loss(params):
            logits = spec.model.apply({"params": params}, spec.normalize(images[batch]), train=True)
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()
            return entropy + repulsion.repulsion_loss(params, mask, earlier, 2.0)

        gradient = masking.apply(jax.grad(loss)(params), mask)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    earlier = [[] for _ in experiment.members]
    for number, (end, _) in enumerate(train_rounds(experiment, 5)):
        networks = end.networks
        keys = member_keys(experiment.members, 0, lambda m, n=number: ["data", ARMS[m.arm].number, n])
        for i in range(len(experiment.members)):
            params, mask = take_member((networks.initial["params"], networks.mask), i)
            for epoch, rates in enumerate(experiment.learning_rates):
                key, _ = jax.random.split(jax.random.fold_in(keys[i], epoch))
                batches = jax.random.permutation(key, len(labels))[: 8 * len(rates)].reshape(-1, 8)
                for batch, rate in zip(batches, rates, strict=True):
                    params = step(params, mask, earlier[i], batch, rate)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6),
                params,
                take_member(networks.trained["params"], i),
            )
            trained = take_member(networks.trained["params"], i)
            earlier[i] = [trained] if memory == "last" else [*earlier[i], trained]


def test_repulsion_decreases_and_attraction_increases_the_cosine(tiny_experiment):
    """The mean cosine with the earlier optima after round 2."""
    cosines = {}
    for strength in (2.0, 0.0, -2.0):
        experiment = tiny_experiment(
            epochs=12, **{"repulsion.strength": strength, "optimizer.learning_rate": 0.02}
        )
        rounds = [end.networks for end, _ in train_rounds(experiment, 3)]
        optima = None
        for previous, following in itertools.pairwise(rounds):
            optima = repulsion.add_optimum(optima, previous.trained["params"], following.mask, max_optima=2)
        _, cosine = repulsion.summary(rounds[-1].trained["params"], optima, 2.0)
        cosines[strength] = cosine
    assert np.all(np.abs(cosines[2.0]) < cosines[0.0] - 0.1)
    assert np.all(cosines[0.0] < cosines[-2.0])


def test_strength_0_calls_no_function_of_repulsion(tiny_experiment, monkeypatch):
    for name in ("add_optimum", "add_gradient", "summary"):
        monkeypatch.setattr(repulsion, name, None)
    experiment = tiny_experiment(rounds=2)
    for end, optima in train_rounds(experiment, 2):
        assert optima is end.next_optima is None
        assert not {"repulsion", "cosine"} & set(end.rows[0])


def test_rows_hold_the_term_at_the_end_of_training(tiny_experiment):
    experiment = tiny_experiment(**{"repulsion.strength": -1.0})
    ends = list(imp.rounds(experiment))
    assert len(ends) == 3
    for number, end in enumerate(ends):
        networks = end.networks
        for i, row in enumerate(end.rows):
            earlier = [take_member(earlier_end.networks.trained["params"], i) for earlier_end in ends[:number]]
            params, mask = take_member((networks.trained["params"], networks.mask), i)
            expected = repulsion.repulsion_loss(params, mask, earlier, -1.0)
            assert row["repulsion"] == pytest.approx(float(expected), rel=1e-5)
            assert ("cosine" in row) == bool(number)
            if number:
                u, *optimum_vectors = (flatten_connections(tree, mask) for tree in (params, *earlier))
                expected = np.mean([u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in optimum_vectors])
                assert row["cosine"] == pytest.approx(expected, rel=1e-4)


def test_each_arm_has_its_own_optima_and_twins_those_of_imp(tiny_experiment, monkeypatch):
    """A twin with the random keys of imp equals imp, also with repulsion."""
    monkeypatch.setitem(ARMS, "twin", ARMS["imp"])
    experiment = tiny_experiment(**{"repulsion.strength": 2.0, "instability.rounds": (1, 2)})
    (first, _), (second, optima), (third, _) = train_rounds(experiment, 3)
    first, second_networks = first.networks, second.networks
    for i in range(len(experiment.members)):
        stored = take_member(optima, i).values["Dense_0/kernel"][0]
        mask = np.asarray(second_networks.mask["Dense_0"]["kernel"][i]).ravel()
        trained = np.asarray(first.trained["params"]["Dense_0"]["kernel"][i]).ravel()
        np.testing.assert_array_equal(stored[: mask.sum()], trained[mask])
    for end in (second, third):
        assert [m.arm for m in end.members] == ["imp"] * 2 + ["reinit"] * 2 + ["twin"] * 2
        for replicate in range(2):
            jax.tree.map(
                np.testing.assert_array_equal,
                take_member(end.networks.trained, replicate),
                take_member(end.networks.trained, 4 + replicate),
            )
        assert [row["cosine"] for row in end.rows[:2]] == [row["cosine"] for row in end.rows[4:]]


def test_rounds_with_one_store_shape_share_a_program(tiny_experiment):
    experiment = tiny_experiment(
        rounds=12,
        epochs=1,
        **{"repulsion.strength": 2.0, "repulsion.dtype": "bfloat16", "instability.rounds": ()},
    )
    training.programs(False).scan_steps.clear_cache()
    stores = [optima for _, optima in train_rounds(experiment, 12)][1:]
    assert {str(leaf.dtype) for optima in stores for leaf in jax.tree.leaves(optima.values)} == {"bfloat16"}
    shapes = {None, *(optima.shape for optima in stores)}
    assert len(shapes) <= 8
    assert training.programs(False).scan_steps._cache_size() == len(shapes)


def test_joined_stores_give_each_member_its_own_loss_and_gradient():
    """One store has a slot for each weight of a leaf, the other fewer slots and rows."""
    rng = np.random.default_rng(3)
    shapes = {"a": {"kernel": (2, 4, 3)}, "b": {"kernel": (2, 3, 5)}}

    def draw():
        return jax.tree.map(
            lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: type(s) is tuple
        )

    def make_store(density, rounds):
        masks = jax.tree.map(lambda leaf: rng.random(leaf.shape) < density, draw())
        masks["a"]["kernel"] |= density > 0.5  # a dense leaf
        store = None
        for _ in range(rounds):
            trained = jax.tree.map(np.multiply, draw(), masks)
            store = repulsion.add_optimum(store, trained, masks, max_optima=rounds)
        return store, jax.tree.map(np.multiply, draw(), masks)

    stores, params = zip(make_store(0.9, 3), make_store(0.3, 2), strict=True)
    assert stores[0].positions["a/kernel"].shape[1] == 12 > stores[1].positions["a/kernel"].shape[1]
    joined = repulsion.join_members(stores, {"a/kernel": 12, "b/kernel": 15})
    for positions in jax.tree.leaves(joined.positions):
        assert (np.diff(np.asarray(positions)) > 0).all()  # as scatter and gather are told

    def compute(params, optima):
        loss = repulsion.survivor_loss(repulsion.gather_survivors(params, optima), optima, 2.0)
        return loss, repulsion.add_gradient(jax.tree.map(jnp.zeros_like, params), params, optima, 2.0)

    expected = [jax.vmap(compute)(*each) for each in zip(params, stores, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *expected)
    actual = jax.vmap(compute)(jax.tree.map(lambda *leaves: np.concatenate(leaves), *params), joined)
    assert np.abs(expected[0]).min() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, expected)
