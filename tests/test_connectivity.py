import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import connectivity, data, training
from imp_jax.models.lenet import LeNet
from imp_jax.models.resnet import CifarResNet
from imp_jax.runtime.execution import EXECUTION_MODES
from imp_jax.training import TrainSpec
from tests.helpers import folders


def test_path_has_exact_ends_and_equidistant_points():
    a = {"w": jax.random.normal(jax.random.key(0), (3, 2)), "b": jnp.zeros(2)}
    b = {"w": jax.random.normal(jax.random.key(1), (3, 2)), "b": jnp.full(2, 19.0)}
    path = connectivity.linear_path(a, b)
    assert path["w"].shape == (20, 3, 2)
    for name in a:
        np.testing.assert_array_equal(path[name][0], a[name])
        np.testing.assert_array_equal(path[name][-1], b[name])
    np.testing.assert_allclose(path["b"][:, 0], np.arange(20), rtol=1e-6)


def test_path_keeps_the_dtype_of_its_ends():
    ends = {"w": jnp.ones(3, jnp.bfloat16)}
    assert connectivity.linear_path(ends, ends)["w"].dtype == jnp.bfloat16


def test_path_ends_are_exact_for_non_finite_weights():
    a, b = {"w": jnp.array([jnp.inf, 1.0])}, {"w": jnp.array([2.0, -jnp.inf])}
    path = connectivity.linear_path(a, b, 3)["w"]
    np.testing.assert_array_equal(path, [[np.inf, 1], [np.inf, -np.inf], [2, -np.inf]])


def test_path_rejects_ends_of_different_shapes():
    with pytest.raises(ValueError, match=r"shape \(4, 1\) in one tree and \(4, 3\) in another"):
        connectivity.linear_path({"w": jnp.ones((4, 1))}, {"w": jnp.ones((4, 3))})


def test_path_rejects_fewer_than_two_points():
    with pytest.raises(ValueError, match="num_points is 1"):
        connectivity.linear_path({"w": jnp.ones(1)}, {"w": jnp.ones(1)}, num_points=1)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    # f(α) = 4α(1 − α) + 2α has the ends 0 and 2 and the maximum 9/4 at α = 3/4;
    # f(α) − 2α has the maximum 1 at α = 1/2
    [("mean", 9 / 4 - 1), ("linear", 1.0), ("max", 9 / 4 - 2)],
)
def test_error_barrier_of_a_parabola(baseline, expected):
    alpha = np.linspace(0, 1, 101)
    errors = 4 * alpha * (1 - alpha) + 2 * alpha
    assert connectivity.error_barrier(errors, baseline=baseline) == pytest.approx(expected, abs=1e-5)


def test_error_barrier_of_several_paths():
    alpha = np.linspace(-1, 1, 21)
    errors = np.stack([alpha**2, 1 - alpha**2, np.ones(21)])
    np.testing.assert_allclose(connectivity.error_barrier(errors, "linear"), [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(jax.jit(connectivity.error_barrier)(errors), [0, 1, 0], atol=1e-6)


def test_sublevel_excess_of_two_legs():
    """The first path of each leg rises in the middle to 9/4; the second only falls to its end."""
    alpha = np.linspace(0, 1, 9)
    parabola = 4 * alpha * (1 - alpha) + 2 * alpha  # from 0 to 2, and 9/4 at α = 3/4
    rising, falling = np.stack([parabola, 3 - alpha]), np.stack([2 - alpha[::2], 2 - alpha[::2]])
    np.testing.assert_allclose(connectivity.sublevel_excess(rising, falling), [9 / 4 - 1, 0], atol=1e-6)
    assert connectivity.sublevel_excess(parabola) == pytest.approx(1 / 4)


def test_error_barrier_rejects_an_unknown_baseline():
    with pytest.raises(ValueError, match="baseline is 'median'"):
        connectivity.error_barrier(jnp.ones(3), baseline="median")


# --- metrics of the networks on a path ---


def random_split(examples=30, side=8, channels=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, side, side, channels), np.uint8)
    return data.InMemory(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, examples, np.int32)))


@functools.cache
def make_two_networks(model, shape=(8, 8, 3)):
    """Return variables of two networks, with random biases and statistics."""

    def init(key):
        variables = jax.jit(model.init)(key, jnp.zeros((1, *shape)))
        return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.uniform(key, leaf.shape), dict(variables))

    return init(jax.random.key(0)), init(jax.random.key(1))


