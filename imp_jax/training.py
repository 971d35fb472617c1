"""The train step, many steps in one compiled program, and evaluation.

Every tree of `train_steps` and `evaluate` leads with an axis of members, which train side by side under
vmap. Masks, learning rates and keys are arguments: one compiled program serves every round.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from ml_collections import ConfigDict

from imp_jax import data, masking
from imp_jax.config import choose
from imp_jax.masking import Mask, Params

Variables = dict[str, Any]  # what model.init returns: "params", and collections such as "batch_stats"


class TrainState(NamedTuple):
    params: Params
    model_state: Variables  # the collections of the model besides its parameters; {} for most
    opt_state: PyTree[Array]

    @property
    def variables(self) -> Variables:
        return {"params": self.params, **self.model_state}


class Metrics(NamedTuple):
    loss: Float[Array, "steps members"]  # mean cross-entropy of each step's batch, in nats
    accuracy: Float[Array, "steps members"]  # on the same batch, in [0, 1]


# Directions only: the step scales them by the learning rate, which is an argument and not a constant.
OPTIMIZERS = {
    "adam": lambda config: optax.scale_by_adam(),
    "momentum": lambda config: optax.trace(config.momentum),  # heavy ball, not Nesterov (ours)
    "sgd": lambda config: optax.identity(),
}

# Factors of the base learning rate, by time in epochs and number of epochs.
SCHEDULES = {
    "constant": lambda time, epochs, config: np.ones_like(time),
    "step": lambda time, epochs, config: 0.1 ** np.searchsorted(config.milestones, time, side="right"),
    "cosine": lambda time, epochs, config: (1 + np.cos(np.pi * time / epochs)) / 2,
}


def make_optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """The masked transform of `config.optimizer`, giving directions of ascent to be scaled by −learning rate.

    Weight decay is L2: added to the gradient, before Adam's moments too, on all parameters (ours).

    Raises:
      UserError: an unknown optimizer.
    """
    direction = choose(OPTIMIZERS, "optimizer.name", config.optimizer.name)(config.optimizer)
    if config.optimizer.weight_decay:
        direction = optax.chain(optax.add_decayed_weights(config.optimizer.weight_decay), direction)
    return masking.masked(direction)


def learning_rates(config: ConfigDict, steps_per_epoch: int) -> Float[np.ndarray, "epochs steps"]:
    """The learning rate of every step of a training (table 1), times the warm-up's linear rise from 0.

    Raises:
      UserError: an unknown schedule.
    """
    schedule = choose(SCHEDULES, "optimizer.schedule", config.optimizer.schedule)
    time = np.arange(config.epochs * steps_per_epoch) / steps_per_epoch
    rates = config.optimizer.learning_rate * schedule(time, config.epochs, config.optimizer)
    if config.optimizer.warmup_epochs:
        rates *= np.minimum(time / config.optimizer.warmup_epochs, 1)
    return rates.reshape(config.epochs, steps_per_epoch).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("optimizer",))
def init_states(variables: Variables, masks: Mask, *, optimizer: optax.GradientTransformation) -> TrainState:
    """The states of all members at the start of a training: their tickets θ⊙m and fresh optimizers."""

    def member_state(variables, mask):
        model_state = {name: values for name, values in variables.items() if name != "params"}
        params = masking.apply(variables["params"], mask)
        return TrainState(params, model_state, optimizer.init(params))

    return jax.vmap(member_state)(variables, masks)


def train_step(
    state: TrainState,
    mask: Mask,
    images: UInt8[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    learning_rate: Float[Array, ""],
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[TrainState, Metrics]:
    """One step of one member; its metrics are scalars, of the batch before the step."""

    def loss_fn(params):
        logits, model_state = model.apply(
            {"params": params, **state.model_state},
            data.to_float(images),
            train=True,
            mutable=list(state.model_state),
        )
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (model_state, jnp.mean(logits.argmax(-1) == labels))

    (loss, (model_state, accuracy)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    directions, opt_state = optimizer.update(gradients, state.opt_state, state.params, mask=mask)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, directions)
    return TrainState(params, model_state, opt_state), Metrics(loss, accuracy)


@functools.partial(jax.jit, static_argnames=("batch_size", "model", "optimizer"), donate_argnames=("states",))
def train_steps(
    states: TrainState,
    masks: Mask,
    images: UInt8[Array, "examples height width channels"],
    labels: Int[Array, " examples"],
    keys: Key[Array, " members"],
    epoch: Int[Array, ""],
    first_step: Int[Array, ""],
    learning_rates: Float[Array, " steps"],
    *,
    batch_size: int,
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[TrainState, Metrics]:
    """Train all members for `len(learning_rates)` steps of one epoch, from its step `first_step` on.

    Each member visits the examples in an order of its own, drawn from its key and the epoch; examples that
    do not fill a last batch are left out of that epoch (ours). `states` is donated.
    """

    def member_order(key):
        return jax.random.permutation(jax.random.fold_in(key, epoch), len(images))

    steps = len(learning_rates)
    order = jax.lax.dynamic_slice_in_dim(
        jax.vmap(member_order)(keys), first_step * batch_size, steps * batch_size, axis=1
    )
    batches = order.reshape(len(keys), steps, batch_size).swapaxes(0, 1)
    member_step = functools.partial(train_step, model=model, optimizer=optimizer)

    def step(states, inputs):
        batch, learning_rate = inputs
        return jax.vmap(member_step, in_axes=(0, 0, 0, 0, None))(
            states, masks, images[batch], labels[batch], learning_rate
        )

    return jax.lax.scan(step, states, (batches, learning_rates))


@functools.partial(jax.jit, static_argnames=("model", "batch_size"))
def evaluate(
    variables: Variables,
    images: UInt8[Array, "examples height width channels"],
    labels: Int[Array, " examples"],
    *,
    model: nn.Module,
    batch_size: int = 1000,
) -> tuple[Float[Array, " members"], Int[Array, " members"]]:
    """Mean cross-entropy (nats) and number of examples classified right, of every member over a whole set."""
    examples = len(images)
    batch_size = min(batch_size, examples)
    # the last batch is filled up with examples seen before, which count for nothing
    indices = jnp.arange(-(-examples // batch_size) * batch_size).reshape(-1, batch_size)

    def member_sums(variables, images, labels, counts):
        logits = model.apply(variables, data.to_float(images), train=False).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = logits.argmax(-1) == labels
        return jnp.sum(losses, where=counts), jnp.sum(correct, where=counts, dtype=jnp.int32)

    def batch_sums(batch):
        where = batch % examples
        return jax.vmap(member_sums, in_axes=(0, None, None, None))(
            variables, images[where], labels[where], batch < examples
        )

    losses, correct = jax.lax.map(batch_sums, indices)
    return losses.sum(0) / examples, correct.sum(0)
