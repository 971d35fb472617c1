"""Scores of weights; the lowest are pruned. To add a score, `register` a function of `ScoreInputs`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from imp_jax import training
from imp_jax.errors import UserError, lookup_or_import
from imp_jax.masking import Mask, Params

Scores = PyTree[Float[Array, "..."]]


class ScoreInputs(NamedTuple):
    """Arguments of a score, for one network (without a member axis).

    `loss` and `flow` are float32 functions of parameters like `params`. `jax.grad`, `jax.jvp` and `jax.hessian`
    can differentiate them, also twice.
    """

    params: Params  # trained, zero where `mask` is False
    mask: Mask
    key: Key[Array, ""]  # of this replicate and round
    loss: Callable[[Params], Float[Array, ""]]  # mean cross-entropy (nats) of `pruning.images` training images
    flow: Callable[[Params], Float[Array, ""]]  # sum of the logits of an image of ones (SynFlow)


Score = Callable[[ScoreInputs], Scores]


def make_inputs(
    variables: training.Variables,
    mask: Mask,
    key: Key[Array, ""],
    images: training.Images | None,
    labels: Int[Array, " batch"] | None,
    *,
    image_shape: tuple[int, int, int],
    spec: training.TrainSpec,
) -> ScoreInputs:
    """Make the inputs of a score from the variables of one network and a batch of training images.

    `images` and `labels` may be None if the score does not use `loss`.
    """
    model_state = {name: leaves for name, leaves in variables.items() if name != "params"}
    # Flax's own kernels, because the fast CPU kernels support only reverse mode; no mesh, because every device
    # has the whole batch
    execution = spec.execution._replace(convolutions="flax")
    spec = spec._replace(execution=execution, norm_parts=1, mesh=None)

    def loss(params):
        return training.loss_fn(params, model_state, images, labels, key, spec=spec)[0]

    def flow(params):
        image = jnp.ones((1, *image_shape))
        return spec.model.apply({"params": params, **model_state}, image, train=False).astype(jnp.float32).sum()

    return ScoreInputs(variables["params"], mask, key, loss, flow)


def magnitude(inputs: ScoreInputs) -> Scores:
    """Return |θ|, the score of IMP."""
    return jax.tree.map(jnp.abs, inputs.params)


def random(inputs: ScoreInputs) -> Scores:
    """Return uniform scores: a sanity check that any informed score must beat."""
    leaves, treedef = jax.tree.flatten(inputs.params)
    keys = jax.random.split(inputs.key, len(leaves))
    return treedef.unflatten([jax.random.uniform(k, jnp.shape(p)) for k, p in zip(keys, leaves, strict=True)])


SCORES: dict[str, Score] = {"magnitude": magnitude, "random": random}


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

    `score` returns a tree like `params` of floating-point leaves. The weights with the lowest scores are
    pruned, negative scores first, nan last. `score` is traced, and vmapped over members.

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
