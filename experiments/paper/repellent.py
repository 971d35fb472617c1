"""Is it the return to earlier optima that makes a ticket win (section 3, figures 3 and 13 to 17)?"""

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from experiments.paper.panels import BLUE, GREEN, Finished, PaperFigure, common_legend, curves, grid, matrices
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run

REPELLENT, ATTRACTIVE = 2.0, -1.0  # λ_r


def of_resnet20(scale: Scale) -> list[Run]:
    """Stable and repelled on the left, unstable and attracted on the right."""
    stable, unstable = scale.batch(scale.stable), scale.batch(scale.unstable)
    return [stable, repelled(stable), unstable, unstable.with_overrides(repulsion__strength=ATTRACTIVE)]


def of_conv4(scale: Scale) -> list[Run]:
    return [scale.conv4, repelled(scale.conv4)]


def of_lenet(scale: Scale) -> list[Run]:
    return [scale.lenet, repelled(scale.lenet)]


def repelled_resnet20(scale: Scale) -> list[Run]:
    return [repelled(scale.batch(scale.stable))]


def last_optimum_only(scale: Scale) -> list[Run]:
    return [repelled(scale.lenet).with_overrides(repulsion__memory="last")]


def repelled(run: Run) -> Run:
    """The run that is repelled from all its earlier optima."""
    return run.with_overrides(repulsion__strength=REPELLENT)


def both_ways(scale: Scale, finished: Finished) -> Figure:
    stable, repellent, unstable, attractive = of_resnet20(scale)
    figure, panels = grid(2, columns=2)
    curves(panels[0], finished, [("", BLUE, stable), ("repellent", GREEN, repellent)])
    curves(panels[1], finished, [("", BLUE, unstable), ("attractive", "#CC79A7", attractive)])
    for axes, words, run in ((panels[0], "stable", stable), (panels[1], "unstable", unstable)):
        axes.set_title(f"{words}: batch size {run.config.batch_size}", fontsize="medium")
    common_legend(figure)
    return figure


def accuracy(runs: Callable, scale: Scale, finished: Finished) -> Figure:
    plain, repellent = runs(scale)
    figure, (axes,) = grid(1, columns=1, width=4.6, height=3.4)
    curves(axes, finished, [("", BLUE, plain), ("repellent", GREEN, repellent)])
    common_legend(figure)
    return figure


def repellent_matrices(scale: Scale, finished: Finished) -> Figure:
    (run,) = repelled_resnet20(scale)
    return matrices(finished, [[("repellent IMP", run, "imp"), ("repellent reinitialisation", run, "reinit")]])


def repellent_and_plain_matrices(scale: Scale, finished: Finished) -> Figure:
    plain, repellent = of_conv4(scale)
    arms = (("IMP", "imp"), ("reinitialisation", "reinit"))
    return matrices(
        finished, [[(name, plain, arm), (f"repellent {name}", repellent, arm)] for name, arm in arms]
    )


def checkerboard(scale: Scale, finished: Finished) -> Figure:
    (run,) = last_optimum_only(scale)
    return matrices(finished, [[("IMP", run, "imp"), ("reinitialisation", run, "reinit")]])


FIGURES = (
    PaperFigure("fig3", "accuracy, repellent and attractive", of_resnet20, both_ways),
    PaperFigure("fig13", "accuracy, repellent", of_conv4, partial(accuracy, of_conv4)),
    PaperFigure("fig14", "accuracy, repellent", of_lenet, partial(accuracy, of_lenet)),
    PaperFigure("fig15", "angles between rounds, repellent", repelled_resnet20, repellent_matrices),
    PaperFigure("fig16", "angles between rounds, repellent and not", of_conv4, repellent_and_plain_matrices),
    PaperFigure(
        "fig17", "angles between rounds, repelled from the last optimum only", last_optimum_only, checkerboard
    ),
)
