"""Analyses of users: a function that gives rows becomes a table of every run."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from imp_jax.analysis.tables import TABLES, reporting_write_errors, save_file
from imp_jax.arms import Member, members_of_rows
from imp_jax.errors import UserError
from imp_jax.experiment import Experiment
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError, move_aside

# what an analysis is a function of, with the columns that its table begins with
KEYS = {
    "round": ("replicate", "arm", "round"),  # one network of one round
    "successive": ("replicate", "round"),  # imp's networks of a round and of the round before
    "twin": ("replicate", "round"),  # imp's network and its twin
    "run": (),  # all tables
}


@dataclasses.dataclass(frozen=True)
class NetworkInputs:
    """What an analysis is given of one network, as NumPy arrays and without a member axis.

    Attributes:
      params, initial: parameters after and at the start of the training; both are masked.
      mask: of the round.
      model_state: the other collections of the model after the training; {} for most.
      threshold: the pruning threshold of this member after the round.
      get_experiment: returns the `Experiment`; it opens the data set, so call it only if needed.
      other: the network of the round before, or the twin, as `needs` asks.
    """

    params: Any
    initial: Any
    mask: Any
    model_state: dict[str, Any]
    arm: str
    replicate: int
    round: int
    threshold: float
    get_experiment: Callable[[], Experiment] = dataclasses.field(repr=False)
    other: "NetworkInputs | None" = None

    @property
    def experiment(self) -> Experiment:
        """The experiment: model, data set and settings."""
        return self.get_experiment()


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """What an analysis with `needs="run"` is given: results.csv, and the other tables by name."""

    results: pd.DataFrame
    tables: dict[str, pd.DataFrame]


@dataclasses.dataclass(frozen=True)
class Analysis:
    name: str
    function: Callable[[Any], Iterable[Sequence[Any]]]
    columns: tuple[str, ...]
    needs: str

    @property
    def keys(self) -> tuple[str, ...]:
        return KEYS[self.needs]


ANALYSES: dict[str, Analysis] = {}


def register(
    name: str,
    function: Callable[[Any], Iterable[Sequence[Any]]],
    *,
    columns: Sequence[str],
    needs: str = "round",
) -> None:
    """Make analysis/NAME.csv of every run, with rows that `function` computes.

    Args:
      function: of a `NetworkInputs`, or of a `RunInputs` with needs="run"; returns rows, each a sequence of the
        values of `columns`.
      columns: of the rows; the table begins with the columns of `KEYS[needs]`.
      needs: "round", called for each network of each round, without twins; "successive", for each imp of a
        round with that of the round before as `other`; "twin", for each imp with its twin as `other`; "run",
        called once.

    Raises:
      UserError: a name that is not a plain file name or is a table of imp_jax, an unknown `needs`, columns that
        repeat each other or the keys.
    """
    if not re.fullmatch(r"\w+", name) or name in TABLES:
        raise UserError(
            f"the analysis {name!r} should have a name of letters, digits and underscores that is none of "
            f"{', '.join(TABLES)}"
        )
    if not callable(function):
        raise UserError(f"the analysis {name!r} is a {type(function).__name__}; it should be a function")
    if needs not in KEYS:
        raise UserError(f"the analysis {name!r} needs {needs!r}; it should need one of {', '.join(KEYS)}")
    every = [*KEYS[needs], *columns]
    if isinstance(columns, str) or not columns or len(set(every)) < len(every):
        raise UserError(
            f"the analysis {name!r} has the columns {columns!r}; they should be names, none twice and none of "
            f"{', '.join(KEYS[needs]) or 'the keys'}, written as ('norm',)"
        )
    ANALYSES[name] = Analysis(name, function, tuple(columns), needs)


def compute_registered(
    checkpoints: Checkpoints, experiment: Callable[[], Experiment], workdir: Path, results: pd.DataFrame
) -> None:
    """Compute the rows that the tables of registered analyses lack, for all rounds on disk."""
    analyses = [analysis for analysis in ANALYSES.values() if analysis.needs != "run"]
    tables = {analysis.name: _read(workdir, analysis) for analysis in analyses}
    finished = [number for number in checkpoints.rounds() if (results["round"] == number).any()]
    thresholds = results.set_index(["arm", "replicate", "round"])["threshold"].to_dict()
    before: dict[Member, NetworkInputs] = {}
    for number in finished:
        members = members_of_rows(results.to_dict("records"), number)
        if number - 1 not in finished:  # a round between is deleted: these are no successive rounds
            before = {}
        missing = {a.name: _missing_members(a, tables[a.name], members, number, before) for a in analyses}
        if not any(missing.values()) and not _next_round_needs(analyses, tables, number, finished):
            before = {}
            continue
        try:
            networks = checkpoints.restore(number)
        except DamagedError as error:
            print(f"{error}; it is left out of the analyses", file=sys.stderr)
            before = {}
            continue
        inputs = {
            member: _network_inputs(networks, i, member, number, thresholds, experiment)
            for i, member in enumerate(members)
        }
        for analysis in analyses:
            for member in missing[analysis.name]:
                one = inputs[member]
                if analysis.needs == "successive":
                    one = dataclasses.replace(one, other=before[member])
                if analysis.needs == "twin":
                    one = dataclasses.replace(one, other=inputs[Member("twin", member.replicate)])
                key = [getattr(one, column) for column in analysis.keys]
                rows = _rows(analysis, one, key)
                tables[analysis.name] = pd.concat([tables[analysis.name], rows], ignore_index=True)
        before = inputs
    for analysis in analyses:
        _write(workdir, analysis, tables[analysis.name])
    run_inputs = RunInputs(results, load_registered(workdir))
    for analysis in ANALYSES.values():
        if analysis.needs == "run":
            _write(workdir, analysis, _rows(analysis, run_inputs, []))


def load_registered(workdir: Path) -> dict[str, pd.DataFrame]:
    """Read all tables in analysis/ that are not of imp_jax, whether their analysis is registered or not."""
    tables = {analysis.name: _empty(analysis) for analysis in ANALYSES.values()}
    for path in sorted((workdir / "analysis").glob("*.csv")):
        if path.stem not in TABLES and not path.name.startswith("."):
            with contextlib.suppress(pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError):
                tables[path.stem] = pd.read_csv(path)
    return tables


def drop_registered_rounds_from(workdir: Path, first: int) -> None:
    """Drop the rows of rounds from `first` on, which will be trained again."""
    for name, table in load_registered(workdir).items():
        if "round" in table and (table["round"] >= first).any():
            table = table[table["round"] < first]
            save_file(workdir, workdir / "analysis" / f"{name}.csv", table.to_csv(index=False).encode())


def _next_round_needs(analyses, tables, number, finished):
    """Return whether the round after `number` is on disk and may lack rows of pairs with this one."""
    return number + 1 in finished and any(
        analysis.needs == "successive" and not (tables[analysis.name]["round"] == number + 1).any()
        for analysis in analyses
    )


def _missing_members(analysis, table, members, number, before):
    """Return the members of a round for which an analysis has no row, and all that it needs."""
    known = set(table[list(analysis.keys)].itertuples(index=False, name=None))

    def is_wanted(member):
        if analysis.needs == "round":
            key, possible = (member.replicate, member.arm, number), member.arm != "twin"
        else:
            key = (member.replicate, number)
            partners = before if analysis.needs == "successive" else members
            partner = member if analysis.needs == "successive" else Member("twin", member.replicate)
            possible = member.arm == "imp" and partner in partners
        return possible and key not in known

    return [member for member in members if is_wanted(member)]


def _network_inputs(networks, index, member, number, thresholds, experiment):
    initial, trained, mask = jax.tree.map(lambda leaf: leaf[index], tuple(networks))
    return NetworkInputs(
        params=trained["params"],
        initial=initial["params"],
        mask=mask,
        model_state={name: leaves for name, leaves in trained.items() if name != "params"},
        arm=member.arm,
        replicate=member.replicate,
        round=number,
        threshold=thresholds[(*member, number)],
        get_experiment=experiment,
    )


def _rows(analysis, inputs, key):
    rows = [tuple(row) for row in analysis.function(inputs)]
    for row in rows:
        if len(row) != len(analysis.columns):
            raise UserError(
                f"the analysis {analysis.name!r} gave a row of {len(row)} values; it should have "
                f"{len(analysis.columns)}: {', '.join(analysis.columns)}"
            )
    return pd.DataFrame([(*key, *row) for row in rows], columns=[*analysis.keys, *analysis.columns])


def _empty(analysis):
    return pd.DataFrame(columns=[*analysis.keys, *analysis.columns])


def _read(workdir, analysis):
    """Read the table of an analysis, with any further columns that it has.

    A file that cannot be read, or lacks columns, is moved to the folder set-aside and computed again.
    """
    path, empty = workdir / "analysis" / f"{analysis.name}.csv", _empty(analysis)
    if not path.exists():
        return empty
    with contextlib.suppress(pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError):
        table = pd.read_csv(path)
        if set(empty.columns) <= set(table.columns) and path.read_bytes().endswith(b"\n"):
            return table
    with reporting_write_errors(workdir):
        moved = move_aside(path, workdir)
    print(
        f"{path} cannot be read as the table of this analysis; it is moved to {moved}, and computed again for "
        f"the rounds whose checkpoints are still on disk",
        file=sys.stderr,
    )
    return empty


def _write(workdir, analysis, table):
    if analysis.keys:
        table = table.sort_values(list(analysis.keys), kind="stable")
    path, content = workdir / "analysis" / f"{analysis.name}.csv", table.to_csv(index=False).encode()
    with reporting_write_errors(workdir):
        if not path.exists() or path.read_bytes() != content:
            save_file(workdir, path, content)
