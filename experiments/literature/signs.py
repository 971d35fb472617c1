"""Signs or magnitudes: which of them makes the ticket's starting weights fit IMP's mask?

Zhou et al. 2019 keep the signs and replace the magnitudes. Gadhikar et al. 2025 state that a random
initialisation with the signs of the trained network is sufficient.
"""

from matplotlib.figure import Figure

from experiments.literature.comparison import (
    NO_BETTER_THAN_REINIT,
    REACHES_IMP,
    Series,
    draw_series,
    format_comparisons,
)
from experiments.literature.controls import compare, style_series
from experiments.paper.panels import Finished, PaperFigure, add_common_legend, make_grid
from experiments.paper.scales import Scale
from experiments.sweeps.runs import AnyRun, Branch

EXPECTED = {
    "signs": REACHES_IMP,  # Zhou et al. 2019
    "magnitudes": NO_BETTER_THAN_REINIT,  # Zhou et al. 2019
    "constant": REACHES_IMP,  # Zhou et al. 2019
    "trained_signs": REACHES_IMP,  # Gadhikar et al. 2025
}


def make_branch(scale: Scale) -> Branch:
    """Return the branch with other signs or magnitudes, on all masks of the run but the dense one."""
    return Branch(scale.trunk, "signs", tuple(EXPECTED), tuple(range(1, scale.trunk.rounds)))


def list_runs(scale: Scale) -> list[AnyRun]:
    """List the run and its branch."""
    return [scale.trunk, make_branch(scale)]


def draw(scale: Scale, finished: Finished) -> Figure:
    """Draw the accuracy over density."""
    figure, (axes,) = make_grid(1, columns=1, width=5.6, height=4)
    runs = {"imp": scale.trunk, "reinit": scale.trunk} | dict.fromkeys(EXPECTED, make_branch(scale))
    draw_series(axes, finished, [style_series(arm, Series(run, arm)) for arm, run in runs.items()])
    add_common_legend(figure, columns=3)
    return figure


def tabulate(scale: Scale, finished: Finished) -> str:
    """Return the table, with what the literature predicts."""
    return format_comparisons(compare(scale, make_branch(scale), EXPECTED), finished)


FIGURES = (
    PaperFigure("signs", "accuracy, other signs or magnitudes on IMP's masks", list_runs, draw, tabulate),
)
