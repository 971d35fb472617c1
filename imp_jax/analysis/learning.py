"""The table learning: early stopping over rounds, from the curves in epochs.csv."""

import itertools
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from imp_jax.analysis.registry import RunInputs, register
from imp_jax.figures import (
    LABELS,
    PATH_COLORS,
    STYLES,
    Figure,
    densities,
    density_axis,
    draw_mean,
    require_rows,
    use_default_style,
)

_KEYS = ["replicate", "arm", "round"]


def compute_early_stopping(inputs: RunInputs) -> Iterator[tuple]:
    """Find the early-stopping epoch of every member and round with rows in epochs.csv.

    The columns are those of `find_early_stopping`, and

    - final_accuracy: test accuracy at the end of the training, in [0, 1].
    """
    if inputs.epochs.empty:
        return
    final = inputs.results.set_index(_KEYS)["test_accuracy"]
    stopped = find_early_stopping(inputs.epochs).set_index(_KEYS, drop=False)
    yield from stopped.join(final).itertuples(index=False, name=None)


def find_early_stopping(epochs: pd.DataFrame) -> pd.DataFrame:
    """Find the early-stopping epochs of trainings, as in Frankle & Carbin 2019 (section 2).

    Args:
      epochs: epochs.csv, as in `analysis.load(workdir).epochs`.

    Returns: a row for each replicate, arm and round, without those whose losses are all nan. Other columns:

    - split: "validation", or "test" if there are no validation images; the accuracy is then optimistic.
    - early_stopping_epoch: number of finished epochs at the lowest loss on this split; the first, if several
      are as low.
    - early_stopping_accuracy: test accuracy after this epoch, in [0, 1].
    """
    split = "validation" if epochs["validation_loss"].notna().any() else "test"
    curves = epochs.dropna(subset=f"{split}_loss")
    best = curves.loc[curves.groupby(_KEYS, sort=False)[f"{split}_loss"].idxmin()]
    return pd.DataFrame(
        {
            **best[_KEYS],
            "split": split,
            "early_stopping_epoch": best["epoch"].astype(float),
            "early_stopping_accuracy": best["test_accuracy"].astype(float),
        }
    )


@use_default_style
def draw_learning(learning: pd.DataFrame, epochs: pd.DataFrame, results: pd.DataFrame) -> Figure:
    """Draw test accuracy over epochs at a few densities, and the early-stopping epoch over density.

    Args:
      learning, epochs, results: learning.csv, epochs.csv and results.csv.

    Raises:
      ValueError: there are no early-stopping epochs.
    """
    table = require_rows(learning[learning["arm"] != "twin"], "early-stopping epochs")
    figure = Figure(figsize=(8.2, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, table, epochs, results)
    table = table.assign(density=table["round"].map(densities(results)))
    for arm, rows in table.groupby("arm", sort=False):
        draw_mean(right, rows, "early_stopping_epoch", label=LABELS.get(arm, arm), **STYLES.get(arm, {}))
    density_axis(right, table["density"].min())
    right.set_ylabel("Early-stopping epoch")
    if table["arm"].nunique() > 2:  # beside the axes, where it hides no bar
        handles_and_labels = right.get_legend_handles_labels()
        figure.legend(*handles_and_labels, frameon=False, fontsize="small", loc="outside right center")
    else:
        right.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")
    right.set_ylim(0, 1.15 * epochs["epoch"].max())
    return figure


def draw_curves(axes: Axes, learning: pd.DataFrame, epochs: pd.DataFrame, results: pd.DataFrame) -> None:
    """Draw the test accuracy of imp, or else the first arm, over epochs at four densities, with its range.

    A circle on each mean is at the mean of the early-stopping epochs.
    """
    arm = _main_arm(learning)
    curves, stops = (table[table["arm"] == arm] for table in (epochs, learning))
    available = sorted(set(stops["round"]))
    chosen = sorted({available[i * (len(available) - 1) // 3] for i in range(4)})
    density = densities(results)
    for number, color, line in zip(chosen, PATH_COLORS, itertools.cycle(("-", "--", ":", "-.")), strict=False):
        accuracy = 100 * curves[curves["round"] == number].groupby("epoch")["test_accuracy"].agg(
            ["mean", "min", "max"]
        )
        style = {"color": color, "linestyle": line, "linewidth": 1.6, "label": _percent(density[number])}
        axes.plot(accuracy.index, accuracy["mean"], **style)
        axes.fill_between(
            accuracy.index, accuracy["min"], accuracy["max"], color=color, alpha=0.15, linewidth=0
        )
        stop = stops[stops["round"] == number]["early_stopping_epoch"].mean()
        height = np.interp(stop, accuracy.index, accuracy["mean"])
        axes.plot(stop, height, "o", color=color, markersize=5.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Epoch")
    axes.set_ylabel("Test accuracy (%)")
    axes.set_title(LABELS.get(arm, arm), fontsize="medium")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small", title="Densities", title_fontsize="small", loc="lower right")


def describe_learning(learning: pd.DataFrame, results: pd.DataFrame) -> str:
    """Describe early stopping of imp, or else the first arm, in the first round and that nearest to 10 %."""
    arm = _main_arm(learning)
    means = learning[learning["arm"] == arm].groupby("round").mean(numeric_only=True)
    density = densities(results)[means.index]
    dense, sparse = density.index[0], (density - 0.1).abs().idxmin()
    parts = [
        f"after {means['early_stopping_epoch'][number]:.1f} epochs at {_percent(density[number])} density"
        for number in dict.fromkeys((dense, sparse))
    ]
    return (
        f"{arm} reaches its lowest {learning['split'].iloc[0]} loss {' and '.join(parts)}; there its test "
        f"accuracy is {100 * means['early_stopping_accuracy'][sparse]:.2f} % at that epoch and "
        f"{100 * means['final_accuracy'][sparse]:.2f} % at the end of the training."
    )


def _percent(density):
    return f"{float(f'{100 * density:.3g}'):g} %"


def _main_arm(learning):
    """Return imp if it has rows, otherwise the first arm, as in a branch."""
    arms = list(learning["arm"].unique())
    return "imp" if "imp" in arms else arms[0]


register(
    "learning",
    compute_early_stopping,
    columns=(*_KEYS, "split", "early_stopping_epoch", "early_stopping_accuracy", "final_accuracy"),
    needs="run",
    description="early-stopping epoch, at the lowest loss on the validation split (without one on the test "
    "split, which is optimistic), test accuracy at this epoch and at the end; for runs with `evaluate_epochs`",
    figure=lambda run: draw_learning(run.learning, run.epochs, run.results) if len(run.learning) else None,
    caption="Left: test accuracy during the training at four densities; mean of the replicates, bands from "
    "minimum to maximum, circles at the early-stopping epoch. Right: the early-stopping epoch over density.",
    sentence=lambda run: describe_learning(run.learning, run.results),
)
