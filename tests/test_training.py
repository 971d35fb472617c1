"""Training steps, data order and optimizers, compared with an implementation in NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import data, imp, masking, models, repulsion, training
from imp_jax.data import Normalize
from imp_jax.data.augmentation import augment
from imp_jax.experiment import setup
from imp_jax.models.lenet import LeNet
from imp_jax.runtime.execution import EXECUTION_MODES, ExecutionMode
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.epochs import train_epoch

# --- a network, its gradient and its optimizers in NumPy ---

LAYERS = ("Dense_0", "Dense_1", "Dense_2")


def forward(params, x):
    """Return the logits and the inputs of all layers."""
    inputs = []
    for name in LAYERS:
        inputs.append(x)
        x = x @ params[name]["kernel"] + params[name]["bias"]
        if name != LAYERS[-1]:
            x = np.maximum(x, 0)
    return x, inputs


def cross_entropy(logits, labels):
    logits = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]


def gradient(params, x, labels):
    """Compute the gradient of the mean cross-entropy by backpropagation."""
    logits, inputs = forward(params, x)
    p = np.exp(logits - logits.max(1, keepdims=True))
    delta = p / p.sum(1, keepdims=True)
    delta[np.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    gradients = {}
    for name, z in reversed(list(zip(LAYERS, inputs, strict=True))):
        gradients[name] = {"kernel": z.T @ delta, "bias": delta.sum(0)}
        delta = (delta @ params[name]["kernel"].T) * (z > 0)
    return gradients


def list_leaves(tree):
    return [tree[layer][kind] for layer in LAYERS for kind in ("kernel", "bias")]


def train_in_numpy(config, params, mask, images, labels, orders, rates):
    """Train in float64 with SGD, momentum or Adam; weight decay is in the gradient, pruned weights stay 0."""
    params = jax.tree.map(lambda p, m: np.float64(p) * m, params, mask)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    losses, count = [], 0
    for order, epoch_rates in zip(orders, rates, strict=True):
        for step, rate in enumerate(epoch_rates):
            batch = order[step * config.batch_size : (step + 1) * config.batch_size]
            x = images[batch].reshape(len(batch), -1) / 255.0
            losses.append(cross_entropy(forward(params, x)[0], labels[batch]).mean())
            grads, count = gradient(params, x, labels[batch]), count + 1
            for p, g, m, v, keep in zip(*map(list_leaves, (params, grads, first, second, mask)), strict=True):
                g = (g + config.optimizer.weight_decay * p) * keep
                if config.optimizer.name == "adam":
                    m[...] = 0.9 * m + 0.1 * g
                    v[...] = 0.999 * v + 0.001 * g**2
                    g = (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
                elif config.optimizer.name == "momentum":
                    m[...] = config.optimizer.momentum * m + g
                    g = m
                p -= rate * g * keep
    return params, losses


def data_order(key, epoch):
    """Return the order in which a member sees the 46 examples of the tiny experiment in an epoch."""
    key, _ = jax.random.split(jax.random.fold_in(key, epoch))
    return np.asarray(jax.random.permutation(key, 46))


@pytest.mark.parametrize(
    ("name", "rate", "decay", "execution"),
    [
        ("adam", 12e-4, 0.0, "scan_vmap"),
        ("adam", 1e-2, 0.05, "scan_unroll"),
        ("momentum", 0.1, 0.05, "step_vmap"),
        ("sgd", 0.1, 0.0, "step_unroll"),
    ],
)
def test_two_epochs_equal_numpy(tiny_experiment, name, rate, decay, execution):
    """Covers optimizer, schedule with warmup, masks and data order, for every member of a batched program."""
    config = make_tiny_config(
        execution=execution,
        **{
            "optimizer.name": name,
            "optimizer.momentum": 0.9 if name == "momentum" else None,
            "optimizer.learning_rate": rate,
            "optimizer.weight_decay": decay,
            "optimizer.schedule": "step",
            "optimizer.milestones": (1,),
            "optimizer.warmup_epochs": 0.5,
        },
    )
    experiment = setup(config, make_tiny_dataset())
    model, dataset = experiment.spec.model, experiment.dataset
    members = 3
    keys = jax.random.split(jax.random.key(3), members)
    variables = jax.vmap(lambda key: model.init(key, jnp.zeros((1, 4, 4, 1))))(keys)
    mask = masking.ones_like(variables["params"])
    for layer, key in zip(LAYERS, jax.random.split(jax.random.key(4), 3), strict=True):
        mask[layer]["kernel"] = jax.random.bernoulli(key, 0.6, mask[layer]["kernel"].shape)
    states = training.init_states(variables, mask, spec=experiment.spec)
    losses = []
    for epoch in range(2):
        rates = experiment.learning_rates[epoch]
        states, metrics = train_epoch(
            states, mask, dataset.train, keys, epoch, 0, rates, batch_size=8, spec=experiment.spec
        )
        losses.append(metrics.loss)
    losses = np.concatenate(losses)

    images, labels = (np.asarray(array) for array in dataset.train)
    for i in range(members):
        orders = [data_order(keys[i], epoch) for epoch in range(2)]
        params, expected = train_in_numpy(
            config,
            jax.tree.map(lambda x, i=i: np.asarray(x[i]), variables["params"]),
            jax.tree.map(lambda x, i=i: np.asarray(x[i]), mask),
            images,
            labels,
            orders,
            experiment.learning_rates,
        )
        np.testing.assert_allclose(losses[:, i], expected, rtol=2e-4)
        for got, want in zip(list_leaves(states.params), list_leaves(params), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_pruned_weights_are_zero_after_every_step(tiny_experiment, name):
    experiment = tiny_experiment(**{"optimizer.name": name, "optimizer.weight_decay": 0.1})
    variables = experiment.spec.model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    mask = masking.ones_like(variables["params"])
    mask["Dense_0"]["kernel"] = jax.random.bernoulli(jax.random.key(1), 0.5, (16, 6))
    pruned = ~np.asarray(mask["Dense_0"]["kernel"])
    states = training.init_states(*add_member_axis((variables, mask)), spec=experiment.spec)
    state = jax.tree.map(lambda x: x[0], states)
    step = jax.jit(functools.partial(training.train_step, spec=experiment.spec))
    for i in range(5):
        batch = slice(8 * i, 8 * i + 8)
        images, labels = (array[batch] for array in experiment.dataset.train)
        previous = state
        state, _ = step(state, mask, images, labels, 0.01)
        np.testing.assert_array_equal(np.asarray(state.params["Dense_0"]["kernel"])[pruned], 0)
        assert not np.array_equal(previous.params["Dense_0"]["bias"], state.params["Dense_0"]["bias"])


def add_member_axis(tree):
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


@pytest.mark.parametrize(
    ("execution", "with_repulsion"),
    [*((execution, True) for execution in EXECUTION_MODES), ("scan_vmap", False), ("step_unroll", False)],
)
def test_train_steps_equals_train_step_of_each_member(tiny_experiment, execution, with_repulsion):
    # not Adam: the gradient of a bias before BatchNorm is rounding, which Adam would scale up
    experiment = tiny_experiment(execution=execution, **{"optimizer.name": "momentum"})
    spec = experiment.spec._replace(
        repulsion_strength=2.0,
        normalize=Normalize((0.4,), (0.3,)),
        augmentation=("crop", "flip"),
        model=DenseBatchNorm(),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    variables = jax.vmap(lambda key: dict(spec.model.init(key, jnp.zeros((1, 4, 4, 1)))))(keys)
    masks = jax.tree.map(lambda p: jax.random.bernoulli(keys[0], 0.8, p.shape), variables["params"])
    states = training.init_states(variables, masks, spec=spec)
    singles = [jax.tree.map(lambda x, i=i: jnp.copy(x[i]), states) for i in range(3)]
    rates = experiment.learning_rates[0]
    split = experiment.dataset.train
    optima = (
        repulsion.add_optimum(None, jax.tree.map(jnp.cos, variables["params"]), masks, max_optima=1)
        if with_repulsion
        else None
    )
    states, metrics = train_epoch(states, masks, split, keys, 0, 0, rates, optima, batch_size=8, spec=spec)
    assert metrics.loss.shape == (5, 3)
    step = jax.jit(functools.partial(training.train_step, spec=spec))
    for i, state in enumerate(singles):
        _, augmentation_key = jax.random.split(jax.random.fold_in(keys[i], 0))
        mask, member_optima = jax.tree.map(lambda x, i=i: x[i], (masks, optima))
        for number, rate in enumerate(rates):
            batch = data_order(keys[i], 0)[8 * number : 8 * number + 8]
            key = jax.random.fold_in(augmentation_key, number)
            images = augment(key, split.images[batch], ("crop", "flip"))
            state, step_metrics = step(state, mask, images, split.labels[batch], rate, member_optima)
            assert step_metrics.loss == pytest.approx(float(metrics.loss[number, i]), rel=1e-5)
            assert step_metrics.accuracy == pytest.approx(float(metrics.accuracy[number, i]))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a, b[i], rtol=1e-4, atol=1e-6), state, states)


@pytest.mark.parametrize("execution", ["scan_vmap", "step_unroll"])
def test_epoch_in_two_parts_equals_the_whole_epoch(tiny_experiment, execution):
    experiment = tiny_experiment(execution=execution)
    spec = experiment.spec._replace(augmentation=("crop",))
    keys = jax.random.split(jax.random.key(0), 2)
    variables = jax.vmap(lambda key: experiment.spec.model.init(key, jnp.zeros((1, 4, 4, 1))))(keys)
    masks = masking.ones_like(variables["params"])

    def train(*parts):
        states = training.init_states(variables, masks, spec=experiment.spec)
        for first, last in parts:
            split, rates = experiment.dataset.train, experiment.learning_rates[1, first:last]
            states, _ = train_epoch(states, masks, split, keys, 1, first, rates, batch_size=8, spec=spec)
        return states.params

    jax.tree.map(np.testing.assert_array_equal, train((0, 5)), train((0, 2), (2, 5)))


@pytest.mark.parametrize(
    ("execution", "batch_size"),
    [("scan_vmap", None), ("scan_vmap", 5), ("scan_unroll", 5), ("step_vmap", 5), ("step_unroll", 5)],
)
def test_evaluation_after_an_epoch_equals_numpy_and_changes_no_bit(
    tiny_experiment, monkeypatch, execution, batch_size
):
    """On two splits, also if their last batch is not full."""
    if batch_size:
        monkeypatch.setattr(data.InMemory, "evaluation_batch_size", batch_size)
    experiment = tiny_experiment(execution=execution, **{"dataset.validation": 0.2})
    spec, dataset = experiment.spec, experiment.dataset
    keys = jax.random.split(jax.random.key(0), 3)
    variables = jax.vmap(lambda key: spec.model.init(key, jnp.zeros((1, 4, 4, 1))))(keys)
    masks = masking.ones_like(variables["params"])

    def train(function, **options):
        states = training.init_states(variables, masks, spec=spec)
        batches = dataset.train.training_epochs(keys, 1, 8).epoch(0)
        return function(states, masks, batches, 0, experiment.learning_rates[0], **options, spec=spec)

    splits = [dataset.test, dataset.validation]
    states, metrics, evaluations = train(training.train_and_evaluate, splits=splits)
    jax.tree.map(np.testing.assert_array_equal, (states, metrics), train(training.train_steps))
    assert train(training.train_and_evaluate, splits=[])[2] == []
    for split, (loss, correct) in zip(splits, evaluations, strict=True):
        x, y = np.asarray(split.images).reshape(split.examples, -1) / 255, np.asarray(split.labels)
        for i in range(3):
            logits, _ = forward(jax.tree.map(lambda p, i=i: np.asarray(p[i]), states.params), x)
            assert loss[i] == pytest.approx(cross_entropy(logits, y).mean(), rel=1e-5)
            assert correct[i] == (logits.argmax(1) == y).sum()


class DenseBatchNorm(nn.Module):
    """A model with a second collection of variables, `batch_stats`."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(4)(images.reshape(len(images), -1))
        # a large epsilon, because a unit whose weights are masked would scale up rounding by its inverse root
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=0.1)(x))


