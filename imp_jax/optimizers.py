"""Optimizers and learning rates, as `config.optimizer` names them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from ml_collections import ConfigDict

from imp_jax import masking
from imp_jax.config import choose


def adam() -> optax.GradientTransformation:
    """`optax.scale_by_adam()`, to rounding, with bias corrections as factors of a step (Kingma & Ba 2015, 2).

    m̂ / (√v̂ + ε) = m √c₂ / c₁ / (√v + ε √c₂), where cᵢ = 1 − βᵢᵗ: a division for each weight, and not three.
    """

    def update(gradients, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.nu, gradients)
        of_mu, root = 1 - 0.9**count, jnp.sqrt(1 - 0.999**count)
        directions = jax.tree.map(lambda m, v: m * (root / of_mu) / (jnp.sqrt(v) + 1e-8 * root), mu, nu)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


# Directions only: the step scales them by the learning rate, which is an argument and not a constant.
OPTIMIZERS = {
    "adam": lambda momentum: adam(),
    "momentum": optax.trace,  # heavy ball, not Nesterov (ours)
    "sgd": lambda momentum: optax.identity(),
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
    optimizer = choose(OPTIMIZERS, "optimizer.name", config.optimizer.name)
    return _optimizer(optimizer, config.optimizer.momentum, config.optimizer.weight_decay)


@functools.cache  # or a second run in the same process would compile its steps again
def _optimizer(optimizer, momentum, weight_decay):
    direction = optimizer(momentum)
    if weight_decay:
        direction = optax.chain(optax.add_decayed_weights(weight_decay), direction)
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
