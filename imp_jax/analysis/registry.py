"""Registers analyses, which compute the tables of a run, and figures, which are drawn from them."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from imp_jax.errors import UserError
from imp_jax.experiment import Experiment
from imp_jax.masking import Mask, Params
from imp_jax.members import Member
from imp_jax.training import Variables

# columns that precede those that an analysis returns, by its `needs`, which sets how often it is called
KEYS = {
    "round": ("replicate", "arm", "round"),  # each network of each round, but no twins
    "imp": ("replicate", "round"),  # each network of arm imp, whose mask all arms of the round share
    "successive": ("replicate", "round"),  # imp in a round, with imp in the previous round
    "twin": ("replicate", "round"),  # imp in a round, with its twin
    "pair": ("replicate", "kind", "round"),  # both of these pairs; `kind` is successive or instability
    "run": (),  # once, with all tables and networks
}

# columns that identify a row; the others are values
_INDEX = (
    *("replicate", "replicate_b", "arm", "arm_b", "kind", "metric", "round", "round_a", "round_b", "epoch"),
    *("step", "noise", "split", "alpha", "layer"),
)


@dataclasses.dataclass(frozen=True)
class NetworkInputs:
    """One network as the input of an analysis; arrays are NumPy arrays without a member axis.

    Attributes:
      params, initial: parameters after and at the start of the training; both are masked.
      mask: the mask of the round.
      model_state: the other collections of the model after the training; {} for most.
      initial_state: these collections at the start of the training.
      threshold: the pruning threshold of this member after the round.
      config: the config of the run.
      networks: all networks of the round, by member: this one, the other arms and replicates, and twins.
      get_experiment: returns the `Experiment`; call it only if needed, because it opens the data set.
      other: the network of the previous round or the twin, depending on `needs`.
      kind: "successive" if `other` is the network of the previous round, "instability" if it is the twin, "" if
        there is none.
    """

    params: Params
    initial: Params
    mask: Mask
    model_state: dict[str, Any]
    initial_state: dict[str, Any]
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
    """A run as the input of an analysis with `needs="run"`.

    Attributes:
      results: results.csv.
      tables: all tables by name, with the rows computed so far; also the table of this analysis.
      config: the config of the run.
      rounds: the rounds whose checkpoints are on disk, with their members.
      load_networks: see `networks`.
      load_round: returns the networks of one round of `rounds`; {} if its checkpoint cannot be read. They are
        kept until all analyses are computed.
      get_experiment: returns the `Experiment`; call it only if needed, because it opens the data set.
      epochs: epochs.csv; empty unless the run has `evaluate_epochs`.
    """

    results: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    config: ConfigDict
    rounds: dict[int, tuple[Member, ...]]
    load_networks: Callable[[], dict[int, dict[Member, NetworkInputs]]] = dataclasses.field(repr=False)
    get_experiment: Callable[[], Experiment] = dataclasses.field(repr=False)
    load_round: Callable[[int], dict[Member, NetworkInputs]] = dataclasses.field(repr=False)
    epochs: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    @functools.cached_property
    def networks(self) -> dict[int, dict[Member, NetworkInputs]]:
        """The networks of all rounds with a readable checkpoint; read on first use."""
        return self.load_networks()

    @property
    def experiment(self) -> Experiment:
        """The experiment: model, data set and settings."""
        return self.get_experiment()


def find_missing(inputs: RunInputs, name: str, keys: Iterable[tuple]) -> list[tuple]:
    """Return those of `keys`, see `complete_rows`, without a current row in the table of an analysis."""
    analysis, table = ANALYSES[name], inputs.tables[name]
    if not set(analysis.columns) <= set(table):  # a table of an earlier version
        return list(keys)
    if analysis.is_current and len(table):
        table = table[analysis.is_current(table, inputs.config).astype(bool)]
    known = set(table[analysis.index].itertuples(index=False, name=None))
    return [key for key in keys if key not in known]


def complete_rows(
    inputs: RunInputs,
    name: str,
    keys: Iterable[tuple],
    compute: Callable[[list[tuple]], dict[tuple, Sequence[Any]]],
) -> list[tuple]:
    """Return the rows of an analysis with `needs="run"` that are known, and those that are not current.

    Args:
      name: of the analysis.
      keys: values of the columns that identify rows, which are its first columns, for all rows that the
        networks on disk should have.
      compute: called with the missing keys, if there are any; returns the values of the other columns by key,
        for the keys that it could compute. It may return other rows too, which replace known ones.
    """
    analysis, table = ANALYSES[name], inputs.tables[name]
    size = len(analysis.index)
    rows = table.reindex(columns=analysis.columns).itertuples(index=False, name=None)
    known = {row[:size]: row[size:] for row in rows}
    missing = find_missing(inputs, name, keys)
    computed = compute(missing) if missing else {}
    return [(*key, *values) for key, values in {**known, **computed}.items()]


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
    cost: "Callable[[RunInputs], float] | None" = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns before those that `function` returns; they identify the network or pair of a row."""
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
        """Return a table without rows."""
        return pd.DataFrame(columns=list(self.columns))

    def make_table(self, rows: Iterable[Sequence[Any]], key: Sequence[Any] = ()) -> pd.DataFrame:
        """Return `rows` as a table, with the values of `key` before those of each row.

        Raises:
          UserError: a row has more or fewer values than there are columns.
        """
        rows = [tuple(row) for row in rows]
        for row in rows:
            if len(row) != len(self.value_columns):
                raise UserError(
                    f"the analysis {self.name!r} returned a row of {len(row)} values; it should have "
                    f"{len(self.value_columns)}: {', '.join(self.value_columns)}"
                )
        return pd.DataFrame([(*key, *row) for row in rows], columns=list(self.columns))