def test_running_statistics_are_updated_and_not_masked(tiny_experiment):
    experiment = tiny_experiment()
    model = DenseBatchNorm()
    variables = add_member_axis(dict(model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))))
    masks = masking.ones_like(variables["params"])
    states = training.init_states(variables, masks, spec=experiment.spec)
    split, rates = experiment.dataset.train, experiment.learning_rates[0, :1]
    spec = experiment.spec._replace(model=model)
    key = jax.random.split(jax.random.key(0), 1)
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"][0])
    x = np.asarray(split.images)[data_order(key[0], 0)[:8]].reshape(8, -1) / 255 @ kernel
    states, _ = train_epoch(states, masks, split, key, 0, 0, rates, batch_size=8, spec=spec)
    np.testing.assert_allclose(
        states.model_state["batch_stats"]["BatchNorm_0"]["mean"][0], 0.1 * x.mean(0), rtol=1e-4
    )
    loss, correct = training.evaluate(states.variables, split, spec=spec)
    assert np.isfinite(loss).all()
    assert 0 <= correct[0] <= 46


@pytest.mark.parametrize("execution", EXECUTION_MODES)
@pytest.mark.parametrize("batch_size", [7, 23, None])
def test_evaluation_counts_every_example_once(tiny_experiment, batch_size, execution):
    """Also if the last batch is not full."""
    experiment = tiny_experiment(execution=execution)
    keys = jax.random.split(jax.random.key(0), 2)
    variables = jax.vmap(lambda key: experiment.spec.model.init(key, jnp.zeros((1, 4, 4, 1))))(keys)
    images, labels = split = experiment.dataset.train
    loss, correct = training.evaluate(variables, split, spec=experiment.spec, batch_size=batch_size)
    x, y = np.asarray(images).reshape(46, -1) / 255, np.asarray(labels)
    for i in range(2):
        logits, _ = forward(jax.tree.map(lambda p, i=i: np.asarray(p[i]), variables["params"]), x)
        assert loss[i] == pytest.approx(cross_entropy(logits, y).mean(), rel=1e-5)
        assert correct[i] == (logits.argmax(1) == y).sum()


