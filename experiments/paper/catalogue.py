"""All figures and tables by name: those of the paper, and the experiments of the literature."""

import re
from collections.abc import Iterable, Sequence
from types import ModuleType

from experiments.literature import at_initialisation, controls, effort, precision, signs, transfer
from experiments.paper import (
    claims_report,
    distances,
    networks,
    one_shot,
    paths,
    repellent,
    stabilisation,
    weight_decay,
)
from experiments.paper.panels import PaperFigure
from experiments.paper.scales import Scale
from experiments.sweeps.runs import AnyRun
from imp_jax.errors import lookup

# each module has a tuple FIGURES
PAPER = (stabilisation, weight_decay, repellent, distances, paths, networks, one_shot, claims_report)
LITERATURE = (controls, at_initialisation, signs, transfer, effort, precision)
GROUPS = (*PAPER, *LITERATURE)
TABLES = ("table1", "tablec", "claims")  # follow the figures, in this order


def collect_figures(groups: Iterable[ModuleType]) -> dict[str, PaperFigure]:
    """Collect the figures of all groups by name, in the paper's order.

    The order is fig1, fig2, …; then `TABLES`; then all other names, in the order of the groups.

    Raises:
      ValueError: two figures have the same name.
    """
    figures = {}
    for group in groups:
        for figure in group.FIGURES:
            if figure.name in figures:
                raise ValueError(f"two figures are called {figure.name!r}; the second is in {group.__name__}")
            figures[figure.name] = figure
    return dict(sorted(figures.items(), key=lambda item: _position_in_paper(item[0])))


def _position_in_paper(name):
    """Return a sort key; `sorted` keeps the order of names with equal keys."""
    if number := re.fullmatch(r"fig(\d+)", name):
        return 0, int(number[1])
    if name in TABLES:
        return 1, TABLES.index(name)
    return 2, 0


FIGURES = collect_figures(GROUPS)


def select_figures(names: Sequence[str]) -> list[PaperFigure]:
    """Return the figures with these names, such as fig14 or Fig14, or all figures if there are no names.

    Raises:
      UserError: a name is unknown.
    """
    return [lookup(FIGURES, "the figure", name.lower()) for name in names] or list(FIGURES.values())


def list_runs(figures: Iterable[PaperFigure], scale: Scale) -> list[AnyRun]:
    """List the runs that figures need, each run once."""
    return list(dict.fromkeys(run for figure in figures for run in figure.runs(scale)))
