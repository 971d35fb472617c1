"""Figures 8, 20 and 23 (section 4.3): which successive optima are linearly connected."""

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from experiments.paper.panels import Finished, PaperFigure, draw_barrier, make_grid, mark_not_run
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run
from imp_jax import figures


def list_stable_run(scale: Scale) -> list[Run]:
    """List the run at the stable batch size."""
    return [scale.make_resnet20_run(scale.stable)]


def list_lenet_run(scale: Scale) -> list[Run]:
    """List LeNet's run."""
    return [scale.lenet]


def list_conv4_run(scale: Scale) -> list[Run]:
    """List Conv-4's run."""
    return [scale.conv4]


def draw_paths_and_barrier(scale: Scale, finished: Finished) -> Figure:
    """Draw paths at a low, a medium and a high sparsity on the left, the barrier over density on the right."""
    (run,) = list_stable_run(scale)
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = run.config.rounds - 1
    # in a run of 25 rounds at densities of 80, 10.7 and 1.4 %
    rounds = sorted({1, round(0.4 * last), round(0.8 * last)})
    available_rounds = []
    if run in finished:
        paths = finished[run].paths
        paths = paths[paths["kind"] == "successive"]
        available_rounds = [number for number in rounds if (paths["round"] == number).any()]
    if available_rounds:
        figures.draw_paths(left, paths, finished[run].results, available_rounds)
    else:
        mark_not_run(left)
    draw_barrier(right, finished, run)
    return figure


def draw_barrier_alone(runs: Callable, scale: Scale, finished: Finished) -> Figure:
    """Draw one panel with the barrier of the only run of `runs`."""
    (run,) = runs(scale)
    figure, (axes,) = make_grid(1, columns=1, width=4.6, height=3)
    draw_barrier(axes, finished, run)
    return figure


FIGURES = (
    PaperFigure(
        "fig8",
        "error on paths between rounds, barrier over density",
        list_stable_run,
        draw_paths_and_barrier,
    ),
    PaperFigure(
        "fig20", "error barrier over density", list_lenet_run, partial(draw_barrier_alone, list_lenet_run)
    ),
    PaperFigure(
        "fig23", "error barrier over density", list_conv4_run, partial(draw_barrier_alone, list_conv4_run)
    ),
)
