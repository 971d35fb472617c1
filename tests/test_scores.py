"""Scores of users, compared with independent implementations on the same batch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imp_jax import imp, masking, pruning, scores, training
from imp_jax.errors import UserError
from imp_jax.members import stream_number

IMAGES = 20


def saliency(inputs):
    """Compute |θ ∂L/∂θ|, the score of SNIP."""
    return jax.tree.map(lambda p, g: jnp.abs(p * g), inputs.params, jax.grad(inputs.loss)(inputs.params))


def curvature(inputs):
    """Compute θ Hθ with a Hessian-vector product."""
    _, products = jax.jvp(jax.grad(inputs.loss), (inputs.params,), (inputs.params,))
    return jax.tree.map(jnp.multiply, inputs.params, products)


def synaptic_flow(inputs):
    """Compute |θ| ∂R/∂|θ|, the score of SynFlow."""
    positive = jax.tree.map(jnp.abs, inputs.params)
    return jax.tree.map(jnp.multiply, positive, jax.grad(inputs.flow)(positive))


@pytest.fixture(autouse=True)
def registered_scores(monkeypatch):
    """Register the scores above; undo all registrations after the test."""
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))
    for score in (saliency, curvature, synaptic_flow):
        scores.register(score.__name__, score)


def score_batch(experiment, number):
    """Return the images and labels that scores get in round `number`; seed and round determine them."""
    key = jax.random.fold_in(jax.random.key(experiment.seed), stream_number("score images"))
    examples = jax.random.permutation(jax.random.fold_in(key, number), 46)[:IMAGES]
    images, labels = experiment.dataset.train
    return images[examples] / 255, labels[examples]


def make_loss(experiment, number):
    """Return the mean cross-entropy on the score batch as a function of the parameters."""
    images, labels = score_batch(experiment, number)

    def loss(params):
        logits = experiment.spec.model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def numpy_saliency(experiment, number, params):
    """Compute the saliency with backpropagation in NumPy."""
    images, labels = score_batch(experiment, number)
    weights = [np.asarray(params[f"Dense_{i}"]["kernel"], float) for i in range(3)]
    biases = [np.asarray(params[f"Dense_{i}"]["bias"], float) for i in range(3)]
    inputs = [np.asarray(images, float).reshape(IMAGES, -1)]
    for i in range(2):
        inputs.append(np.maximum(inputs[-1] @ weights[i] + biases[i], 0))
    logits = inputs[-1] @ weights[2] + biases[2]
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[np.asarray(labels)]
    values = []
    for i in (2, 1, 0):
        values.append(np.abs(weights[i] * (inputs[i].T @ error / IMAGES)))
        error = (error @ weights[i].T) * (inputs[i] > 0)
    return values[::-1]


def full_hessian_curvature(experiment, number, params):
    """Compute θ Hθ with the full Hessian."""
    flat, unravel = ravel_pytree(params)
    loss = make_loss(experiment, number)
    hessian = jax.hessian(lambda flat: loss(unravel(flat)))(flat)
    products = unravel(flat * (hessian @ flat))
    return [np.asarray(products[f"Dense_{i}"]["kernel"]) for i in range(3)]


def numpy_synaptic_flow(experiment, number, params):
    """Compute synaptic flow in NumPy: with positive weights the network is linear."""
    weights = [np.abs(np.asarray(params[f"Dense_{i}"]["kernel"], float)) for i in range(3)]
    biases = [np.abs(np.asarray(params[f"Dense_{i}"]["bias"], float)) for i in range(3)]
    inputs = [np.ones(16)]
    for i in range(2):
        inputs.append(inputs[-1] @ weights[i] + biases[i])
    slope, values = np.ones(3), []
    for i in (2, 1, 0):
        values.append(weights[i] * np.outer(inputs[i], slope))
        slope = weights[i] @ slope
    return values[::-1]


def numpy_fisher(experiment, number, params):
    """Compute θ² E[g²] with backpropagation of one image after the other in NumPy."""
    images, labels = score_batch(experiment, number)
    weights = [np.asarray(params[f"Dense_{i}"]["kernel"], float) for i in range(3)]
    biases = [np.asarray(params[f"Dense_{i}"]["bias"], float) for i in range(3)]
    total = [np.zeros_like(w) for w in weights]
    for image, label in zip(np.asarray(images, float).reshape(IMAGES, -1), np.asarray(labels), strict=True):
        inputs = [image]
        for i in range(2):
            inputs.append(np.maximum(inputs[-1] @ weights[i] + biases[i], 0))
        logits = inputs[-1] @ weights[2] + biases[2]
        error = np.exp(logits) / np.exp(logits).sum() - np.eye(3)[label]
        for i in (2, 1, 0):
            total[i] += np.outer(inputs[i], error) ** 2
            error = (weights[i] @ error) * (inputs[i] > 0)
    return [w**2 * t / IMAGES for w, t in zip(weights, total, strict=True)]


def finite_difference_grasp(experiment, number, params):
    """Compute θ Hg: minus the derivative of ‖∂L/∂θ‖² / 2 as each weight is reduced in proportion to itself."""
    with jax.enable_x64(True):
        images, labels = score_batch(experiment, number)
        images = jnp.asarray(np.asarray(images), jnp.float64)
        weights = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        flat, unravel = ravel_pytree(weights)

        def loss(flat):
            x, tree = images.reshape(IMAGES, -1), unravel(flat)
            for i in range(3):
                x = x @ tree[f"Dense_{i}"]["kernel"] + tree[f"Dense_{i}"]["bias"]
                x = jnp.maximum(x, 0) if i < 2 else x
            return optax.softmax_cross_entropy_with_integer_labels(x / 200, labels).mean()

        half_square = jax.jit(lambda flat: (jax.grad(loss)(flat) ** 2).sum() / 2)
        step = 1e-6
        slopes = []
        for i in range(len(flat)):
            change = step * flat[i]
            slopes.append(
                (half_square(flat.at[i].add(change)) - half_square(flat.at[i].add(-change))) / (2 * step)
            )
        values = unravel(jnp.stack(slopes))
        return [np.asarray(values[f"Dense_{i}"]["kernel"]) for i in range(3)]


@pytest.mark.parametrize(
    ("score", "reference", "uses_images"),
    [
        (scores.taylor, numpy_saliency, True),
        (scores.fisher, numpy_fisher, True),
        (scores.grasp, finite_difference_grasp, True),
        (scores.synflow, numpy_synaptic_flow, False),
        (saliency, numpy_saliency, True),
        (curvature, full_hessian_curvature, True),
        (synaptic_flow, numpy_synaptic_flow, False),
    ],
)
def test_score_prunes_the_weights_with_the_lowest_reference_values(
    tiny_experiment, score, reference, uses_images
):
    fields = {"pruning.images": IMAGES} if uses_images else {}
    experiment = tiny_experiment(rounds=2, **{"pruning.score": score.__name__, **fields})
    assert experiment.pruning.images == (IMAGES if uses_images else 0)
    for end in imp.rounds(experiment):
        for i in range(2):
            params, mask = jax.tree.map(
                lambda leaf, i=i: leaf[i], (end.networks.trained["params"], end.networks.mask)
            )
            values = np.concatenate([leaf.ravel() for leaf in reference(experiment, end.round, params)])
            alive = np.concatenate([mask[f"Dense_{n}"]["kernel"].ravel() for n in range(3)])
            kept = np.concatenate([end.next_masks[f"Dense_{n}"]["kernel"][i].ravel() for n in range(3)])
            removed = alive & ~kept
            assert removed.sum() == round(0.2 * alive.sum())
            assert not (kept & ~alive).any()
            # up to rounding: a dead unit has scores of exactly 0
            assert values[removed].max() <= values[kept].min() + 1e-5 * np.abs(values).max()
            assert values[kept].max() > values[removed].max()


def test_score_with_other_shapes_is_rejected_before_training(tiny_experiment):
    wrong_scores = {
        "first_layer": lambda inputs: {"Dense_0": inputs.params["Dense_0"]},
        "sums": lambda inputs: jax.tree.map(jnp.sum, inputs.params),
        "nothing": lambda inputs: None,
    }
    for name, score in wrong_scores.items():
        scores.register(name, score)
        with pytest.raises(
            UserError, match=f"{name}', which should return a tree like the parameters"
        ) as error:
            tiny_experiment(**{"pruning.score": name})
        assert len(str(error.value).splitlines()) == 1


def test_images_for_a_score_that_uses_none_are_rejected(tiny_experiment):
    for name in ("magnitude", "random", "synaptic_flow"):
        sentence = f"pruning.images is 20; the score {name} uses no images, so it should be 256"
        with pytest.raises(UserError, match=sentence):
            tiny_experiment(**{"pruning.score": name, "pruning.images": IMAGES})
    assert tiny_experiment(**{"pruning.score": "saliency"}).pruning.images == 46  # all training images


def test_register_rejects_a_score_that_is_not_a_function():
    with pytest.raises(UserError, match="the score 'mine' is a float; it should be a function of"):
        scores.register("mine", 0.5)


def test_movement_prunes_the_weights_that_grew_least_in_the_round(tiny_experiment):
    experiment = tiny_experiment(rounds=2, **{"pruning.score": "movement"})
    for end in imp.rounds(experiment):
        for i in range(2):
            take = functools.partial(jax.tree.map, lambda leaf, i=i: np.asarray(leaf[i]))
            trained, initial, mask, kept = (
                np.concatenate([tree[f"Dense_{n}"]["kernel"].ravel() for n in range(3)])
                for tree in map(
                    take,
                    (
                        end.networks.trained["params"],
                        end.networks.initial["params"],
                        end.networks.mask,
                        end.next_masks,
                    ),
                )
            )
            growth = np.abs(trained) - np.abs(initial)
            assert growth[mask & ~kept].max() <= growth[kept].min()
            assert (mask & ~kept).sum() == round(0.2 * mask.sum())


# --- synaptic flow ---


def bias_free_network():
    """Return a ReLU network without biases whose middle layer has tiny weights, and its inputs of a score."""

    class Network(nn.Module):
        num_classes: int = 5

        @nn.compact
        def __call__(self, images, train=False):
            x = nn.relu(nn.Conv(6, (3, 3), use_bias=False)(images))
            x = nn.relu(nn.Conv(8, (3, 3), strides=2, use_bias=False)(x))
            x = nn.relu(nn.Dense(12, use_bias=False)(x.reshape(len(x), -1)))
            return nn.Dense(self.num_classes, use_bias=False)(x)

    model = Network()
    params = model.init(jax.random.key(0), jnp.ones((1, 6, 6, 2)))["params"]
    params["Conv_1"]["kernel"] *= 1e-3
    spec = training.TrainSpec(model)

    def inputs(mask):
        return scores.make_inputs(
            {"params": masking.apply(params, mask)},
            mask,
            jax.random.key(0),
            None,
            None,
            image_shape=(6, 6, 2),
            spec=spec,
        )

    return params, inputs


def test_synaptic_flow_is_positive_and_its_sum_is_the_same_in_all_layers():
    params, inputs = bias_free_network()
    values = masking.prunable_leaves(scores.synflow(inputs(masking.ones_like(params))))
    sums = [np.sum(leaf, dtype=float) for leaf in values]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)
    assert all((leaf > 0).all() for leaf in values)


def test_synaptic_flow_of_a_deep_network_keeps_its_order():
    """R of 60 layers is about 1e66, beyond float32; the reference is computed in float64."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = images.reshape(len(images), -1)
            for _ in range(60):
                x = nn.relu(nn.Dense(100, kernel_init=nn.initializers.normal(0.15))(x))
            return nn.Dense(3)(x)

    model = Deep()
    params = model.init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))["params"]
    weights = [np.abs(np.asarray(params[f"Dense_{i}"]["kernel"], float)) for i in range(61)]
    inputs = [np.ones(16)]
    for weight in weights:
        inputs.append(inputs[-1] @ weight)
    assert inputs[-1].sum() > 1e60
    slope, reference = np.ones(3), []
    for weight, x in zip(weights[::-1], inputs[-2::-1], strict=True):
        reference.append(weight * np.outer(x, slope) / inputs[-1].sum())
        slope = weight @ slope
    score_inputs = scores.make_inputs(
        {"params": params},
        masking.ones_like(params),
        jax.random.key(0),
        None,
        None,
        image_shape=(4, 4, 1),
        spec=training.TrainSpec(model),
    )
    values = scores.synflow(score_inputs)
    total = np.sum(values["Dense_7"]["kernel"], dtype=float)
    assert 0.1 < total < 10
    for i, expected in enumerate(reference[::-1]):
        np.testing.assert_allclose(values[f"Dense_{i}"]["kernel"] / total, expected, rtol=1e-4)


def test_synaptic_flow_in_steps_collapses_no_layer_where_magnitude_does():
    params, inputs = bias_free_network()
    dense = masking.ones_like(params)
    count = masking.size(params) // 20
    mask = pruning.prune_in_steps(lambda mask: scores.synflow(inputs(mask)), dense, jnp.int32(count), 100)
    by_magnitude = pruning.keep_highest(scores.magnitude(inputs(dense)), dense, jnp.int32(count))
    assert int(masking.survivors(mask)) == int(masking.survivors(by_magnitude)) == count
    assert int(by_magnitude["Conv_1"]["kernel"].sum()) == 0
    assert min(int(leaf.sum()) for leaf in masking.prunable_leaves(mask)) > 0
