"""Scores of users, against second derivations on the same batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imp_jax import arms, imp, scores
from imp_jax.errors import UserError

IMAGES = 20


def saliency(inputs):
    """|θ ∂L/∂θ|, as SNIP."""
    return jax.tree.map(lambda p, g: jnp.abs(p * g), inputs.params, jax.grad(inputs.loss)(inputs.params))


def curvature(inputs):
    """θ Hθ, by a Hessian-vector product."""
    _, products = jax.jvp(jax.grad(inputs.loss), (inputs.params,), (inputs.params,))
    return jax.tree.map(jnp.multiply, inputs.params, products)


def synaptic_flow(inputs):
    """|θ| ∂R/∂|θ|, as SynFlow."""
    positive = jax.tree.map(jnp.abs, inputs.params)
    return jax.tree.map(jnp.multiply, positive, jax.grad(inputs.flow)(positive))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Scores that are registered in a test are known in no other."""
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))
    for score in (saliency, curvature, synaptic_flow):
        scores.register(score.__name__, score)


def batch(experiment, number):
    """Images and labels that scores are given in a round, drawn by the seed and the round."""
    key = jax.random.fold_in(jax.random.key(experiment.seed), arms.stream_number("score images"))
    examples = jax.random.permutation(jax.random.fold_in(key, number), 46)[:IMAGES]
    images, labels = experiment.dataset.train
    return images[examples] / 255, labels[examples]


def plain_loss(experiment, number):
    images, labels = batch(experiment, number)

    def loss(params):
        logits = experiment.spec.model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def saliency_by_hand(experiment, number, params):
    """Backpropagation in NumPy."""
    images, labels = batch(experiment, number)
    weights = [np.asarray(params[f"Dense_{i}"]["kernel"], float) for i in range(3)]
    biases = [np.asarray(params[f"Dense_{i}"]["bias"], float) for i in range(3)]
    inputs = [np.asarray(images, float).reshape(IMAGES, -1)]
    for i in range(2):
        inputs.append(np.maximum(inputs[-1] @ weights[i] + biases[i], 0))
    logits = inputs[-1] @ weights[2] + biases[2]
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[np.asarray(labels)]
    found = []
    for i in (2, 1, 0):
        found.append(np.abs(weights[i] * (inputs[i].T @ error / IMAGES)))
        error = (error @ weights[i].T) * (inputs[i] > 0)
    return found[::-1]


def curvature_by_hand(experiment, number, params):
    """By the whole Hessian."""
    flat, unravel = ravel_pytree(params)
    loss = plain_loss(experiment, number)
    hessian = jax.hessian(lambda flat: loss(unravel(flat)))(flat)
    products = unravel(flat * (hessian @ flat))
    return [np.asarray(products[f"Dense_{i}"]["kernel"]) for i in range(3)]


def synaptic_flow_by_hand(experiment, number, params):
    """In NumPy: on positive weights the network is linear."""
    weights = [np.abs(np.asarray(params[f"Dense_{i}"]["kernel"], float)) for i in range(3)]
    biases = [np.abs(np.asarray(params[f"Dense_{i}"]["bias"], float)) for i in range(3)]
    inputs = [np.ones(16)]
    for i in range(2):
        inputs.append(inputs[-1] @ weights[i] + biases[i])
    slope, found = np.ones(3), []
    for i in (2, 1, 0):
        found.append(weights[i] * np.outer(inputs[i], slope))
        slope = weights[i] @ slope
    return found[::-1]


@pytest.mark.parametrize(
    ("score", "by_hand", "uses_images"),
    [
        (saliency, saliency_by_hand, True),
        (curvature, curvature_by_hand, True),
        (synaptic_flow, synaptic_flow_by_hand, False),
    ],
)
def test_a_score_prunes_as_a_second_derivation_says(tiny_experiment, score, by_hand, uses_images):
    fields = {"pruning.images": IMAGES} if uses_images else {}
    experiment = tiny_experiment(rounds=2, **{"pruning.score": score.__name__, **fields})
    assert experiment.pruning.images == (IMAGES if uses_images else 0)
    for end in imp.rounds(experiment):
        for i in range(2):
            params, mask = jax.tree.map(
                lambda leaf, i=i: leaf[i], (end.networks.trained["params"], end.networks.mask)
            )
            values = np.concatenate([leaf.ravel() for leaf in by_hand(experiment, end.round, params)])
            alive = np.concatenate([mask[f"Dense_{i}"]["kernel"].ravel() for i in range(3)])
            kept = np.concatenate([end.next_masks[f"Dense_{n}"]["kernel"][i].ravel() for n in range(3)])
            removed = alive & ~kept
            assert removed.sum() == round(0.2 * alive.sum())
            assert not (kept & ~alive).any()
            # to rounding: a unit that is dead has scores of exactly 0
            assert values[removed].max() <= values[kept].min() + 1e-5 * np.abs(values).max()
            assert values[kept].max() > values[removed].max()


def test_a_score_of_another_shape_is_refused_before_training(tiny_experiment):
    odd = {
        "first_layer": lambda inputs: {"Dense_0": inputs.params["Dense_0"]},
        "sums": lambda inputs: jax.tree.map(jnp.sum, inputs.params),
        "nothing": lambda inputs: None,
    }
    for name, score in odd.items():
        scores.register(name, score)
        with pytest.raises(
            UserError, match=f"{name}', which should return a tree like the parameters"
        ) as error:
            tiny_experiment(**{"pruning.score": name})
        assert len(str(error.value).splitlines()) == 1


def test_images_that_a_score_does_not_use_are_refused(tiny_experiment):
    for name in ("magnitude", "random", "synaptic_flow"):
        sentence = f"pruning.images is 20; the score {name} uses no images, so it should be 256"
        with pytest.raises(UserError, match=sentence):
            tiny_experiment(**{"pruning.score": name, "pruning.images": IMAGES})
    assert tiny_experiment(**{"pruning.score": "saliency"}).pruning.images == 46  # all that there are


def test_a_score_that_is_no_function_is_refused():
    with pytest.raises(UserError, match="the score 'mine' is a float; it should be a function of"):
        scores.register("mine", 0.5)
