"""Figures 3 and 13 to 17 (section 3): does a ticket win because it returns to earlier optima?"""

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from experiments.paper.panels import (
    BLUE,
    GREEN,
    Finished,
    PaperFigure,
    add_common_legend,
    draw_curves,
    draw_matrices,
    make_grid,
)
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run

REPELLENT, ATTRACTIVE = 2.0, -1.0  # λ_r
PURPLE = "#CC79A7"
ARMS = (("IMP", "imp"), ("reinitialisation", "reinit"))


def list_resnet20_runs(scale: Scale) -> list[Run]:
    """List the stable run, the same with repulsion, the unstable run, and the same with attraction."""
    stable, unstable = scale.make_resnet20_run(scale.stable), scale.make_resnet20_run(scale.unstable)
    attracted = unstable.with_overrides(repulsion__strength=ATTRACTIVE)
    return [stable, add_repulsion(stable), unstable, attracted]


def list_conv4_runs(scale: Scale) -> list[Run]:
    """List Conv-4's run and the same with repulsion."""
    return [scale.conv4, add_repulsion(scale.conv4)]


def list_lenet_runs(scale: Scale) -> list[Run]:
    """List LeNet's run and the same with repulsion."""
    return [scale.lenet, add_repulsion(scale.lenet)]


def list_repelled_resnet20_run(scale: Scale) -> list[Run]:
    """List the run at the stable batch size with repulsion."""
    return [add_repulsion(scale.make_resnet20_run(scale.stable))]


def list_last_optimum_run(scale: Scale) -> list[Run]:
    """List LeNet's run with repulsion from the last optimum only."""
    return [add_repulsion(scale.lenet).with_overrides(repulsion__memory="last")]


def add_repulsion(run: Run) -> Run:
    """Return the run with repulsion from all earlier optima."""
    return run.with_overrides(repulsion__strength=REPELLENT)


def draw_repulsion_and_attraction(scale: Scale, finished: Finished) -> Figure:
    """Draw the accuracy with repulsion on the left and with attraction on the right."""
    stable, repellent, unstable, attractive = list_resnet20_runs(scale)
    figure, panels = make_grid(2, columns=2)
    draw_curves(panels[0], finished, [("", BLUE, stable), ("repellent", GREEN, repellent)])
    draw_curves(panels[1], finished, [("", BLUE, unstable), ("attractive", PURPLE, attractive)])
    for axes, words, run in ((panels[0], "stable", stable), (panels[1], "unstable", unstable)):
        axes.set_title(f"{words}: batch size {run.config.batch_size}", fontsize="medium")
    add_common_legend(figure)
    return figure


def draw_accuracy(runs: Callable, scale: Scale, finished: Finished) -> Figure:
    """Draw the accuracy of the two `runs`, without and with repulsion."""
    plain, repellent = runs(scale)
    figure, (axes,) = make_grid(1, columns=1, width=4.6, height=3.4)
    draw_curves(axes, finished, [("", BLUE, plain), ("repellent", GREEN, repellent)])
    add_common_legend(figure)
    return figure


def draw_repellent_matrices(scale: Scale, finished: Finished) -> Figure:
    """Draw the angles of the repelled run."""
    (run,) = list_repelled_resnet20_run(scale)
    return draw_matrices(finished, [[(f"repellent {name}", run, arm) for name, arm in ARMS]])


def draw_plain_and_repellent_matrices(scale: Scale, finished: Finished) -> Figure:
    """Draw the angles without repulsion on the left and with it on the right."""
    plain, repellent = list_conv4_runs(scale)
    rows = [[(name, plain, arm), (f"repellent {name}", repellent, arm)] for name, arm in ARMS]
    return draw_matrices(finished, rows)


def draw_checkerboard(scale: Scale, finished: Finished) -> Figure:
    """Draw the angles under repulsion from the last optimum only."""
    (run,) = list_last_optimum_run(scale)
    return draw_matrices(finished, [[(name, run, arm) for name, arm in ARMS]])


FIGURES = (
    PaperFigure(
        "fig3", "accuracy, repellent and attractive", list_resnet20_runs, draw_repulsion_and_attraction
    ),
    PaperFigure("fig13", "accuracy, repellent", list_conv4_runs, partial(draw_accuracy, list_conv4_runs)),
    PaperFigure("fig14", "accuracy, repellent", list_lenet_runs, partial(draw_accuracy, list_lenet_runs)),
    PaperFigure(
        "fig15", "angles between rounds, repellent", list_repelled_resnet20_run, draw_repellent_matrices
    ),
    PaperFigure(
        "fig16",
        "angles between rounds, repellent and not",
        list_conv4_runs,
        draw_plain_and_repellent_matrices,
    ),
    PaperFigure(
        "fig17",
        "angles between rounds, repelled from the last optimum only",
        list_last_optimum_run,
        draw_checkerboard,
    ),
)
