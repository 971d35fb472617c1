"""All figures and tables of the paper, by name."""

from collections.abc import Iterable, Sequence

from experiments import claims
from experiments.paper import distances, networks, one_shot, paths, repellent, stabilisation, weight_decay
from experiments.paper.panels import PaperFigure
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run
from imp_jax.errors import lookup

GROUPS = (stabilisation, weight_decay, repellent, distances, paths, networks, one_shot, claims)


_ALL = {exhibit.id: exhibit for group in GROUPS for exhibit in group.FIGURES}
# in the paper's order
FIGURES = {name: _ALL[name] for name in (*(f"fig{n}" for n in range(1, 24)), "table1", "tablec", "claims")}


def named(ids: Sequence[str]) -> list[PaperFigure]:
    """The exhibits called `ids`, such as fig14 or Fig14; of none all.

    Raises:
      UserError: an unknown name.
    """
    return [lookup(FIGURES, "the figure", name.lower()) for name in ids] or list(FIGURES.values())


def runs_of(exhibits: Iterable[PaperFigure], scale: Scale) -> list[Run]:
    """The runs that exhibits are drawn of, each once."""
    return list(dict.fromkeys(run for exhibit in exhibits for run in exhibit.runs(scale)))
