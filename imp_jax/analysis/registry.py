"""Registers analyses, which compute the tables of a run, and figures, which are drawn from them."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from imp_jax.arms import Member
from imp_jax.errors import UserError
from imp_jax.experiment import Experiment
from imp_jax.masking import Mask, Params
from imp_jax.training import Variables

# `needs` of an analysis: what it is called for, and the columns that are put before those of its rows
KEYS = {
    "round": ("replicate", "arm", "round"),  # each network of each round, but no twins
    "imp": ("replicate", "round"),  # each network of arm imp, whose mask all arms of the round share
    "successive": ("replicate", "round"),  # imp in a round, with imp in the round before
    "twin": ("replicate", "round"),  # imp in a round, with its twin
    "pair": ("replicate", "kind", "round"),  # both of these pairs; `kind` is successive or instability
    "run": (),  # once, with all tables and networks
}

# columns that say what a row is about; the others are values
_INDEX = ("replicate", "arm", "kind", "metric", "round", "round_a", "round_b", "split", "alpha", "layer")


@dataclasses.dataclass(frozen=True)
class NetworkInputs:
    """What an analysis is given of one network, as NumPy arrays and without a member axis.

    Attributes:
      params, initial: parameters after and at the start of the training; both are masked.
      mask: of the round.
      model_state: the other collections of the model after the training; {} for most.
      threshold: the pruning threshold of this member after the round.
      config: the config of the run.
      networks: all networks of the round, by member: this one, the other arms and replicates, and twins.
      get_experiment: returns the `Experiment`; it opens the data set, so call it only if needed.
      other: the network of the round before, or the twin, as `needs` asks.
      kind: "successive" or "instability", which tells what `other` is; "" without another network.
    """

    params: Params
    initial: Params
    mask: Mask
    model_state: dict[str, Any]
    arm: str
    replicate: int
    round: int
    threshold: float
    config: ConfigDict = dataclasses.field(repr=False)
    networks: "dict[Member, NetworkInputs]" = dataclasses.field(repr=False)
    get_experiment: Callable[[], Experiment] = dataclasses.field(repr=False)
    other: "NetworkInputs | None" = None
    kind: str = ""

    @property
    def experiment(self) -> Experiment:
        """The experiment: model, data set and settings."""
        return self.get_experiment()

    @property
    def variables(self) -> Variables:
        """The variables after the training, as `Module.apply` takes them."""
        return {"params": self.params, **self.model_state}


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """What an analysis with `needs="run"` is given.

    Attributes:
      results: results.csv.
      tables: all tables by name, with the rows that are known so far; also those of this analysis.
      config: the config of the run.
      rounds: the rounds whose checkpoints are on disk, with their members.
      load_networks: see `networks`.
      get_experiment: returns the `Experiment`; it opens the data set, so call it only if needed.
    """

    results: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    config: ConfigDict
    rounds: dict[int, tuple[Member, ...]]
    load_networks: Callable[[], dict[int, dict[Member, NetworkInputs]]] = dataclasses.field(repr=False)
    get_experiment: Callable[[], Experiment] = dataclasses.field(repr=False)

    @functools.cached_property
    def networks(self) -> dict[int, dict[Member, NetworkInputs]]:
        """The networks of all rounds with a readable checkpoint, which are read on first use."""
        return self.load_networks()

    @property
    def experiment(self) -> Experiment:
        """The experiment: model, data set and settings."""
        return self.get_experiment()


Function = Callable[[Any], Iterable[Sequence[Any]]]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A registered analysis; see `register`."""

    name: str
    function: Function
    value_columns: tuple[str, ...]
    needs: str
    description: str = ""
    is_current: Callable[[pd.DataFrame, ConfigDict], pd.Series] | None = None
    definition: int = 1

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns before those of the rows, which tell what the analysis was called for."""
        return KEYS[self.needs]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the table."""
        return (*self.keys, *self.value_columns)

    @property
    def index(self) -> list[str]:
        """The columns that identify a row."""
        return [column for column in self.columns if column in _INDEX]

    def empty_table(self) -> pd.DataFrame:
        """Return the table without rows."""
        return pd.DataFrame(columns=list(self.columns))

    def make_table(self, rows: Iterable[Sequence[Any]], key: Sequence[Any] = ()) -> pd.DataFrame:
        """Return `rows` as a table, with the values of `key` before each.

        Raises:
          UserError: a row with more or fewer values than columns.
        """
        rows = [tuple(row) for row in rows]
        for row in rows:
            if len(row) != len(self.value_columns):
                raise UserError(
                    f"the analysis {self.name!r} gave a row of {len(row)} values; it should have "
                    f"{len(self.value_columns)}: {', '.join(self.value_columns)}"
                )
        return pd.DataFrame([(*key, *row) for row in rows], columns=list(self.columns))


