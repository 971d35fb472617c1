"""Scores of weights: pruning removes those with the lowest.

To add a score, `register` a function of `ScoreInputs`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from imp_jax import masking, training
from imp_jax.errors import UserError, lookup_or_import
from imp_jax.masking import Mask, Params

Scores = PyTree[Float[Array, "..."]]


class ScoreInputs(NamedTuple):
    """The argument of a score, for one network, without a member axis.

    `loss`, `flow` and `example_loss` map parameters like `params` to a float32 scalar. `jax.grad`, `jax.jvp`
    and `jax.hessian` differentiate them, also twice.
    """

    params: Params  # trained, zero where `mask` is False
    mask: Mask
    key: Key[Array, ""]  # of this replicate and round
    # mean cross-entropy (nats) of `pruning.images` training images; `temperature=T` divides the logits by T
    loss: Callable[..., Float[Array, ""]]
    # sum of the logits of an image of ones (SynFlow: at |θ|), or of another value, given as second argument
    flow: Callable[..., Float[Array, ""]]
    initial: Params | None = None  # at the start of the round's training, zero where `mask` is False
    # cross-entropy (nats) of image i of `num_examples`, in evaluation mode: no image depends on another
    example_loss: Callable[[Params, Int[Array, ""]], Float[Array, ""]] | None = None
    num_examples: int = 0


Score = Callable[[ScoreInputs], Scores]
_GRASP_TEMPERATURE = 200.0


def make_inputs(
    variables: training.Variables,
    mask: Mask,
    key: Key[Array, ""],
    images: training.Images | None,
    labels: Int[Array, " batch"] | None,
    *,
    image_shape: tuple[int, int, int],
    spec: training.TrainSpec,
    initial: Params | None = None,
) -> ScoreInputs:
    """Make the inputs of a score from the variables of one network and a batch of training images.

    Args:
      images, labels: may be None if the score uses no loss.
      initial: the parameters at the start of the training, not yet masked; None for an untrained network.
    """
    model_state = {name: leaves for name, leaves in variables.items() if name != "params"}
    # Flax's own layers, on one device: our kernels can be differentiated in reverse mode only
    execution = spec.execution._replace(convolutions="flax")
    spec = spec._replace(execution=execution, norm_parts=1, mesh=None)

    def loss(params, temperature=1.0):
        return training.loss_fn(params, model_state, images, labels, key, spec=spec, temperature=temperature)[0]

    def example_loss(params, i):
        logits = spec.apply({"params": params, **model_state}, images[i][None], train=False)
        return training.example_sums(logits, labels[i][None], jnp.ones(1, bool))[0]

    def flow(params, value=1.0):
        image = jnp.full((1, *image_shape), value, jnp.float32)
        with spec.use_kernels():
            outputs = spec.model.apply({"params": params, **model_state}, image, train=False)
        return outputs.astype(jnp.float32).sum()

    params = variables["params"]
    initial = masking.apply(params if initial is None else initial, mask)
    count = 0 if images is None else len(images)
    return ScoreInputs(params, mask, key, loss, flow, initial, example_loss, count)


def magnitude(inputs: ScoreInputs) -> Scores:
    """Return |θ|, the score of IMP."""
    return jax.tree.map(jnp.abs, inputs.params)


def random(inputs: ScoreInputs) -> Scores:
    """Return uniform scores in [0, 1): the sanity control that any informed score must beat."""
    leaves, treedef = jax.tree.flatten(inputs.params)
    keys = jax.random.split(inputs.key, len(leaves))
    return treedef.unflatten([jax.random.uniform(k, jnp.shape(p)) for k, p in zip(keys, leaves, strict=True)])


def movement(inputs: ScoreInputs) -> Scores:
    """Return |θ| − |θ₀|, the growth of each weight since the round's start (Zhou et al. 2019)."""
    return jax.tree.map(lambda p, start: jnp.abs(p) - jnp.abs(start), inputs.params, inputs.initial)