def test_bfloat16_model_has_float32_state_and_loss(tiny_experiment):
    experiment = tiny_experiment()
    model = LeNet(num_classes=3, widths=(6, 5), dtype=jnp.bfloat16)
    variables = add_member_axis(model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))))
    masks = masking.ones_like(variables["params"])
    states, metrics = train_epoch(
        training.init_states(variables, masks, spec=experiment.spec),
        masks,
        experiment.dataset.train,
        jax.random.split(jax.random.key(0), 1),
        0,
        0,
        experiment.learning_rates[0],
        batch_size=8,
        spec=experiment.spec._replace(model=model),
    )
    assert metrics.loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves((states.params, states.opt_state)) if x.ndim > 1} == {
        jnp.dtype("float32")
    }


class CountingModel(nn.Module):
    """A linear model that counts its training steps in an integer variable."""

    num_classes: int
    width: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        steps = self.variable("counts", "steps", lambda: jnp.int32(0))
        if train and not self.is_initializing():
            steps.value += 1
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


@pytest.mark.parametrize("convolutions", ["flax", "per_member", "grouped"])
@pytest.mark.parametrize("precision", ["default", "highest"])
def test_matmul_precision_is_that_of_all_products_and_convolutions(tiny_experiment, convolutions, precision):
    """Also of those in gradients."""
    experiment = tiny_experiment()
    dataset = experiment.dataset.train
    spec = training.TrainSpec(
        models.create("conv4", 10, dataset.image_shape, width=0.1),
        experiment.spec.optimizer,
        batch_size=4,
        execution=ExecutionMode(convolutions=convolutions),
        matmul_precision=precision,
    )
    keys = jax.random.split(jax.random.key(0), 2)

    def train(variables, masks, batches):
        states = training.init_states(variables, masks, spec=spec)
        return training.scan_steps(states, masks, batches, 0, np.ones(1, np.float32), None, None, spec=spec)

    variables = jax.eval_shape(jax.vmap(models.init_fn(spec.model, dataset.image_shape)), keys)
    masks = jax.eval_shape(masking.ones_like, variables["params"])
    program = jax.jit(train).lower(variables, masks, dataset.training_epochs(keys, 1, 4).epoch(0)).as_text()
    operations = [
        line
        for line in program.splitlines()
        if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
    ]
    assert len(operations) >= 3 * 7 - 1  # four convolutions and three dense layers; images have no gradient
    name = {"default": "DEFAULT", "highest": "HIGHEST"}[precision]
    assert all(line.count(name) == 2 for line in operations)