@dataclasses.dataclass(frozen=True)
class RegisteredFigure:
    """A registered figure; see `register_figure`."""

    name: str
    draw: Callable[[Any], Figure | None]
    caption: str = ""


ANALYSES: dict[str, Analysis] = {}
FIGURES: dict[str, RegisteredFigure] = {}


def register(
    name: str,
    function: Function | None = None,
    *,
    columns: Sequence[str],
    needs: str = "round",
    description: str = "",
    figure: Callable[[Any], Figure | None] | None = None,
    caption: str = "",
    is_current: Callable[[pd.DataFrame, ConfigDict], pd.Series] | None = None,
    definition: int = 1,
) -> Any:
    """Make analysis/NAME.csv of every run, with rows that `function` computes.

    The rows of a network are computed once, and again only if they are not current. Without `function` this is
    a decorator of it.

    Args:
      function: of a `NetworkInputs`, or of a `RunInputs` with needs="run"; returns rows, each a sequence of the
        values of `columns`.
      columns: of the rows; the table begins with the columns of `KEYS[needs]`.
      needs: "round", called for each network of each round, without twins; "imp", for those of arm imp;
        "successive", for each imp of a round with that of the round before as `other`; "twin", for each imp
        with its twin as `other`; "pair", for both; "run", called once, each time.
      description: of the table, one sentence.
      figure, caption: of `register_figure`, for a figure of the same name.
      is_current: of the table and the config; returns a boolean series that is False for rows to be computed
        again, if their networks are on disk.
      definition: the version of what the columns mean; tables of another version are computed again.

    Raises:
      UserError: a name that is not a plain file name or is an analysis of imp_jax, an unknown `needs`, columns
        that repeat each other or the keys.
    """
    if function is None:
        options = {"columns": columns, "needs": needs, "description": description, "figure": figure}
        options |= {"caption": caption, "is_current": is_current, "definition": definition}

        def decorator(decorated):
            register(name, decorated, **options)
            return decorated

        return decorator
    _check_name("analysis", name, function, {known.name: known.function for known in ANALYSES.values()})
    if needs not in KEYS:
        raise UserError(f"the analysis {name!r} needs {needs!r}; it should need one of {', '.join(KEYS)}")
    every = [*KEYS[needs], *columns]
    if isinstance(columns, str) or not columns or len(set(every)) < len(every):
        raise UserError(
            f"the analysis {name!r} has the columns {columns!r}; they should be names, none twice and none of "
            f"{', '.join(KEYS[needs]) or 'the keys'}, written as ('norm',)"
        )
    if figure:
        register_figure(name, figure, caption)
    ANALYSES[name] = Analysis(name, function, tuple(columns), needs, description, is_current, definition)
    return function


def register_figure(name: str, draw: Callable[[Any], Figure | None], caption: str = "") -> None:
    """Make figures/NAME.png and NAME.pdf of every run, and put the figure into its report.

    Args:
      draw: of the `analysis.Run`; returns a matplotlib figure, or None if the run has nothing to draw.
      caption: in the report.

    Raises:
      UserError: a name that is not a plain file name or is a figure of imp_jax.
    """
    _check_name("figure", name, draw, {known.name: known.draw for known in FIGURES.values()})
    FIGURES[name] = RegisteredFigure(name, draw, caption)


def _check_name(kind, name, function, registered):
    own = [known for known, value in registered.items() if value.__module__.startswith("imp_jax.")]
    if not re.fullmatch(r"\w+", name) or name in own:
        raise UserError(
            f"the {kind} {name!r} should have a name of letters, digits and underscores that is none of "
            f"{', '.join(own)}"
        )
    if not callable(function):
        raise UserError(f"the {kind} {name!r} is a {type(function).__name__}; it should be a function")
