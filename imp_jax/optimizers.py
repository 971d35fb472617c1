"""Optimizers and learning-rate schedules of `config.optimizer`.

An entry of `OPTIMIZERS` is a function of the learning rate that returns a complete optax transform: its updates
are added to the parameters. `optax.lion` and the other optimizers of optax are such functions.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from imp_jax import masking
from imp_jax.errors import UserError, lookup, lookup_or_import

Rate = Float[Any, ""] | float
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def scale_by_adam() -> optax.GradientTransformation:
    """Make `optax.scale_by_adam()` with fewer divisions; equal up to rounding (Kingma & Ba 2015, section 2).

    m̂ / (√v̂ + ε) = m √c₂ / c₁ / (√v + ε √c₂) with cᵢ = 1 − βᵢᵗ takes one division per weight instead of three.
    """

    def update(gradients, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.nu, gradients)
        mu_correction, root = 1 - 0.9**count, jnp.sqrt(1 - 0.999**count)
        directions = jax.tree.map(lambda m, v: m * (root / mu_correction) / (jnp.sqrt(v) + 1e-8 * root), mu, nu)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def adam(learning_rate: Rate) -> optax.GradientTransformation:
    """Make `optax.adam(learning_rate)`; equal up to rounding."""
    return optax.chain(scale_by_adam(), optax.scale_by_learning_rate(learning_rate))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": adam,
    "momentum": functools.partial(optax.sgd, momentum=0.9),  # heavy ball, not Nesterov (ours)
    "sgd": optax.sgd,
}


def register(name: str, optimizer: Callable[..., optax.GradientTransformation]) -> None:
    """Make `config.optimizer.name = name` train with `optimizer`, such as `register("lion", optax.lion)`.

    Args:
      optimizer: a function of `learning_rate`, a traced scalar, that returns a complete optax transform. If it
        also has an argument `momentum`, `config.optimizer.momentum` is passed to it. In a state of
        `optax.inject_hyperparams`, the learning rate is set at each step.

    Raises:
      UserError: `optimizer` is not a function of `learning_rate`.
    """
    _check_factory(name, optimizer)
    OPTIMIZERS[name] = optimizer


# factors of the base learning rate: functions of the time in epochs, the number of epochs, and the milestones
SCHEDULES = {
    "constant": lambda time, epochs, milestones: np.ones_like(time),
    "step": lambda time, epochs, milestones: 0.1 ** np.searchsorted(milestones, time, side="right"),
    "cosine": lambda time, epochs, milestones: (1 + np.cos(np.pi * time / epochs)) / 2,
}


def make_optimizer(
    name: str, *, learning_rate: float, momentum: float | None = None, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Make the masked optax transform of a registered optimizer; its updates are added to the parameters.

    Its update is called as `update(grads, state, params, mask=mask, learning_rate=rate)`, with a traced rate.
    Weight decay is L2 (ours): it is added to the gradient of all parameters, also before the moments of Adam.

    Args:
      learning_rate: the base rate, on which some initial states depend.
      momentum: None uses the default of the optimizer.

    Raises:
      UserError: an unknown optimizer; a momentum for one that has none.
    """
    factory = lookup_or_import(OPTIMIZERS, "optimizer.name", name)
    _check_factory(name, factory)
    if momentum is not None and "momentum" not in inspect.signature(factory).parameters:
        raise UserError(f"optimizer.momentum is {momentum}; {name} has no momentum, so it should be None")
    return _make_optimizer(factory, learning_rate, momentum, weight_decay)


@functools.cache  # a static argument of jit: a second run in this process must get the same object
def _make_optimizer(factory, base_rate, momentum, weight_decay):
    options = {} if momentum is None else {"momentum": momentum}

    def transform(learning_rate):
        optimizer = factory(learning_rate=learning_rate, **options)
        return optax.chain(optax.add_decayed_weights(weight_decay), optimizer) if weight_decay else optimizer

    def update(updates, state, params=None, *, learning_rate, **extra_args):
        optimizer = optax.with_extra_args_support(transform(learning_rate))
        return optimizer.update(updates, _inject_rate(state, learning_rate), params, **extra_args)

    # some initial states depend on the base rate, such as that of optax.rprop
    return masking.masked(optax.GradientTransformationExtraArgs(transform(base_rate).init, update))


def _inject_rate(state, learning_rate):
    """Set the learning rate in states of `optax.inject_hyperparams`; other states are unchanged."""

    def inject(part):
        if not isinstance(part, _INJECTED) or "learning_rate" not in part.hyperparams:
            return part
        rate = jnp.asarray(learning_rate, jnp.asarray(part.hyperparams["learning_rate"]).dtype)
        return part._replace(hyperparams={**part.hyperparams, "learning_rate": rate})

    return jax.tree.map(inject, state, is_leaf=lambda part: isinstance(part, _INJECTED))


def _check_factory(name, optimizer):
    if not callable(optimizer):
        raise UserError(
            f"the optimizer {name!r} is a {type(optimizer).__name__}; it should be a function of the learning "
            f"rate that returns an optax transform, such as optax.adamw without a call"
        )
    parameters = inspect.signature(optimizer).parameters
    if "learning_rate" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise UserError(
            f"the optimizer {name!r} takes ({', '.join(parameters)}); it should take learning_rate by this name"
        )


def learning_rates(
    epochs: int,
    steps_per_epoch: int,
    *,
    learning_rate: float,
    schedule: str = "constant",
    milestones: Sequence[float] = (),
    warmup_epochs: float = 0.0,
) -> Float[np.ndarray, "epochs steps"]:
    """Compute the learning rate of every step of a training (table 1), including the linear warm-up.

    Raises:
      UserError: an unknown schedule; a milestone after the last step.
    """
    factors = lookup(SCHEDULES, "optimizer.schedule", schedule)
    time = np.arange(epochs * steps_per_epoch) / steps_per_epoch
    if milestones and milestones[-1] > time[-1]:
        raise UserError(
            f"optimizer.milestones is {milestones}; the last step of a training begins at epoch "
            f"{time[-1]:.6g}, so they should be at most that"
        )
    rates = learning_rate * factors(time, epochs, milestones)
    if warmup_epochs:
        rates *= np.minimum(time / warmup_epochs, 1)
    return rates.reshape(epochs, steps_per_epoch).astype(np.float32)