@pytest.mark.parametrize("parts", [{}, {"accumulate_steps": 2}, {"norm_parts": 2}])
def test_counters_in_the_model_state_stay_integers(tiny_experiment, monkeypatch, parts):
    monkeypatch.setitem(models.MODELS, "counting", CountingModel)
    experiment = tiny_experiment(**{"model.name": "counting"})
    experiment = experiment._replace(spec=experiment.spec._replace(**parts))
    (end,) = imp.rounds(experiment._replace(rounds=1))
    counts = end.networks.trained["counts"]["steps"]
    assert counts.dtype == jnp.int32
    assert counts.tolist() == [experiment.learning_rates.size] * len(end.members)


def test_bits_of_a_member_do_not_depend_on_the_number_of_members():
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (640, 4, 4, 1), np.uint8), generator.integers(0, 10, 640)
    dataset = data.from_arrays(images, labels, images[:64], labels[:64])

    def train(replicates):
        config = make_tiny_config(replicates=replicates, epochs=1, batch_size=64)
        experiment = setup(config, dataset, use_mesh=False)
        return imp.train(experiment, 0, imp.init_state(experiment)).states.params

    # XLA computes the sums over 10 classes of 2 · 64 and of 20 · 64 images with different kernels if it may
    few, many = train(replicates=1), train(replicates=10)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:1], b[:1]), few, many)
