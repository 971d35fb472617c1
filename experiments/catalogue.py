"""All figures and tables of the paper, by name."""

from collections.abc import Iterable, Sequence

from experiments import barriers, claims, networks, one_shot, repulsion, similarity, stabilisation, weight_decay
from experiments.panels import Exhibit
from experiments.runs import Run
from experiments.scales import Scale
from imp_jax.config import choose

GROUPS = (stabilisation, weight_decay, repulsion, similarity, barriers, networks, one_shot, claims)


_ALL = {exhibit.id: exhibit for group in GROUPS for exhibit in group.FIGURES}
# in the paper's order
EXHIBITS = {name: _ALL[name] for name in (*(f"fig{n}" for n in range(1, 24)), "table1", "tablec", "claims")}


def named(ids: Sequence[str]) -> list[Exhibit]:
    """The exhibits called `ids`, such as fig14 or Fig14; of none all.

    Raises:
      UserError: an unknown name.
    """
    return [choose(EXHIBITS, "the figure", name.lower()) for name in ids] or list(EXHIBITS.values())


def runs_of(exhibits: Iterable[Exhibit], scale: Scale) -> list[Run]:
    """The runs that exhibits are drawn of, each once."""
    return list(dict.fromkeys(run for exhibit in exhibits for run in exhibit.runs(scale)))