NETWORKS = {
    "lenet": LeNet(widths=(20, 10)),
    "resnet8": CifarResNet(depth=8, width=0.25, norm_affine=True),
}


@pytest.mark.parametrize(("name", "execution"), [("lenet", "scan_vmap"), ("resnet8", "scan_unroll")])
def test_path_metrics_equal_those_of_single_points(name, execution):
    model, split = NETWORKS[name], random_split()
    a, b = make_two_networks(model)
    spec = TrainSpec(
        model, normalize=data.Normalize((0.4,) * 3, (0.3,) * 3), execution=EXECUTION_MODES[execution]
    )
    losses, errors = connectivity.path_metrics(a, b, split, spec=spec, num_points=5)
    points = connectivity.linear_path(a, b, 5)  # also interpolates batch statistics
    apply = jax.jit(lambda variables: model.apply(variables, spec.normalize(split.images)))
    logits = np.stack([apply(jax.tree.map(lambda leaf, i=i: leaf[i], points)) for i in range(5)])
    log_likelihoods = jax.nn.log_softmax(logits)[:, np.arange(30), split.labels]
    np.testing.assert_allclose(losses, -log_likelihoods.mean(-1), rtol=1e-4)
    np.testing.assert_allclose(errors, np.mean(logits.argmax(-1) != split.labels, axis=-1), atol=1e-6)


class StdConv(nn.Conv):
    """Standardises its kernel (Qiao et al. 2019), so its output is not affine in the kernel."""

    def param(self, name, *arguments, **options):
        value = super().param(name, *arguments, **options)
        return (value - value.mean((0, 1, 2))) / value.std((0, 1, 2)) if name == "kernel" else value


class WithFirstLayer(nn.Module):
    """A network of two layers with a first layer of the kind `first`."""

    first: str

    @nn.compact
    def __call__(self, images, train=False):
        flat = images.reshape(len(images), -1)
        if self.first == "subclass":
            x = StdConv(4, (3, 3))(images).reshape(len(images), -1)
        elif self.first == "wrapped":
            x = nn.WeightNorm(nn.Dense(9))(flat)
        elif self.first == "lifted":
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
            x = jnp.concatenate(nn.vmap(nn.Dense, axis_size=2, **options)(9)(flat), -1)
        elif self.first == "bfloat16":
            x = nn.Dense(9, param_dtype=jnp.bfloat16)(flat)
        else:
            x = nn.Dense(9)(nn.LayerNorm()(flat))
        return nn.Dense(10)(nn.relu(x))


@pytest.mark.parametrize(
    ("first", "affine"),
    [
        ("subclass", False),
        ("wrapped", False),
        ("lifted", False),
        ("bfloat16", False),
        ("after a norm", True),
    ],
)
def test_path_metrics_equal_those_of_the_middle_network_for_any_first_layer(first, affine, monkeypatch):
    """A layer that is not certainly affine in its weights is evaluated at each point."""
    model, split, answers = WithFirstLayer(first), random_split(12), []
    ends = [jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 8, 8, 3))) for seed in (0, 1)]
    is_affine = connectivity._is_affine
    monkeypatch.setattr(connectivity, "_is_affine", lambda *a: answers.append(is_affine(*a)) or answers[-1])
    spec = TrainSpec(model)
    losses, _ = connectivity.path_metrics(*ends, split, spec=spec, num_points=3)
    assert set(answers) == {affine}
    middle = jax.tree.map(lambda leaf: leaf[1], connectivity.linear_path(*ends, 3))
    logits = jax.jit(model.apply)(middle, spec.normalize(split.images)).astype(jnp.float32)
    expected = -jax.nn.log_softmax(logits)[jnp.arange(12), split.labels].mean()
    assert losses[1] == pytest.approx(float(expected), rel=1e-5)


def test_path_ends_have_the_metrics_of_the_networks():
    split = random_split(2500)  # the last batch is not full
    ends = make_two_networks(NETWORKS["lenet"])
    spec = TrainSpec(NETWORKS["lenet"])
    losses, errors = connectivity.path_metrics(*ends, split, spec=spec)
    for end, variables in zip((0, -1), ends, strict=True):
        end_loss, correct = training.evaluate(
            jax.tree.map(lambda leaf: leaf[None], variables), split, spec=spec
        )
        assert losses[end] == pytest.approx(float(end_loss[0]), rel=1e-6)
        assert errors[end] == pytest.approx(1 - int(correct[0]) / 2500, abs=1e-9)
    assert errors.shape == (20,)


