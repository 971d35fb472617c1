"""The analysis sublevel: whether the next solution is in the sublevel set that the pruned one was in.

Paul et al. 2023 ("Unmasking the Lottery Ticket Hypothesis: What's Encoded in a Winning Ticket's Mask?", arXiv
2210.03044) call the networks with an error of at most E(θ) + ε, to which a line without a barrier above ε leads
from θ, the linearly connected sublevel set of θ. They ask whether the mask of the next round passes on a
subspace that intersects this set, and whether training finds the way back to it. We follow two legs, from the
solution to its projection on the next mask and on to the next solution, and compare the error on them with that
of the worse solution (ours; the tables paths and barriers have the direct line).
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from imp_jax import connectivity, masking
from imp_jax.analysis.registry import NetworkInputs, register
from imp_jax.figures import (
    STYLES,
    Figure,
    densities,
    density_axis,
    draw_mean,
    format_percent,
    require_rows,
    use_default_style,
)

TRAIN_IMAGES = 500  # at most, so that the analysis costs less than paths.csv (ours)
TOLERANCE = 0.02  # ε of the sentence in the report, as an error (ours)


def compute_sublevel(inputs: NetworkInputs) -> Iterator[tuple]:
    """Compute the error from the solution of the previous round over its projection to that of this round.

    The projection θ_l⊙m_{l+1} of the solution θ_l of the previous round, with the mask of this round, has the
    normalisation statistics of θ_l, unless they are re-estimated. One row for each split. Columns:

      split: test, or train; of the training set at most `TRAIN_IMAGES` images at equal distances.
      error, projected_error, next_error: errors, in [0, 1], of θ_l, of the projection and of θ_{l+1}.
      projection_barrier, retraining_barrier: error barriers, as differences of errors, on the line from θ_l to
        the projection, and on that from the projection to θ_{l+1}.
      excess: highest error on both lines minus the larger one of `error` and `next_error`; at least 0.
      points, baseline, batch_norm: number of points of each line, and settings for barriers and statistics.
    """
    settings, experiment = inputs.config.analysis, inputs.experiment
    train, test = experiment.dataset.train, experiment.dataset.test
    # not the first images: a data set may be sorted by class
    subset = np.linspace(0, train.examples - 1, min(TRAIN_IMAGES, train.examples)).astype(int)
    solution, projection = inputs.other.variables, project(inputs.other, inputs.mask)
    for name, split in (("train", train.take(subset)), ("test", test)):
        legs = [
            connectivity.path_metrics(
                *ends,
                split,
                spec=experiment.spec,
                num_points=_points(inputs.config),
                batch_norm=settings.batch_norm,
                train=train,
            )[1]
            for ends in ((solution, projection), (projection, inputs.variables))
        ]
        first, second = legs
        yield (
            name,
            *map(float, (first[0], second[0], second[-1])),
            *(float(connectivity.error_barrier(leg, settings.baseline)) for leg in legs),
            float(connectivity.sublevel_excess(*legs)),
            len(first),
            settings.baseline,
            settings.batch_norm,
        )


def project(network: NetworkInputs, mask: masking.Mask) -> dict:
    """Return the variables of a network with the weights that `mask` prunes set to zero."""
    return {"params": masking.apply(network.params, mask), **network.model_state}


def sublevel_is_current(table: pd.DataFrame, config: ConfigDict) -> pd.Series:
    """Return which rows were computed with the number of points, baseline and `batch_norm` of the config."""
    return (
        (table["points"] == _points(config))
        & (table["baseline"] == config.analysis.baseline)
        & (table["batch_norm"] == config.analysis.batch_norm)
    )


def _points(config):
    """Return the number of points of each of the two lines.

    They have a quarter of the intervals of a path of paths.csv, because the highest error is mostly that of the
    projection, an end of both lines.
    """
    return max(2, config.analysis.path_points // 4 + 1)


@use_default_style
def draw_sublevel(table: pd.DataFrame, results: pd.DataFrame) -> Figure:
    """Draw, over density, the test error of the solutions and of the projection, and the barriers between them.

    Args:
      table, results: sublevel.csv and results.csv.
    """
    table = require_rows(table[table["split"] == "test"], "rows of the test set")
    table = table.assign(density=table["round"].map(densities(results)))
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    errors = {"error": "solution", "projected_error": "pruned", "next_error": "next solution"}
    _draw_columns(left, table, errors)
    left.set_ylabel("Test error (%)")
    barriers = {
        "projection_barrier": "barrier, solution → pruned",
        "retraining_barrier": "barrier, pruned → next solution",
        "excess": "excess over the worse solution",
    }
    _draw_columns(right, table, barriers)
    right.axhline(100 * TOLERANCE, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    right.set_ylabel("Test error (percentage points)")
    return figure


def _draw_columns(axes: Axes, table: pd.DataFrame, labels: dict[str, str]) -> None:
    styles = STYLES["random"], STYLES["reinit"], STYLES["imp"]
    for (column, label), style in zip(labels.items(), styles, strict=True):
        draw_mean(axes, table, column, 100, label=label, **style)
    density_axis(axes, table["density"].min())
    axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))


def describe_sublevel(table: pd.DataFrame, results: pd.DataFrame) -> str:
    """Return the longest range of densities in which the mean excess on the test set is within `TOLERANCE`."""
    excess = table[table["split"] == "test"].groupby("round")["excess"].mean()
    stays = excess <= TOLERANCE
    if not stays.any():
        return (
            f"No solution is in the sublevel set of the one before within our tolerance of {100 * TOLERANCE:g} "
            f"points: on the way over the pruned network, the test error exceeds that of the worse solution by "
            f"at least {100 * excess.min():.1f} points."
        )
    longest = max((rows for _, rows in excess[stays].groupby((~stays).cumsum())), key=len)
    first, last = (format_percent(densities(results)[number]) for number in longest.index[[0, -1]])
    others = excess.drop(longest.index)
    outside = f", and at other densities by up to {100 * others.max():.1f} points" if len(others) else ""
    return (
        f"From {first} to {last} % density, each solution is in the sublevel set of the one before within our "
        f"tolerance of {100 * TOLERANCE:g} points: on the way over the pruned network, the test error exceeds "
        f"that of the worse solution by at most {100 * longest.max():.1f} points{outside}."
    )


register(
    "sublevel",
    compute_sublevel,
    columns=(
        *("split", "error", "projected_error", "next_error"),
        *("projection_barrier", "retraining_barrier", "excess"),
        *("points", "baseline", "batch_norm"),
    ),
    needs="successive",
    description="errors (0 to 1) of the solution of the previous round, of its projection on the mask of this "
    "round and of the solution of this round, the error barriers between them, and the highest error on the "
    f"way minus that of the worse solution, on the test set and on at most {TRAIN_IMAGES:,} training images",
    is_current=sublevel_is_current,
    figure=lambda run: draw_sublevel(run.sublevel, run.results) if len(run.sublevel) else None,
    caption="Left: test error of a solution, of the same network pruned for the next round (at the density on "
    "the axis), and of the next solution, trained from this mask. Right: error barriers on the lines between "
    "them, and the highest error on both lines minus that of the worse solution (Paul et al. 2023); the dotted "
    "line is our tolerance. Mean of the replicates, bars from minimum to maximum.",
    sentence=lambda run: describe_sublevel(run.sublevel, run.results),
)
