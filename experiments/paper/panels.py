"""How the figures of a sweep are declared, and the panels they are made of.

A panel draws what there is of a run: of one under way its rounds so far, of one not begun the words "not run".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run
from imp_jax import analysis, figures
from imp_jax.workdir.progress import make_console

BLUE, GREEN, ORANGE = "#0072B2", "#009E73", "#D55E00"
SERIES = (BLUE, ORANGE, GREEN, "#CC79A7")
ARMS = {"imp": {"linestyle": "-", "marker": "o"}, "reinit": {"linestyle": "--", "marker": "s"}}
COLUMNS = {  # of results.csv: factor, label
    "test_accuracy": (100, "Test accuracy (%)"),
    "threshold": (1, "Pruning threshold"),
}
NOT_RUN = "not run"
Y_RANGE_POINTS = (
    15  # points of accuracy below the best; what falls further leaves the panel, or the rest would be a line
)

Finished = Mapping[Run, analysis.Run]  # the runs of which there is a round at least


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A figure or a table of the paper."""

    id: str
    shows: str
    runs: Callable[[Scale], Sequence[Run]]
    draw: Callable[[Scale, Finished], Figure | str]  # a table is Markdown


def curves(
    axes: Axes, finished: Finished, series: Sequence[tuple[str, str, Run]], column: str = "test_accuracy"
) -> None:
    """A column of results.csv over density: IMP solid, its reinit dashed, for each (label, colour, run).

    Of accuracy `Y_RANGE_POINTS` points are shown, with all panels of a figure on one axis.
    """
    scale, label = COLUMNS[column]
    lowest = []
    for name, color, run in series:
        if run not in finished:
            continue
        results = finished[run].results
        for arm, style in ARMS.items():
            if len(rows := results[results["arm"] == arm]):
                words = f"{name}, {figures.LABELS[arm]}" if name else figures.LABELS[arm]
                figures.draw_mean(axes, rows, column, scale, label=words, color=color, **style)
                lowest.append(rows["density"].min())
    axes.set_ylabel(label)
    if not lowest:
        return blank(axes)
    figures.density_axis(axes, min(lowest))
    if column == "test_accuracy":
        lines = [line for each in axes.figure.axes for line in each.get_lines() if each.get_ylabel() == label]
        points = np.concatenate([line.get_ydata(orig=False) for line in lines])
        axes.set_ylim(max(points.min(), points.max() - Y_RANGE_POINTS) - 1, points.max() + 1)


def matrices(
    finished: Finished, rows: Sequence[Sequence[tuple[str, Run, str]]], metric: str = "angular"
) -> Figure:
    """Matrices of distances between rounds, of (title, run, arm) a panel, with one colour scale."""
    figure, panels = _grid(rows, width=2.6, height=2.95, sharey=True)
    runs = [run for row in rows for _, run, _ in row if run in finished]
    tables = {run: finished[run].distances[finished[run].distances["metric"] == metric] for run in runs}
    limit = max((figures.distance_limit(table, metric) for table in tables.values() if len(table)), default=1.0)
    image = None
    for axes, (title, run, arm) in panels:
        table = tables.get(run)
        if table is None or not (table["arm"] == arm).any():
            blank(axes)
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


def histograms(finished: Finished, rows: Sequence[Sequence[tuple[str, Run, str]]], number: int = 10) -> Figure:
    """The surviving weights after round `number`, of (title, run, arm) a panel, an axis a run."""
    figure, panels = _grid(rows, width=3, height=2.4)
    limits = {}
    for axes, (title, run, arm) in panels:
        table = finished[run].histograms if run in finished else pd.DataFrame({"round": [], "arm": []})
        there = min(number, table["round"].max()) if len(table) else number
        if not ((table["round"] == there) & (table["arm"] == arm)).any():
            blank(axes)
        else:
            limits[run] = max(limits.get(run, 0), figures.draw_histogram(axes, table, there, arm))
        axes.set_title(title if there == number else f"{title}, round {there}", fontsize="medium")
    for axes, (_, run, _) in panels:
        if run in limits:
            axes.set_xlim(-limits[run], limits[run])
    for axes in figure.axes[-len(rows[0]) :]:
        axes.set_xlabel("Weight")
    for axes in figure.axes[:: len(rows[0])]:
        axes.set_ylabel("Surviving weights (%)")
    return figure


def barrier(axes: Axes, finished: Finished, run: Run) -> None:
    """The largest rise of the test error between the optima of successive rounds over density."""
    table = finished[run].barriers if run in finished else pd.DataFrame({"kind": []})
    if not len(table := table[table["kind"] == "successive"]):
        return blank(axes)
    figures.draw_barriers(axes, table, finished[run].results, splits=["test"])


def blank(axes: Axes) -> None:
    """A panel of which nothing has been run yet."""
    axes.text(0.5, 0.5, NOT_RUN, transform=axes.transAxes, ha="center", va="center", color="#999999")
    axes.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)  # axes may be shared


def common_legend(figure: Figure) -> None:
    """One legend below all panels, with each label once."""
    labels = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if labels:
        figure.legend(
            labels.values(), labels.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize="small"
        )


def wide_console() -> Console:
    """The terminal, or a file whose lines are long enough for a table."""
    console = make_console()
    if not console.is_terminal:
        console.width = 180
    return console


def grid(count: int, columns: int, width: float = 3.3, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of `columns`, with one y axis."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _grid(rows, width, height, **options):
    figure = Figure(figsize=(width * len(rows[0]) + 0.9, height * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(rows[0]), squeeze=False, **options)
    return figure, list(zip(panels.flat, (panel for row in rows for panel in row), strict=True))