def test_path_metrics_do_not_depend_on_points_per_pass(monkeypatch):
    split, (a, b), spec = random_split(), make_two_networks(NETWORKS["lenet"]), TrainSpec(NETWORKS["lenet"])
    one_pass = connectivity.path_metrics(a, b, split, spec=spec, num_points=7)
    weights = 192 * 20 + 20 + 20 * 10 + 10 + 10 * 10 + 10
    outputs = 30 * (20 + 10 + 10 + 10)  # of three layers and the whole network
    # a quarter of the memory holds three points in float32
    monkeypatch.setattr(data, "device_memory", lambda: 4 * 4 * (3 * (weights + outputs) + 1))
    assert connectivity._max_points_per_pass(split.image_shape, 30, spec) == 3
    np.testing.assert_allclose(
        connectivity.path_metrics(a, b, split, spec=spec, num_points=7), one_pass, rtol=1e-6
    )


def test_reestimated_statistics_are_means_over_batches():
    """Over two shuffled batches of 250 images, which are 500 of the 600 at equal distances."""
    model, train, split = NETWORKS["resnet8"], random_split(600), random_split(20)
    ends = make_two_networks(model)
    spec = TrainSpec(model, execution=EXECUTION_MODES["scan_unroll"])
    losses, _ = connectivity.path_metrics(
        *ends, split, spec=spec, num_points=2, batch_norm="reestimate", train=train
    )
    images = np.asarray(spec.normalize(train.images))
    variables = {**ends[1], "batch_stats": jax.tree.map(jnp.zeros_like, ends[1]["batch_stats"])}

    def statistics(images):  # from zero, one update with momentum 0.9 gives a tenth of the statistics
        _, state = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return jax.tree.map(lambda leaf: 10 * leaf, state["batch_stats"])

    shuffled = images[np.random.default_rng(0).permutation(np.linspace(0, 599, 500).astype(int))]
    halves = [jax.jit(statistics)(half) for half in np.split(shuffled, 2)]
    means = jax.tree.map(lambda *leaves: sum(leaves) / 2, *halves)
    apply = jax.jit(model.apply)
    logits = apply({**ends[1], "batch_stats": means}, spec.normalize(split.images))
    assert np.abs(logits - apply(ends[1], spec.normalize(split.images))).max() > 0.1  # the statistics matter
    assert losses[-1] == pytest.approx(
        float(-jax.nn.log_softmax(logits)[np.arange(20), split.labels].mean()), rel=1e-3
    )


def test_path_metrics_of_a_streamed_split_equal_those_in_memory(tmp_path):
    folders.write_imagenet(tmp_path)
    streamed = data.load("imagenet2012", tmp_path, image_side=16, workers=0).test
    images, labels = map(jnp.concatenate, zip(*streamed.evaluation_batches(4), strict=True))
    model = CifarResNet(depth=8, width=0.25)
    ends = make_two_networks(model, (16, 16, 3))
    spec = TrainSpec(model, execution=EXECUTION_MODES["scan_unroll"])
    for options in ({}, {"batch_norm": "reestimate", "train": streamed}):
        on_stream = connectivity.path_metrics(*ends, streamed, spec=spec, num_points=3, **options)
        if options:
            options["train"] = data.InMemory(images, labels)
        in_memory = connectivity.path_metrics(
            *ends, data.InMemory(images, labels), spec=spec, num_points=3, **options
        )
        np.testing.assert_allclose(on_stream, in_memory, rtol=1e-4)


def test_path_metrics_rejects_bad_batch_norm_options():
    a, b = make_two_networks(NETWORKS["resnet8"])
    spec = TrainSpec(NETWORKS["resnet8"])
    with pytest.raises(ValueError, match="batch_norm is 'recompute'; it should be one of 'interpolate'"):
        connectivity.path_metrics(a, b, random_split(), spec=spec, batch_norm="recompute")
    with pytest.raises(ValueError, match="'reestimate'; it needs `train`"):
        connectivity.path_metrics(a, b, random_split(), spec=spec, batch_norm="reestimate")