def taylor(inputs: ScoreInputs) -> Scores:
    """Return |θ ⊙ ∂L/∂θ|, the first-order change of the loss if a weight is removed (Molchanov et al. 2019).

    At initialisation this is the score of SNIP (Lee et al. 2019).
    """
    return jax.tree.map(lambda p, g: jnp.abs(p * g), inputs.params, jax.grad(inputs.loss)(inputs.params))


def fisher(inputs: ScoreInputs) -> Scores:
    """Return θ² ⊙ E[(∂ℓ/∂θ)²], with the loss ℓ of single images (Theis et al. 2018, without its factor 1/2)."""

    def add_square(total, i):
        gradient = jax.grad(inputs.example_loss)(inputs.params, i)
        return jax.tree.map(lambda t, g: t + g**2, total, gradient), None

    zeros = jax.tree.map(jnp.zeros_like, inputs.params)
    total, _ = jax.lax.scan(add_square, zeros, jnp.arange(inputs.num_examples))
    return jax.tree.map(lambda p, t: p**2 * t / inputs.num_examples, inputs.params, total)


def grasp(inputs: ScoreInputs) -> Scores:
    """Return θ ⊙ H ∂L/∂θ, with the Hessian H (Wang et al. 2020).

    A score is low if removing the weight increases ‖∂L/∂θ‖. The paper removes the highest of −θ ⊙ H ∂L/∂θ,
    which are the lowest here. As in its code, the temperature of L is 200, so that all classes are nearly
    equally likely.
    """
    gradient_of_loss = jax.grad(lambda params: inputs.loss(params, temperature=_GRASP_TEMPERATURE))
    gradient = gradient_of_loss(inputs.params)
    _, product = jax.jvp(gradient_of_loss, (inputs.params,), (gradient,))
    return jax.tree.map(jnp.multiply, inputs.params, product)


def synflow(inputs: ScoreInputs) -> Scores:
    """Return |θ| ⊙ ∂R/∂|θ|, where R is the sum of the logits of an image of ones at |θ| (Tanaka et al. 2020).

    At initialisation R is the sum over all paths of the products of their weights, so it grows exponentially
    with depth. Where it comes near the limits of float32, all scores are divided by about R, which leaves their
    order as it is.
    """
    positive = jax.tree.map(jnp.abs, inputs.params)
    scale = _flow_scale(inputs, positive)
    gradient = jax.grad(lambda params: scale * inputs.flow(params, scale))(positive)
    return jax.tree.map(jnp.multiply, positive, gradient)


def _flow_scale(inputs, positive):
    """Return the factor of the image and of R with which neither R nor its gradient leaves float32.

    It is about 1/√R, a power of 2 so that it rounds nothing, or 1 where R is moderate.
    """
    small = 2.0**-100
    flow = inputs.flow(positive)
    exponent = jnp.where(jnp.isfinite(flow), jnp.log2(flow), jnp.log2(inputs.flow(positive, small)) + 100)
    return jnp.where(jnp.abs(exponent) > 60, jnp.exp2(-jnp.round(exponent / 2)), 1.0)


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "random": random,
    "movement": movement,
    "taylor": taylor,
    "fisher": fisher,
    "grasp": grasp,
    "synflow": synflow,
}


def find(name: str) -> Score:
    """Return a score by its name, or by a dotted path such as "their_package.scores:taylor".

    Raises:
      UserError: an unknown name; a path that cannot be imported, or whose object is not callable.
    """
    score = lookup_or_import(SCORES, "pruning.score", name)
    _check_callable(name, score)
    return score


def register(name: str, score: Score) -> None:
    """Make `config.pruning.score = name` prune by `score`, a function of `ScoreInputs`.

    It returns a tree like `params` of floating-point leaves; weights with the lowest scores are removed,
    negative ones first, nan last. It is traced under jit, and vmapped over members; if it uses `loss`, members
    are mapped one after the other.

    Raises:
      UserError: `score` is not callable.
    """
    _check_callable(name, score)
    SCORES[name] = score


def _check_callable(name, score):
    if not callable(score):
        raise UserError(
            f"the score {name!r} is a {type(score).__name__}; it should be a function of "
            f"imp_jax.scores.ScoreInputs"
        )
