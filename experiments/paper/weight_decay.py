"""Figure 7 (section 4.2): without weight decay, the threshold grows for longer, and the plateau is longer."""

from matplotlib.figure import Figure

from experiments.paper.panels import BLUE, ORANGE, Finished, PaperFigure, add_common_legend, draw_curves
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run


def list_weight_decay_runs(scale: Scale) -> list[Run]:
    """List the runs at the semistable batch size: with weight decay, and without."""
    decays = (scale.weight_decay, 0.0)
    return [scale.make_resnet20_run(scale.semistable, optimizer__weight_decay=decay) for decay in decays]


def draw_accuracy_and_threshold(scale: Scale, finished: Finished) -> Figure:
    """Draw the accuracy on the left and the pruning threshold on the right."""
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    labels = (f"weight decay {scale.weight_decay:g}", "no weight decay")
    series = list(zip(labels, (BLUE, ORANGE), list_weight_decay_runs(scale), strict=True))
    for axes, column in zip(figure.subplots(1, 2), ("test_accuracy", "threshold"), strict=True):
        draw_curves(axes, finished, series, column)
    add_common_legend(figure)
    return figure


FIGURES = (
    PaperFigure(
        "fig7",
        "accuracy and threshold, weight decay",
        list_weight_decay_runs,
        draw_accuracy_and_threshold,
    ),
)
