"""All controls on the masks of one run, compared with IMP and with its reinit."""

from matplotlib.figure import Figure

from experiments.literature.comparison import Comparison, Series, draw_series, format_comparisons
from experiments.paper.panels import Finished, PaperFigure, add_common_legend, make_grid
from experiments.paper.scales import Scale
from experiments.sweeps.runs import AnyRun, Branch
from imp_jax import figures

PANELS = {  # arms by what they change
    "drawn masks, the ticket's weights": ("shuffled", "random", "inverted", "erk", "uniform"),
    "masks of the initialisation, the ticket's weights": ("snip", "grasp", "synflow", "magnitude_init"),
    "IMP's masks, other weights": ("signs", "magnitudes", "constant", "trained_signs", "permuted"),
}
ARMS = tuple(arm for arms in PANELS.values() for arm in arms)


def make_branch(scale: Scale) -> Branch:
    """Return the branch in which all controls train."""
    return Branch(scale.trunk, "controls", ARMS, scale.trunk_rounds)


def list_runs(scale: Scale) -> list[AnyRun]:
    """List the run and its branch."""
    return [scale.trunk, make_branch(scale)]


def draw(scale: Scale, finished: Finished) -> Figure:
    """Draw the accuracy over density, one panel per kind of control, with imp and its reinit in each."""
    figure, panels = make_grid(3, columns=3, width=3.6, height=3)
    for axes, (title, arms) in zip(panels, PANELS.items(), strict=True):
        runs = {"imp": scale.trunk, "reinit": scale.trunk} | dict.fromkeys(arms, make_branch(scale))
        draw_series(axes, finished, [style_series(arm, Series(run, arm)) for arm, run in runs.items()])
        axes.set_title(title, fontsize="medium")
    add_common_legend(figure, columns=6)
    return figure


def style_series(arm: str, series: Series) -> tuple[str, Series, dict]:
    """Return the label, the series and the style of an arm, as in the figures of a run."""
    return figures.LABELS.get(arm, arm), series, figures.STYLES[arm]


def compare(scale: Scale, branch: Branch, expected: dict | None = None) -> list[Comparison]:
    """Compare imp, reinit and the arms of a branch with imp and reinit.

    Args:
      expected: by arm, what the literature predicts.
    """
    imp, reinit = Series(scale.trunk, "imp"), Series(scale.trunk, "reinit")
    series = {"imp": imp, "reinit": reinit} | {arm: Series(branch, arm) for arm in branch.arms}
    expected = expected or {}
    return [
        Comparison(figures.LABELS.get(arm, arm), one, imp, reinit, branch.numbers, expected.get(arm))
        for arm, one in series.items()
    ]


def tabulate(scale: Scale, finished: Finished) -> str:
    """Return the table of all controls."""
    return format_comparisons(compare(scale, make_branch(scale)), finished)


FIGURES = (PaperFigure("controls", "accuracy, all controls on the masks of a run", list_runs, draw, tabulate),)
