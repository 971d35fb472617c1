"""Detection of diverged trainings.

A training has diverged if its loss became non-finite, or if its last epoch is at chance (accuracy ≤ 1.25 /
classes) after an epoch clearly above it (≥ 2.5 / classes). The thresholds are ours.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from imp_jax.errors import UserError

LEARNED_FACTOR, CHANCE_FACTOR = 2.5, 1.25  # accuracies, as multiples of 1/classes


class DivergedError(UserError):
    """A run stopped because a training diverged; earlier rounds are kept."""

    def __init__(self, message: str, number: int = 0, diverged: Mapping[Any, tuple[int, str]] | None = None):
        super().__init__(message)
        self.round = number
        self.diverged = dict(diverged or {})  # by member: step and description


class TrainingHistory(NamedTuple):
    """Loss and accuracy of each member in the training so far."""

    broken_at: Int[np.ndarray, " members"]  # first step with a loss that is nan or infinite; −1 if none
    loss: Float[np.ndarray, " members"]  # mean over the steps of the latest epoch so far, in nats
    accuracy: Float[np.ndarray, " members"]  # the same, in [0, 1]
    best_accuracy: Float[np.ndarray, " members"]  # of the finished epochs


def init_history(members: int) -> TrainingHistory:
    """Return the history of a training that has not begun."""
    return TrainingHistory(np.full(members, -1), np.zeros(members), np.zeros(members), np.zeros(members))


def update_history(
    history: TrainingHistory,
    losses: Float[np.ndarray, "steps members"],
    accuracies: Float[np.ndarray, "steps members"],
    first_step: int,
    steps_per_epoch: int,
) -> TrainingHistory:
    """Add the steps of one epoch, from `first_step` of the training on, to a history."""
    steps_before = first_step % steps_per_epoch
    steps_after = steps_before + len(losses)

    def update_mean(mean, values):
        with np.errstate(invalid="ignore"):  # ∞ − ∞
            return (mean * steps_before + values.sum(0, dtype=np.float64)) / steps_after

    broken = ~np.isfinite(losses)
    newly_broken = (history.broken_at < 0) & broken.any(0)
    accuracy = update_mean(history.accuracy, accuracies)
    return TrainingHistory(
        broken_at=np.where(newly_broken, first_step + broken.argmax(0), history.broken_at),
        loss=update_mean(history.loss, losses),
        accuracy=accuracy,
        best_accuracy=np.maximum(history.best_accuracy, accuracy)
        if steps_after == steps_per_epoch
        else history.best_accuracy,
    )


def non_finite_members(history: TrainingHistory) -> dict[int, tuple[int, str]]:
    """Return the members with a non-finite loss so far, each with the step and a description."""
    steps = history.broken_at.tolist()
    return {i: (step, "the loss became nan or infinite") for i, step in enumerate(steps) if step >= 0}


def diverged_members(
    history: TrainingHistory, train_losses: Sequence[float], classes: int, steps: int
) -> dict[int, tuple[int, str]]:
    """Return the members that diverged in a finished training of `steps` steps, like `non_finite_members`.

    Args:
      train_losses: of the trained networks on the training set, in nats.
    """
    non_finite = {
        i: (steps, "the loss became nan or infinite")
        for i, loss in enumerate(train_losses)
        if not isfinite(loss)
    }
    is_collapsed = (history.best_accuracy >= LEARNED_FACTOR / classes) & (
        history.accuracy <= CHANCE_FACTOR / classes
    )
    collapsed = {
        i: (steps, f"the accuracy fell to {history.accuracy[i]:.1%} after {history.best_accuracy[i]:.1%}")
        for i in np.flatnonzero(is_collapsed).tolist()
    }
    return {**collapsed, **non_finite, **non_finite_members(history)}
