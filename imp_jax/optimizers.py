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


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "momentum": functools.partial(optax.sgd, momentum=0.9),  # heavy ball, not Nesterov (ours)
    "sgd": optax.sgd,
}


def register(name: str, optimizer: Callable[..., optax.GradientTransformation]) -> None:
    """Make `config.optimizer.name = name` train with `optimizer`, such as `register("lion", optax.lion)`.

    Args:
      optimizer: a function of `learning_rate`, a traced scalar, that returns a complete optax transform. If it
        has an argument `momentum` too, it receives `config.optimizer.momentum`, unless that is None. In a state
        of `optax.inject_hyperparams` the learning rate is replaced by that of each step.

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
    name: str,
    *,
    learning_rate: float,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    weight_decay_until: float = 0.0,
    exclude: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Make the masked optax transform of a registered optimizer; its updates are added to the parameters.

    Call its `update(grads, state, params, mask=mask, learning_rate=rate)`; the rate may be traced. Weight decay
    is L2 on all parameters (ours): added to the gradient, also before Adam's moments. If it is not 0, `update`
    takes another value as `weight_decay`, which may be traced, too.

    Args:
      name: a registered name, or a dotted path such as "optax:lion".
      learning_rate: the base rate; used only for initial states that depend on it.
      momentum: None keeps the default of the optimizer.
      weight_decay: coefficient λ of the term λθ in the gradient.
      weight_decay_until: density below which λ is 0 (the outlook of section 6); 0 never turns it off.
      exclude: patterns of layers that do not count in this density.

    Raises:
      UserError: an unknown optimizer, or one that is not a function of `learning_rate`; a path that cannot be
        imported; a momentum for an optimizer without one.
    """
    factory = lookup_or_import(OPTIMIZERS, "optimizer.name", name)
    _check_factory(name, factory)
    if momentum is not None and "momentum" not in inspect.signature(factory).parameters:
        raise UserError(f"optimizer.momentum is {momentum}; {name} has no momentum, so it should be None")
    return _make_optimizer(factory, learning_rate, momentum, weight_decay, weight_decay_until, exclude)


@functools.cache  # a static argument of jit: a second run in this process must get the same object
def _make_optimizer(factory, base_rate, momentum, weight_decay, weight_decay_until, exclude):
    options = {} if momentum is None else {"momentum": momentum}

    def transform(learning_rate, decay):
        optimizer = factory(learning_rate=learning_rate, **options)
        return optax.chain(optax.add_decayed_weights(decay), optimizer) if weight_decay else optimizer

    def update(updates, state, params=None, *, learning_rate, decay, **extra_args):
        optimizer = optax.with_extra_args_support(transform(learning_rate, decay))
        return optimizer.update(updates, _inject_rate(state, learning_rate), params, **extra_args)

    # some initial states depend on the base rate, such as that of optax.rprop
    init = transform(base_rate, weight_decay).init
    masked = masking.masked(optax.GradientTransformationExtraArgs(init, update))

    def update_masked(updates, state, params=None, *, mask, weight_decay=weight_decay, **extra_args):
        decay = weight_decay
        if weight_decay_until:
            decay = jnp.where(masking.density(mask, exclude) < weight_decay_until, 0.0, decay)
        return masked.update(updates, state, params, mask=mask, decay=decay, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update_masked)


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
    """Compute the learning rate of every step of a training (table 1), with a linear warm-up from 0.

    Args:
      milestones: rising, in epochs; the schedule `step` divides the rate by 10 at each.

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