@dataclasses.dataclass(frozen=True)
class RegisteredFigure:
    """A registered figure; see `register_figure`."""

    name: str
    draw: Callable[[Any], Figure | None]
    caption: str = ""
    sentence: Callable[[Any], str] | None = None


ANALYSES: dict[str, Analysis] = {}
FIGURES: dict[str, RegisteredFigure] = {}
_BUILTIN = {"analysis": (), "figure": ()}  # names that cannot be registered again


def register(
    name: str,
    function: Function | None = None,
    *,
    columns: Sequence[str],
    needs: str = "round",
    description: str = "",
    figure: Callable[[Any], Figure | None] | None = None,
    caption: str = "",
    sentence: Callable[[Any], str] | None = None,
    is_current: Callable[[pd.DataFrame, ConfigDict], pd.Series] | None = None,
    definition: int = 1,
    cost: Callable[[RunInputs], float] | None = None,
) -> Any:
    """Register an analysis: every run gets a table analysis/NAME.csv with the rows that `function` returns.

    The rows of a network are computed once, and again only if they are not current. Without `function`, return
    a decorator.

    Args:
      function: takes a `NetworkInputs`, or a `RunInputs` if needs="run"; returns rows, each a sequence with a
        value for each of `columns`.
      columns: the columns of these rows; in the table, the columns `KEYS[needs]` precede them.
      needs: when `function` is called. "round": for each network of each round, except twins; "imp": only for
        networks of arm imp; "successive": for imp in each round, with imp in the previous round as `other`;
        "twin": for imp with its twin as `other`; "pair": for both of these pairs; "run": once whenever the
        analyses are computed.
      description: of the table, a noun phrase.
      figure, caption, sentence: see `register_figure`; the figure has the name of the table.
      is_current: takes the table and the config; returns a boolean series that is False for rows to recompute,
        if their networks are on disk.
      definition: version of the meaning of the columns; tables with another version are recomputed.
      cost: makes the analysis one that is computed on request only, if `analysis.also` names it. Takes a
        `RunInputs`; returns the work of the missing rows, as the number of training images whose gradient takes
        as long, which is printed before they are computed.

    Raises:
      UserError: `name` is not a plain file name or is an analysis of imp_jax; `needs` is unknown; or a column
        occurs twice or is one of the keys.
    """
    if function is None:
        options = {"columns": columns, "needs": needs, "description": description, "figure": figure}
        options |= {"caption": caption, "sentence": sentence, "is_current": is_current}
        options |= {"definition": definition, "cost": cost}

        def decorator(decorated):
            register(name, decorated, **options)
            return decorated

        return decorator
    _check_name("analysis", name, function)
    if needs not in KEYS:
        raise UserError(f"the analysis {name!r} needs {needs!r}; it should need one of {', '.join(KEYS)}")
    all_columns = [*KEYS[needs], *columns]
    if isinstance(columns, str) or not columns or len(set(all_columns)) < len(all_columns):
        raise UserError(
            f"the analysis {name!r} has the columns {columns!r}; they should be names, without repetition and "
            f"none of {', '.join(KEYS[needs]) or 'the keys'}, written as ('norm',)"
        )
    if figure:
        register_figure(name, figure, caption, sentence)
    ANALYSES[name] = Analysis(name, function, tuple(columns), needs, description, is_current, definition, cost)
    return function


def register_figure(
    name: str,
    draw: Callable[[Any], Figure | None],
    caption: str = "",
    sentence: Callable[[Any], str] | None = None,
) -> None:
    """Register a figure: it is drawn for every run as figures/NAME.png and NAME.pdf and added to the report.

    Args:
      draw: takes an `analysis.Run`; returns a Matplotlib figure, or None if the run has no data for it.
      caption: the caption in the report.
      sentence: takes an `analysis.Run`; returns what the figure shows in this run, as a sentence with numbers,
        which follows the caption.

    Raises:
      UserError: `name` is not a plain file name or is a figure of imp_jax.
    """
    _check_name("figure", name, draw)
    FIGURES[name] = RegisteredFigure(name, draw, caption, sentence)


def is_requested(analysis: Analysis, config: ConfigDict) -> bool:
    """Return whether a run computes an analysis: always, or because `analysis.also` names it."""
    return analysis.cost is None or analysis.name in config.analysis.also


def check_requests(names: Sequence[str]) -> None:
    """Check the names of `analysis.also`.

    Raises:
      UserError: a name is not that of an analysis on request, or occurs twice.
    """
    on_request = [name for name, analysis in ANALYSES.items() if analysis.cost]
    if not set(names) <= set(on_request) or len(set(names)) < len(names):
        raise UserError(
            f"analysis.also is {tuple(names)}; it may have {', '.join(on_request)}, each once; "
            f"other analyses are always computed"
        )


def protect_names() -> None:
    """Make the analyses and figures that are registered so far those of imp_jax, which users cannot replace."""
    _BUILTIN.update(analysis=tuple(ANALYSES), figure=tuple(FIGURES))


def is_builtin(name: str) -> bool:
    """Return whether `name` is an analysis of imp_jax."""
    return name in _BUILTIN["analysis"]


def _check_name(kind, name, function):
    if not re.fullmatch(r"\w+", name) or name in _BUILTIN[kind]:
        raise UserError(
            f"the {kind} {name!r} should have a name of letters, digits and underscores that is none of "
            f"{', '.join(_BUILTIN[kind])}"
        )
    if not callable(function):
        raise UserError(f"the {kind} {name!r} is a {type(function).__name__}; it should be a function")
