"""Computes the table instability: barriers between imp and twins that part from it at some steps."""

from typing import Any

import jax
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from imp_jax import connectivity
from imp_jax.analysis.on_request import (
    experiment_in_round,
    format_density,
    imp_replicates,
    replay_round,
)
from imp_jax.analysis.registry import RunInputs, complete_rows, find_missing, register, register_figure
from imp_jax.figures import PATH_COLORS, Figure, densities, use_default_style
from imp_jax.members import BranchMember, member_keys
from imp_jax.replay import perturb, train_on

_KEYS = ["replicate", "round", "kind", "step", "noise", "split"]
_SETTINGS = ["path_points", "batch_norm", "baseline"]
_COLUMNS = [*_KEYS, "barrier", "loss_barrier", *_SETTINGS]
_SPLITS = ("train", "test")


def compute_instability(inputs: RunInputs) -> list[tuple]:
    """Compute the barriers between imp and trainings that part from it at the steps `instability.steps`.

    The training of imp is repeated (`replay.replay`), and at each step k a second training starts from its
    weights and optimizer state (Frankle et al. 2020, figure 5). A training of kind "twin" then has the data
    order and augmentation of the arm twin. One of kind "perturbed" has those of imp, and Gaussian noise is
    added to its weights at step k (ours).

    Columns:
      replicate, round: of imp.
      kind: "twin" or "perturbed".
      step: k.
      noise: norm of the noise relative to that of the weights of each layer; 0 for twins.
      split: "train" or "test".
      barrier, loss_barrier: the error (0 to 1) and loss (nats) barrier on the linear path between the ends of
        the two trainings; nan if a weight of either is not finite.
      path_points, batch_norm, baseline: the settings of the path and its barrier in the config.
    """

    def compute(missing):
        computed = (_compute_round(inputs, *item) for item in _trainings_by_round(missing).items())
        return {row[: len(_KEYS)]: row[len(_KEYS) :] for rows in computed for row in rows}

    return complete_rows(inputs, "instability", _list_keys(inputs), compute)


def _wanted(config):
    """Return the (kind, step, noise) of all trainings that the config asks for."""
    steps, noise = sorted(config.instability.steps), float(config.instability.noise)
    twins = [("twin", step, 0.0) for step in steps]
    return twins + [("perturbed", step, noise) for step in steps if noise]


def _settings(config):
    return pd.Series({field: config.analysis[field] for field in _SETTINGS})


def _list_keys(inputs):
    """Return the values of `_KEYS` of all rows that the config asks for."""
    return [
        (replicate, number, *training, split)
        for number in sorted(inputs.config.instability.rounds)
        for training in _wanted(inputs.config)
        for replicate in imp_replicates(inputs, number)
        for split in _SPLITS
    ]


def _trainings_by_round(keys):
    """Return the (kind, step, noise) of keys, by round."""
    by_round = {}
    for _, number, *training, _ in keys:
        by_round.setdefault(number, {})[tuple(training)] = None
    return {number: list(trainings) for number, trainings in by_round.items()}


def has_settings(table: pd.DataFrame, config: ConfigDict) -> pd.Series:
    """Return which rows were computed with the settings of paths and barriers of the config."""
    return table[_SETTINGS].eq(_settings(config)).all(axis=1)


def _compute_round(inputs, number, wanted):
    """Yield the rows of all replicates of a round."""
    experiment = experiment_in_round(inputs, number)
    wanted = [(kind, step, noise) for kind, step, noise in wanted if step < experiment.learning_rates.size]
    last, starts_at = experiment.learning_rates.size, {step for _, step, _ in wanted}
    replayed = replay_round(inputs, number, [*starts_at, last]) if wanted else None
    if replayed is None:
        return
    replicates, masks, states = replayed
    ends = states[last].states.variables
    for step in sorted(starts_at):
        kinds = [(kind, noise) for kind, of_step, noise in wanted if of_step == step]
        trained = [_train(experiment, number, replicates, masks, states[step], *kind) for kind in kinds]
        for (kind, noise), networks in zip(kinds, trained, strict=True):
            for i, replicate in enumerate(replicates):
                pair = jax.tree.map(lambda leaf: leaf[i], (ends, networks))  # noqa: B023
                for split in _SPLITS:
                    barriers = _compute_barriers(inputs, *pair, getattr(experiment.dataset, split))
                    yield replicate, number, kind, step, noise, split, *barriers, *_settings(inputs.config)


def _train(experiment, number, replicates, masks, start, kind, noise):
    """Train all replicates of a round from `start` to the end; return their variables."""
    arm = "twin" if kind == "twin" else "imp"
    members = [BranchMember(arm, replicate, number) for replicate in replicates]
    states = start.states
    if noise:
        keys = member_keys(members, experiment.seed, lambda _: ["perturbation", number, start.step])
        exclude = experiment.pruning.exclude
        params = jax.vmap(lambda p, m, key: perturb(p, m, key, noise, exclude))(states.params, masks, keys)
        states = states._replace(params=params)
    start = start._replace(states=states)
    last = experiment.learning_rates.size
    return train_on(experiment, members, masks, start, [last])[last].states.variables


