"""Matplotlib figures of the tables in a workdir: pass DataFrames and get a `Figure` back.

This module does not import JAX. Figures always have matplotlib's default style, whatever a user's matplotlibrc
or style sheet says. The functions `draw_…` draw one panel of a figure into given axes.
"""

import contextlib
import functools
import io
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.style
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

# the colour-blind palette of Okabe and Ito; imp solid and its control dashed, as in the paper
STYLES = {
    "imp": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "reinit": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    # other masks with the ticket's weights
    "shuffled": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "random": {"color": "#666666", "linestyle": ":", "marker": "x"},
    "inverted": {"color": "#000000", "linestyle": ":", "marker": "v"},
    "erk": {"color": "#44AA99", "linestyle": ":", "marker": "<"},
    "uniform": {"color": "#999933", "linestyle": ":", "marker": ">"},
    "snip": {"color": "#CC79A7", "linestyle": "-.", "marker": "h"},
    "grasp": {"color": "#E69F00", "linestyle": "-.", "marker": "p"},
    "synflow": {"color": "#56B4E9", "linestyle": "-.", "marker": "d"},
    "magnitude_init": {"color": "#888888", "linestyle": "-.", "marker": "8"},
    # other weights with imp's mask
    "signs": {"color": "#AA4499", "linestyle": "--", "marker": "P"},
    "magnitudes": {"color": "#DDAA33", "linestyle": "--", "marker": "X"},
    "constant": {"color": "#332288", "linestyle": "--", "marker": "D"},
    "trained_signs": {"color": "#882255", "linestyle": "--", "marker": "*"},
    "permuted": {"color": "#117733", "linestyle": "--", "marker": "H"},
}
PATH_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00")
LABELS = {"imp": "IMP", "reinit": "random reinitialisation"}
METRICS = {"angular": "Angle (2∠/π)", "cosine": "Cosine distance", "euclidean": "Euclidean distance"}
DENSITY_TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


_style_lock = threading.RLock()


@contextlib.contextmanager
def _default_style() -> Iterator[None]:
    """Set matplotlib's default style, which belongs to the process: one thread at a time."""
    with _style_lock, matplotlib.style.context("default"):
        yield


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook displays without pyplot."""

    def draw(self, renderer: Any) -> None:
        with _default_style():  # matplotlib makes ticks when it draws them
            super().draw(renderer)

    def _repr_png_(self) -> bytes:  # called by IPython
        return to_bytes(self, dpi=100)


def use_default_style(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make a function that returns a figure draw it in matplotlib's default style."""

    @functools.wraps(function)
    def draw(*args, **kwargs):
        with _default_style():
            return function(*args, **kwargs)

    return draw


def accuracy(results: pd.DataFrame) -> Figure:
    """Draw test accuracy over density (figure 1): one line per arm, mean over replicates, min–max bars.

    Args:
      results: the columns arm, density and test_accuracy of results.csv.
    """
    return _draw_over_density(results, "test_accuracy", 100, "Test accuracy (%)")


def threshold(results: pd.DataFrame) -> Figure:
    """Draw the pruning threshold over density (figure 6), like `accuracy`.

    Args:
      results: the columns arm, density and threshold of results.csv.
    """
    return _draw_over_density(results, "threshold", 1, "Pruning threshold")


@use_default_style
def distances(table: pd.DataFrame, metric: str = "angular") -> Figure:
    """Draw a matrix of distances between rounds for each arm, means over replicates (figures 4, 9 to 11).

    All arms share a colour scale. The last row and column are the distances from the initialisation.

    Args:
      table: distances.csv.
      metric: angular, cosine or euclidean.
    """
    table = require_rows(table[table["metric"] == metric], f"distances of metric {metric!r}")
    arms = table["arm"].unique()
    limit = distance_limit(table, metric)
    figure = Figure(figsize=(0.9 + 3.2 * len(arms), 3.7), layout="constrained")
    panels = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for axes, arm in zip(panels, arms, strict=True):
        image = draw_distances(axes, table, metric, arm, limit)
        axes.set_title(LABELS.get(arm, arm), fontsize="medium")
        axes.set_xlabel("Pruning round")
    panels[0].set_ylabel("Pruning round")
    figure.colorbar(image, ax=panels, label=METRICS.get(metric, metric), shrink=0.9)
    return figure


def distance_limit(distances: pd.DataFrame, metric: str) -> float:
    """Return the upper end of a colour scale for means over replicates; at least 1 for angular distances."""
    table = distances[distances["metric"] == metric]
    means = table.groupby(["arm", "round_a", "round_b"])["distance"].mean()
    return max(1.0 if metric == "angular" else 0.0, means.max())


