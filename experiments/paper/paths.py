"""Which successive optima are linearly connected (section 4.3, figures 8, 20 and 23)."""

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from experiments.paper.panels import Finished, PaperFigure, barrier, blank, grid
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run
from imp_jax import figures


def of_stable(scale: Scale) -> list[Run]:
    return [scale.batch(scale.stable)]


def of_lenet(scale: Scale) -> list[Run]:
    return [scale.lenet]


def of_conv4(scale: Scale) -> list[Run]:
    return [scale.conv4]


def paths_and_barrier(scale: Scale, finished: Finished) -> Figure:
    """Paths at a low, a medium and a high sparsity on the left, the barrier over density on the right."""
    (run,) = of_stable(scale)
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = run.config.rounds - 1
    rounds = sorted(
        {1, round(0.4 * last), round(0.8 * last)}
    )  # at 25 trainings densities of 80, 10.7 and 1.4 %
    paths = finished[run].paths if run in finished else None
    there = (
        []
        if paths is None
        else [n for n in rounds if ((paths["kind"] == "successive") & (paths["round"] == n)).any()]
    )
    if there:
        figures.draw_paths(left, paths[paths["kind"] == "successive"], finished[run].results, there)
    else:
        blank(left)
    barrier(right, finished, run)
    return figure


def barrier_alone(runs: Callable, scale: Scale, finished: Finished) -> Figure:
    (run,) = runs(scale)
    figure, (axes,) = grid(1, columns=1, width=4.6, height=3)
    barrier(axes, finished, run)
    return figure


FIGURES = (
    PaperFigure("fig8", "error on paths between rounds, barrier over density", of_stable, paths_and_barrier),
    PaperFigure("fig20", "error barrier over density", of_lenet, partial(barrier_alone, of_lenet)),
    PaperFigure("fig23", "error barrier over density", of_conv4, partial(barrier_alone, of_conv4)),
)