def _compute_barriers(inputs, variables, other, split):
    """Return the error and loss barrier between two networks."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((variables, other))):
        return np.nan, np.nan
    settings, experiment = inputs.config.analysis, inputs.experiment
    losses, errors = connectivity.path_metrics(
        variables,
        other,
        split,
        spec=experiment.spec,
        num_points=settings.path_points,
        batch_norm=settings.batch_norm,
        train=experiment.dataset.train,
    )
    return tuple(float(connectivity.error_barrier(v, settings.baseline)) for v in (errors, losses))


def estimate_cost(inputs: RunInputs) -> float:
    """Return the number of images whose gradients take as long as the trainings of the missing rows."""
    total = 0
    missing = find_missing(inputs, "instability", _list_keys(inputs))
    for number, wanted in _trainings_by_round(missing).items():
        last = experiment_in_round(inputs, number).learning_rates.size
        steps = last + sum(max(last - step, 0) for _, step, _ in wanted)
        total += len(imp_replicates(inputs, number)) * steps * inputs.experiment.spec.batch_size
    return total


@use_default_style
def draw(table: pd.DataFrame, results: pd.DataFrame, split: str = "test") -> Figure:
    """Draw the error barrier over the step at which trainings part, one line per round and one panel per kind.

    The steps have equal distances. Twins are on the left, and each size of noise has a panel.

    Args:
      table, results: instability.csv and results.csv.
    """
    table, density = table[table["split"] == split].dropna(), densities(results)
    panels = list(table.groupby(["noise", "kind"]))
    figure = Figure(figsize=(1 + 3.4 * len(panels), 3.3), layout="constrained")
    axes_of_panels = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    steps = sorted(table["step"].unique())
    for axes, ((noise, kind), rows) in zip(axes_of_panels, panels, strict=True):
        rounds = sorted(rows["round"].unique())
        lines = zip(rounds, PATH_COLORS * 9, ("o-", "s--", "^:", "v-.") * 9, strict=False)
        for i, (number, color, line) in enumerate(lines):
            stats = 100 * rows[rows["round"] == number].groupby("step")["barrier"].agg(["mean", "min", "max"])
            spread = [stats["mean"] - stats["min"], stats["max"] - stats["mean"]]
            axes.errorbar(
                # beside each other, so that the bars of one round do not hide those of another
                [steps.index(step) + 0.06 * (i - (len(rounds) - 1) / 2) for step in stats.index],
                stats["mean"],
                yerr=[side.clip(lower=0) for side in spread],  # the mean of equal values may differ by rounding
                fmt=line,
                color=color,
                label=format_density(density[number]),
                markersize=3.5,
                linewidth=1.4,
                elinewidth=0.9,
                capsize=2,
            )
        axes.set_xticks(range(len(steps)), [f"{step:g}" for step in steps])
        axes.set_xlabel("Step at which the trainings part")
        title = "other data order" if kind == "twin" else f"noise of {100 * noise:g} % of the weights' norm"
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3, linewidth=0.6)
    axes_of_panels[0].set_ylabel("Error barrier (percentage points)")
    axes_of_panels[-1].legend(frameon=False, title="Density", fontsize="small", title_fontsize="small")
    return figure


def describe(run: Any) -> str:
    """Return a sentence about the test error barriers of twins of an `analysis.Run`."""
    rows, density = run.instability, densities(run.results)
    rows = rows[(rows["split"] == "test") & (rows["kind"] == "twin")].dropna()
    parts = []
    for number, of_round in rows.groupby("round"):
        means = 100 * of_round.groupby("step")["barrier"].mean()
        barriers = ", ".join(f"{barrier:.2f} from step {step:g}" for step, barrier in means.items())
        parts.append(f"{barriers} at {format_density(density[number])} density")
    return (
        f"The barriers of twins are, in percentage points of test error, {'; '.join(parts)}." if parts else ""
    )


register(
    "instability",
    compute_instability,
    columns=_COLUMNS,
    needs="run",
    description="error and loss barriers between imp and trainings that part from it at some steps: twins with "
    "another data order, and imp perturbed by noise (`perturbed`)",
    is_current=has_settings,
    cost=estimate_cost,
)
register_figure(
    "instability_steps",
    lambda run: draw(run.instability, run.results) if _has_rows(run) else None,
    "Test error barrier between imp and trainings that part from it at some steps of the training; mean of the "
    "replicates, bars from minimum to maximum.",
    describe,
)


def _has_rows(run):
    return len(run.instability.dropna()) > 0