def draw_distances(axes: Axes, distances: pd.DataFrame, metric: str, arm: str, limit: float) -> AxesImage:
    """Draw the matrix of one arm (see `distances`), in colours from 0 to `limit`; return the image."""
    table = distances[(distances["metric"] == metric) & (distances["arm"] == arm)]
    means = table.groupby(["round_a", "round_b"])["distance"].mean()
    rounds = sorted(table["round_a"].unique(), key=lambda number: (number < 0, number))
    matrix = means.unstack().reindex(rounds, columns=rounds)
    image = axes.imshow(matrix, vmin=0, vmax=limit, cmap="viridis")
    step = max(1, len(rounds) // 5)
    regular = [index for index in range(0, len(rounds) - 1, step) if index < len(rounds) - 1 - step / 2]
    ticks = [*regular, len(rounds) - 1]
    labels = ["init" if rounds[index] < 0 else f"{rounds[index]}" for index in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    for line in (axes.axhline, axes.axvline):  # separates the initialisation
        line(len(rounds) - 1.5, color="white", linewidth=1)
    return image


@use_default_style
def histograms(table: pd.DataFrame, number: int = 10) -> Figure:
    """Draw histograms of the surviving weights of one round (figure 5), one per arm over all replicates.

    Args:
      table: histograms.csv.
      number: the round; if the table ends before it, its last round.
    """
    number = min(number, require_rows(table, "histograms")["round"].max())
    table = table[table["round"] == number]
    arms = table["arm"].unique()
    figure = Figure(figsize=(0.6 + 3 * len(arms), 2.9), layout="constrained")
    panels = figure.subplots(1, len(arms), squeeze=False, sharex=True, sharey=True)[0]
    limits = [draw_histogram(axes, table, number, arm) for axes, arm in zip(panels, arms, strict=True)]
    for axes, arm in zip(panels, arms, strict=True):
        axes.set_title(f"{LABELS.get(arm, arm)}, round {number}", fontsize="medium")
        axes.set_xlabel("Weight")
    panels[0].set_xlim(-max(limits), max(limits))
    panels[0].set_ylabel("Surviving weights (%)")
    return figure


def draw_histogram(axes: Axes, histograms: pd.DataFrame, number: int, arm: str) -> float:
    """Draw the histogram of one arm in round `number`; return x for an axis from −x to x."""
    table = histograms[(histograms["round"] == number) & (histograms["arm"] == arm)]
    bins = table.groupby("left").agg({"right": "first", "count": "sum"})
    # a few outliers would narrow the rest
    shown = bins[bins["count"] > bins["count"].sum() / 1e4]
    widest = max(shown["right"].max(), -shown.index.min()) if len(shown) else 1e-9  # if no weight survives
    shares = 100 * bins["count"] / bins["count"].sum()
    color = STYLES.get(arm, {}).get("color")
    axes.stairs(shares, [*bins.index, bins["right"].iloc[-1]], fill=True, color=color)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    return 1.05 * widest


@use_default_style
def barriers(
    paths: pd.DataFrame,
    barrier_table: pd.DataFrame,
    results: pd.DataFrame,
    rounds: Sequence[int] | None = None,
) -> Figure:
    """Draw the error on paths between successive rounds, and the error barrier over density (figure 8).

    Args:
      paths, barrier_table, results: paths.csv, barriers.csv and results.csv.
      rounds: the rounds at which the drawn paths end; None is the first, the middle and the last one.

    Raises:
      ValueError: there are no paths between successive rounds, or none ends at one of `rounds`.
    """
    paths, barrier_table = (
        require_rows(table[table["kind"] == "successive"], "rows of kind 'successive'")
        for table in (paths, barrier_table)
    )
    available = sorted(map(int, paths["round"].unique()))
    rounds = rounds or sorted({available[0], available[(len(available) - 1) // 2], available[-1]})
    if not set(rounds) <= set(available):
        raise ValueError(f"rounds is {rounds}; the paths end in the rounds {available}")
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_paths(left, paths, results, rounds)
    draw_barriers(right, barrier_table, results)
    return figure


def draw_paths(axes: Axes, paths: pd.DataFrame, results: pd.DataFrame, rounds: Sequence[int]) -> None:
    """Draw the test error along the paths that end in `rounds`: the mean, and a band from min to max."""
    density = densities(results)
    for number, color, line in zip(
        rounds, itertools.cycle(PATH_COLORS), itertools.cycle(("-", "--", ":", "-.")), strict=False
    ):
        rows = paths[(paths["round"] == number) & (paths["split"] == "test")]
        errors = 100 * rows.groupby("alpha")["error"].agg(["mean", "min", "max"])
        label = " → ".join(format_percent(density[end]) for end in (number - 1, number)) + " %"
        axes.plot(errors.index, errors["mean"], color=color, linestyle=line, linewidth=1.6, label=label)
        axes.fill_between(errors.index, errors["min"], errors["max"], color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("Position α on the path between two rounds")
    axes.set_ylabel("Test error (%)")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.3 * (top - bottom))  # room for the legend
    axes.legend(
        frameon=False,
        title="Densities",
        fontsize="small",
        title_fontsize="small",
        loc="upper center",
        ncols=3,
        columnspacing=1.0,
        handlelength=1.6,
    )
    axes.grid(alpha=0.3, linewidth=0.6)


def draw_barriers(
    axes: Axes, barriers: pd.DataFrame, results: pd.DataFrame, splits: Sequence[str] = ("test", "train")
) -> None:
    """Draw the barriers of one kind over density, for each split; one in the test error only may be noise."""
    table = barriers.assign(density=barriers["round"].map(densities(results)))
    styles = {"test": STYLES["imp"], "train": {"color": "#666666", "linestyle": ":", "marker": "^"}}
    for split in splits:
        rows = table[table["split"] == split]
        draw_mean(axes, rows, "barrier", 100, label=f"{split} set", **styles[split])
    density_axis(axes, table["density"].min())
    axes.set_ylabel("Error barrier (percentage points)")
    if len(splits) > 1:
        axes.legend(frameon=False, fontsize="small")


@use_default_style
def instability(barriers: pd.DataFrame, results: pd.DataFrame) -> Figure:
    """Draw the error barrier between imp and its twin over density (figure 2): mean, min and max.

    Args:
      barriers, results: barriers.csv and results.csv.
    """
    table = require_rows(barriers[barriers["kind"] == "instability"], "barriers of kind 'instability'")
    density = densities(results)
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    draw_barriers(axes, table, results)
    for number, rows in table.groupby("round"):
        position = (density[number], 100 * rows["barrier"].max())
        axes.annotate(
            f"round {number}", position, (0, 5), textcoords="offset points", ha="center", fontsize="small"
        )
    axes.margins(y=0.2)
    density_axis(axes, table["round"].map(density).min() / 1.5)  # leaves room for the labels
    axes.set_ylabel("Instability (percentage points of error)")
    return figure


def draw_mean(axes: Axes, rows: pd.DataFrame, column: str, scale: float = 1, **style: Any) -> None:
    """Draw the mean of `column` times `scale` at each density above 0, with bars from min to max."""
    by_density = rows.query("density > 0").groupby("density")[column]
    stats = scale * by_density.agg(["mean", "min", "max"]).sort_index(ascending=False)
    axes.errorbar(
        stats.index,
        stats["mean"],
        # the mean of equal values may differ from them by rounding, and bars must not be negative
        yerr=[(stats["mean"] - stats["min"]).clip(lower=0), (stats["max"] - stats["mean"]).clip(lower=0)],
        markersize=3.5,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2,
        **style,
    )


def density_axis(axes: Axes, lowest: float) -> None:
    """Make the x axis logarithmic, from density 1 on the left down to `lowest`, as in the paper."""
    axes.set_xscale("log")
    end = max(min(lowest, 0.5), 1e-9) / 1.15
    axes.set_xlim(1.15, end)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in DENSITY_TICKS if tick >= end]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{100 * density:g}"))
    axes.set_xlabel("Density: weights remaining (%)")
    axes.grid(alpha=0.3, linewidth=0.6)


def format_percent(density: float) -> str:
    """Return a density in percent, with two digits."""
    return f"{float(f'{100 * density:.2g}'):g}"


def log_y_axis(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers such as 20 and 50."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_below(figure: matplotlib.figure.Figure, lines: dict[str, Any]) -> None:
    """Add a legend below all panels, from label to what `Axes.errorbar` or `Axes.plot` drew."""
    options = {"ncols": min(4, len(lines)), "frameon": False, "fontsize": "small"}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", **options)


def nearest_density(densities: pd.Series, density: float = 0.1) -> float:
    """Return the entry of `densities`, all above 0, that is nearest to `density` on a logarithmic axis."""
    return min(densities, key=lambda other: abs(math.log(other / density)))


def to_bytes(figure: matplotlib.figure.Figure, file_format: str = "png", dpi: int = 200) -> bytes:
    """Return the figure as the bytes of a PNG or PDF file; `dpi` is in dots per inch."""
    buffer = io.BytesIO()
    # no date, so that the same figure gives the same file
    metadata = {"CreationDate": None} if file_format == "pdf" else None
    with _default_style():
        figure.savefig(buffer, format=file_format, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def require_rows(table: pd.DataFrame, description: str) -> pd.DataFrame:
    """Return `table`. Raises a ValueError if it has no rows; `description` says what they would be."""
    if table.empty:
        raise ValueError(f"there are no {description} in the table to draw")
    return table


@use_default_style
def _draw_over_density(results, column, scale, label):
    """Draw a column over density, one line per arm."""
    results = results[results["arm"] != "twin"]
    many = results["arm"].nunique() > 4
    figure = Figure(figsize=(7.6 if many else 5.6, 4.2 if many else 3.6), layout="constrained")
    axes = figure.add_subplot()
    for arm, rows in results.groupby("arm", sort=False):
        name = arm.partition(" ")[0]  # without the branch
        style = (
            STYLES.get(name, {}) if name == arm else {"color": STYLES.get(name, {}).get("color"), "marker": "."}
        )
        draw_mean(axes, rows, column, scale, label=LABELS.get(arm, arm), **style)
    density_axis(axes, results.query("density > 0")["density"].min())
    axes.set_ylabel(label)
    if many:  # beside the axes, where it hides no line
        figure.legend(frameon=False, fontsize="small", loc="outside right center")
    else:
        axes.legend(frameon=False)
    return figure


def densities(results: pd.DataFrame) -> pd.Series:
    """Return the density of each round, from results.csv."""
    return results.groupby("round")["density"].first()
