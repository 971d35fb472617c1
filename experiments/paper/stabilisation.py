"""Figures 1, 2, 6 and 12 (section 2.1): stable training makes IMP work. Batch size and warm-up."""

from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from experiments.paper.panels import (
    BLUE,
    ORANGE,
    SERIES,
    Finished,
    PaperFigure,
    add_common_legend,
    draw_curves,
    make_grid,
    mark_not_run,
)
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run


def list_batch_size_runs(scale: Scale) -> list[Run]:
    """List one run per batch size, without warm-up."""
    return [scale.make_resnet20_run(size) for size in scale.batch_sizes]


def list_warmup_runs(scale: Scale) -> list[Run]:
    """List two runs per batch size, without and with warm-up."""
    warmups = (0.0, scale.warmup_epochs)
    return [
        scale.make_resnet20_run(size, optimizer__warmup_epochs=epochs)
        for size, epochs in product(scale.batch_sizes, warmups)
    ]


def list_conv4_stability_runs(scale: Scale) -> list[Run]:
    """List Conv-4 destabilised by a small batch and weight decay, and stable again at a large batch."""
    return [scale.conv4_destabilised, scale.conv4_restabilised]


def draw_accuracy(scale: Scale, finished: Finished) -> Figure:
    """Draw the accuracy over density, one panel per batch size."""
    return _draw_warmups(scale, finished, "test_accuracy")


def draw_threshold(scale: Scale, finished: Finished) -> Figure:
    """Draw the pruning threshold over density, one panel per batch size."""
    return _draw_warmups(scale, finished, "threshold")


def draw_instability(scale: Scale, finished: Finished) -> Figure:
    """Draw the error barrier between two trainings of a ticket over batch size, one line per round."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for number, color in zip(scale.resnet20.config.instability.rounds, SERIES, strict=False):
        barriers = _instability_by_batch_size(scale, finished, number)
        if barriers:
            mean, low, high = (
                np.array([getattr(values, statistic)() for values in barriers.values()])
                for statistic in ("mean", "min", "max")
            )
            bars = [(mean - low).clip(0), (high - mean).clip(0)]
            label = f"round {number}"
            axes.errorbar(list(barriers), mean, bars, color=color, marker="o", capsize=2, label=label)
    if not axes.lines:
        mark_not_run(axes)
        return figure
    _label_batch_size_axis(axes, scale.batch_sizes)
    axes.set_ylabel("Instability (percentage points of error)")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small")
    return figure


def draw_destabilised(scale: Scale, finished: Finished) -> Figure:
    """Draw the accuracy of Conv-4: destabilised on the left, with a large batch on the right."""
    figure, panels = make_grid(2, columns=2)
    for axes, run in zip(panels, list_conv4_stability_runs(scale), strict=True):
        draw_curves(axes, finished, [("", BLUE, run)])
        axes.set_title(f"batch size {run.config.batch_size}", fontsize="medium")
    add_common_legend(figure)
    return figure


def _instability_by_batch_size(scale, finished, number):
    """Return the barriers between twins of round `number` in points, by batch size, where there are any."""
    barriers = {}
    for run in list_batch_size_runs(scale):
        if run in finished:
            table = finished[run].barriers
            rows = (table["kind"] == "instability") & (table["split"] == "test") & (table["round"] == number)
            if rows.any():
                barriers[run.config.batch_size] = 100 * table[rows]["barrier"]
    return barriers


def _label_batch_size_axis(axes: Axes, batch_sizes):
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(batch_sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("Batch size")


def _draw_warmups(scale, finished, column):
    figure, panels = make_grid(len(scale.batch_sizes), columns=max(2, -(-len(scale.batch_sizes) // 2)))
    for axes, size in zip(panels, scale.batch_sizes, strict=True):
        series = [
            (words, color, scale.make_resnet20_run(size, optimizer__warmup_epochs=epochs))
            for words, color, epochs in (
                ("no warm-up", BLUE, 0.0),
                (
                    f"{scale.warmup_epochs:g} epoch{'s' * (scale.warmup_epochs != 1)} of warm-up",
                    ORANGE,
                    scale.warmup_epochs,
                ),
            )
        ]
        draw_curves(axes, finished, series, column)
        axes.set_title(f"batch size {size}", fontsize="medium")
    add_common_legend(figure)
    return figure


FIGURES = (
    PaperFigure("fig1", "accuracy over density, batch size × warm-up", list_warmup_runs, draw_accuracy),
    PaperFigure("fig2", "instability over batch size", list_batch_size_runs, draw_instability),
    PaperFigure(
        "fig6", "pruning threshold over density, batch size × warm-up", list_warmup_runs, draw_threshold
    ),
    PaperFigure(
        "fig12", "accuracy, destabilised and stable again", list_conv4_stability_runs, draw_destabilised
    ),
)
