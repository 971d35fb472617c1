"""Stable training makes IMP work: batch size and warm-up (section 2.1, figures 1, 2, 6 and 12)."""

from itertools import product

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from experiments.paper.panels import (
    BLUE,
    ORANGE,
    SERIES,
    Finished,
    PaperFigure,
    blank,
    common_legend,
    curves,
    grid,
)
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run


def over_batch_sizes(scale: Scale) -> list[Run]:
    """Every batch size, without warm-up."""
    return [scale.batch(size) for size in scale.batch_sizes]


def over_warmups(scale: Scale) -> list[Run]:
    """Every batch size, without warm-up and with it."""
    warmups = (0.0, scale.warmup_epochs)
    return [
        scale.batch(n, optimizer__warmup_epochs=epochs) for n, epochs in product(scale.batch_sizes, warmups)
    ]


def over_stability(scale: Scale) -> list[Run]:
    """Conv-4 destabilised by a small batch and weight decay, and stable again at a large batch."""
    return [scale.conv4_destabilised, scale.conv4_restabilised]


def accuracy(scale: Scale, finished: Finished) -> Figure:
    return _over_warmups(scale, finished, "test_accuracy")


def threshold(scale: Scale, finished: Finished) -> Figure:
    return _over_warmups(scale, finished, "threshold")


def instability(scale: Scale, finished: Finished) -> Figure:
    """The error barrier between two trainings of a ticket over batch size, a line a pruning round."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for number, color in zip(scale.resnet20.config.instability.rounds, SERIES, strict=False):
        points = {}
        for run in over_batch_sizes(scale):
            if run in finished:
                barriers = finished[run].barriers
                of_twins = (barriers["kind"] == "instability") & (barriers["split"] == "test")
                points[run.config.batch_size] = (
                    100 * barriers[of_twins & (barriers["round"] == number)]["barrier"]
                )
        points = {size: barriers for size, barriers in points.items() if len(barriers)}
        if points:
            mean, low, high = (
                np.array([getattr(b, what)() for b in points.values()]) for what in ("mean", "min", "max")
            )
            bars = [(mean - low).clip(0), (high - mean).clip(0)]
            axes.errorbar(list(points), mean, bars, color=color, marker="o", capsize=2, label=f"round {number}")
    if not axes.lines:
        blank(axes)
        return figure
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(scale.batch_sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("Batch size")
    axes.set_ylabel("Instability (percentage points of error)")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small")
    return figure


def destabilised(scale: Scale, finished: Finished) -> Figure:
    """Conv-4 destabilised on the left, with a large batch on the right."""
    figure, panels = grid(2, columns=2)
    for axes, run in zip(panels, over_stability(scale), strict=True):
        curves(axes, finished, [("", BLUE, run)])
        axes.set_title(f"batch size {run.config.batch_size}", fontsize="medium")
    common_legend(figure)
    return figure


def _over_warmups(scale, finished, column):
    figure, panels = grid(len(scale.batch_sizes), columns=max(2, -(-len(scale.batch_sizes) // 2)))
    for axes, size in zip(panels, scale.batch_sizes, strict=True):
        series = [
            (words, color, scale.batch(size, optimizer__warmup_epochs=epochs))
            for words, color, epochs in (
                ("no warm-up", BLUE, 0.0),
                (f"{scale.warmup_epochs:g} epochs of warm-up", ORANGE, scale.warmup_epochs),
            )
        ]
        curves(axes, finished, series, column)
        axes.set_title(f"batch size {size}", fontsize="medium")
    common_legend(figure)
    return figure


FIGURES = (
    PaperFigure("fig1", "accuracy over density, batch size × warm-up", over_warmups, accuracy),
    PaperFigure("fig2", "instability over batch size", over_batch_sizes, instability),
    PaperFigure("fig6", "pruning threshold over density, batch size × warm-up", over_warmups, threshold),
    PaperFigure("fig12", "accuracy, destabilised and stable again", over_stability, destabilised),
)
