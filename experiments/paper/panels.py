"""Declare what a figure of the paper is, and draw the panels that figures consist of.

A panel draws the finished rounds of a run; for a run without any, it shows the words "not run".
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from experiments.paper.quantities import HISTOGRAM_DENSITY, find_round
from experiments.paper.scales import Scale
from experiments.sweeps.runs import AnyRun, Run
from experiments.sweeps.sweep import Finished
from imp_jax import figures
from imp_jax.workdir.progress import make_console

BLUE, GREEN, ORANGE = "#0072B2", "#009E73", "#D55E00"
SERIES = (BLUE, ORANGE, GREEN, "#CC79A7")
ARMS = {"imp": {"linestyle": "-", "marker": "o"}, "reinit": {"linestyle": "--", "marker": "s"}}
COLUMNS = {  # columns of results.csv: factor, label
    "test_accuracy": (100, "Test accuracy (%)"),
    "train_accuracy": (100, "Training accuracy (%)"),
    "threshold": (1, "Pruning threshold"),
}
NOT_RUN = "not run"
Y_RANGE_POINTS = 15  # the y axis reaches so many points below the best accuracy; see `clip_accuracy`


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A figure or a table of the paper, or an experiment of the literature with both.

    Attributes:
      name: such as fig14 or table1; also the name of its file.
      shows: what it shows, in a few words.
      runs: lists the runs that it needs; a run comes before its branches.
      draw: draws it from those runs that have a finished round; a table is returned as Markdown.
      table: returns a table that belongs to the figure.
    """

    name: str
    shows: str
    runs: Callable[[Scale], Sequence[AnyRun]]
    draw: Callable[[Scale, Finished], Figure | str]
    table: Callable[[Scale, Finished], str] | None = None


def draw_curves(
    axes: Axes, finished: Finished, series: Sequence[tuple[str, str, Run]], column: str = "test_accuracy"
) -> None:
    """Draw a column of results.csv over density: IMP as a solid line, its reinit as a dashed one.

    The y axis of accuracy covers at most `Y_RANGE_POINTS` points below the best value, plus a margin of 1, or
    all values if most are lower. It is the same in all panels of a figure.

    Args:
      series: (label, colour, run) of each pair of lines.
    """
    factor, label = COLUMNS[column]
    lowest = []
    for name, color, run in series:
        if run not in finished:
            continue
        results = finished[run].results
        for arm, style in ARMS.items():
            if len(rows := results[results["arm"] == arm]):
                words = f"{name}, {figures.LABELS[arm]}" if name else figures.LABELS[arm]
                figures.draw_mean(axes, rows, column, factor, label=words, color=color, **style)
                lowest.append(rows["density"].min())
    axes.set_ylabel(label)
    if not lowest:
        return mark_not_run(axes)
    figures.density_axis(axes, min(lowest))
    if column == "test_accuracy":
        clip_accuracy(axes, Y_RANGE_POINTS)


def clip_accuracy(axes: Axes, points: float) -> None:
    """Limit the y axis to `points` below the best accuracy of all panels with the same label.

    If more than half of the values are lower, all are shown.
    """
    panels = [each for each in axes.figure.axes if each.get_ylabel() == axes.get_ylabel()]
    values = np.concatenate([line.get_ydata(orig=False) for panel in panels for line in panel.get_lines()])
    lowest = values.max() - points
    if np.mean(values < lowest) > 0.5:
        lowest = values.min()
    axes.set_ylim(max(values.min(), lowest) - 1, values.max() + 1)


def draw_matrices(
    finished: Finished, rows: Sequence[Sequence[tuple[str, Run, str]]], metric: str = "angular"
) -> Figure:
    """Draw matrices of distances between rounds, one panel per (title, run, arm), with one colour scale."""
    figure, panels = _make_panels(rows, width=2.6, height=2.95, sharey=True)
    runs = [run for row in rows for _, run, _ in row if run in finished]
    tables = {run: finished[run].distances[finished[run].distances["metric"] == metric] for run in runs}
    limit = max((figures.distance_limit(table, metric) for table in tables.values() if len(table)), default=1.0)
    image = None
    for axes, (title, run, arm) in panels:
        table = tables.get(run)
        if table is None or not (table["arm"] == arm).any():
            mark_not_run(axes)
        else:
            image = figures.draw_distances(axes, table, metric, arm, limit)
        axes.set_title(title, fontsize="medium")
    for axes in figure.axes[-len(rows[0]) :]:
        axes.set_xlabel("Pruning round")
    for axes in figure.axes[:: len(rows[0])]:
        axes.set_ylabel("Pruning round")
    if image:
        figure.colorbar(image, ax=figure.axes, label=figures.METRICS[metric], shrink=0.9)
    return figure


def draw_histograms(finished: Finished, rows: Sequence[Sequence[tuple[str, Run, str]]]) -> Figure:
    """Draw histograms of the surviving weights, one panel per (title, run, arm), with one x axis per run.

    They are those after the round whose density is nearest to that of round 10 of the paper, or after the last
    finished one.
    """
    figure, panels = _make_panels(rows, width=3, height=2.4)
    limits = {}
    for axes, (title, run, arm) in panels:
        table = finished[run].histograms if run in finished else pd.DataFrame({"round": [], "arm": []})
        number = find_round(run.config, HISTOGRAM_DENSITY)
        shown_round = min(number, table["round"].max()) if len(table) else number
        if not ((table["round"] == shown_round) & (table["arm"] == arm)).any():
            mark_not_run(axes)
        else:
            limits[run] = max(limits.get(run, 0), figures.draw_histogram(axes, table, shown_round, arm))
        axes.set_title(title if shown_round == number else f"{title}, round {shown_round}", fontsize="medium")
    for axes, (_, run, _) in panels:
        if run in limits:
            axes.set_xlim(-limits[run], limits[run])
    for axes in figure.axes[-len(rows[0]) :]:
        axes.set_xlabel("Weight")
    for axes in figure.axes[:: len(rows[0])]:
        axes.set_ylabel("Surviving weights (%)")
    return figure


def draw_barrier(axes: Axes, finished: Finished, run: Run) -> None:
    """Draw the error barrier between the optima of successive rounds over density, on test images."""
    table = finished[run].barriers if run in finished else pd.DataFrame({"kind": []})
    if not len(table := table[table["kind"] == "successive"]):
        return mark_not_run(axes)
    figures.draw_barriers(axes, table, finished[run].results, splits=["test"])


def mark_not_run(axes: Axes) -> None:
    """Write "not run" into a panel and hide its ticks."""
    axes.text(0.5, 0.5, NOT_RUN, transform=axes.transAxes, ha="center", va="center", color="#999999")
    axes.tick_params(
        left=False, labelleft=False, bottom=False, labelbottom=False
    )  # not the locators, which panels may share


def add_common_legend(figure: Figure, columns: int = 2) -> None:
    """Add one legend below all panels, with each label once."""
    labels = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if labels:
        figure.legend(
            labels.values(),
            labels.keys(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize="small",
        )


def make_wide_console() -> Console:
    """Return a console; if the output is not a terminal, its lines are long enough for a table."""
    console = make_console()
    if not console.is_terminal:
        console.width = 180
    return console


def make_grid(
    count: int, columns: int, width: float = 3.3, height: float = 2.6, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """Create a figure of `count` panels in rows of `columns`."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _make_panels(rows, width, height, **options):
    figure = Figure(figsize=(width * len(rows[0]) + 0.9, height * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(rows[0]), squeeze=False, **options)
    return figure, list(zip(panels.flat, (panel for row in rows for panel in row), strict=True))
