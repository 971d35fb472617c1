"""Without weight decay the threshold grows longer, and with it the plateau (section 4.2, figure 7)."""

from matplotlib.figure import Figure

from experiments.paper.panels import BLUE, ORANGE, Finished, PaperFigure, common_legend, curves
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run


def with_and_without(scale: Scale) -> list[Run]:
    """The semistable batch size with weight decay and without."""
    return [scale.batch(scale.semistable, optimizer__weight_decay=decay) for decay in (scale.weight_decay, 0.0)]


def accuracy_and_threshold(scale: Scale, finished: Finished) -> Figure:
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    labels = (f"weight decay {scale.weight_decay:g}", "no weight decay")
    series = list(zip(labels, (BLUE, ORANGE), with_and_without(scale), strict=True))
    for axes, column in zip(figure.subplots(1, 2), ("test_accuracy", "threshold"), strict=True):
        curves(axes, finished, series, column)
    common_legend(figure)
    return figure


FIGURES = (
    PaperFigure("fig7", "accuracy and threshold, weight decay", with_and_without, accuracy_and_threshold),
)
