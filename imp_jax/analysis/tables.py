"""Reads and writes the tables of a workdir, the csv files in `analysis/`."""

import contextlib
import json
import sys
from pathlib import Path

import pandas as pd

from imp_jax.analysis.registry import ANALYSES, Analysis
from imp_jax.errors import UserError
from imp_jax.workdir.checkpoints import move_aside
from imp_jax.workdir.files import write_atomically

_ROUNDS = ("round", "round_a", "round_b")  # columns with the number of a round
# columns by which rows are sorted (stably)
_ORDER = ("replicate", "arm", "kind", "metric", *_ROUNDS, "replicate_b", "arm_b", "epoch", "step", "noise")
_UNREADABLE = (FileNotFoundError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError)


def table_path(workdir: Path, name: str) -> Path:
    """Return the path of a table."""
    return workdir / "analysis" / f"{name}.csv"


def read_table(workdir: Path, analysis: Analysis) -> pd.DataFrame:
    """Return the table on disk, with the columns that it has; an empty table if it cannot be read."""
    path = table_path(workdir, analysis.name)
    with contextlib.suppress(*_UNREADABLE):
        table = pd.read_csv(path)
        if set(analysis.index) <= set(table) and path.read_bytes().endswith(b"\n"):
            return table
    return analysis.empty_table()


def read_other_tables(workdir: Path) -> dict[str, pd.DataFrame]:
    """Return the tables on disk whose analyses are not registered, such as those of a user's config file."""
    tables = {}
    for path in sorted((workdir / "analysis").glob("*.csv")):
        if path.stem not in ANALYSES and not path.name.startswith("."):
            with contextlib.suppress(*_UNREADABLE):
                tables[path.stem] = pd.read_csv(path)
    return tables


def is_unreadable(workdir: Path, analysis: Analysis) -> bool:
    """Return whether a table on disk cannot be read or lacks columns that identify its rows."""
    path = table_path(workdir, analysis.name)
    return (
        path.exists()
        and not len(read_table(workdir, analysis))
        and path.read_bytes() != to_csv(analysis.empty_table())
    )


def move_unreadable_tables(workdir: Path) -> None:
    """Move unreadable tables to the folder set-aside."""
    for analysis in ANALYSES.values():
        if is_unreadable(workdir, analysis):
            path = table_path(workdir, analysis.name)
            with reporting_write_errors(workdir):
                moved = move_aside(path, workdir)
            print(f"{path} cannot be read; it is moved to {moved}, and computed again", file=sys.stderr)


def outdated(workdir: Path) -> list[str]:
    """Return the names of tables on disk that an earlier version computed with another definition."""
    stored = _read_definitions(workdir)
    return [
        analysis.name
        for analysis in ANALYSES.values()
        if stored.get(analysis.name, 1) != analysis.definition and table_path(workdir, analysis.name).exists()
    ]


def move_outdated_tables(workdir: Path) -> None:
    """Move outdated tables to the folder set-aside, and store the current definitions."""
    for name in outdated(workdir):
        path = table_path(workdir, name)
        moved = move_aside(path, workdir)
        print(
            f"{path} was computed by an earlier version, which defined it differently; it is moved to {moved} "
            f"and computed again, for the rounds whose checkpoints are still on disk",
            file=sys.stderr,
        )
    definitions = {analysis.name: analysis.definition for analysis in ANALYSES.values()}
    stored = {name: number for name, number in _read_definitions(workdir).items() if name not in definitions}
    definitions = {**stored, **{name: number for name, number in definitions.items() if number != 1}}
    write_atomically(_definitions_file(workdir), json.dumps(definitions))


def drop_rounds_from(workdir: Path, first: int) -> None:
    """Drop the rows of round `first` and later rounds from all tables, because they will be trained again."""
    tables = {name: read_table(workdir, analysis) for name, analysis in ANALYSES.items()}
    for name, table in {**tables, **read_other_tables(workdir)}.items():
        known = (table[[column for column in _ROUNDS if column in table]] < first).all(axis=1)
        if not known.all():
            write_table(workdir, name, table[known])


def write_table(workdir: Path, name: str, table: pd.DataFrame) -> None:
    """Write a table, with its rows sorted, so that their order does not depend on when they were computed."""
    table = table.sort_values([column for column in _ORDER if column in table], kind="stable")
    path, content = table_path(workdir, name), to_csv(table)
    if not path.exists() or path.read_bytes() != content:
        save_file(workdir, path, content)


def to_csv(table: pd.DataFrame) -> bytes:
    """Return a table as the content of a csv file, with the nine digits that identify a float32."""
    return table.to_csv(index=False, float_format="%.9g").encode()


def save_file(workdir: Path, path: Path, content: str | bytes) -> None:
    """Write a file of the analyses. Raises: see `reporting_write_errors`."""
    with reporting_write_errors(workdir):
        write_atomically(path, content)


@contextlib.contextmanager
def reporting_write_errors(workdir: Path):
    """Raise errors of the file system as a UserError that names the workdir."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the analyses of {workdir}: {error}") from error


def _read_definitions(workdir):
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_definitions_file(workdir).read_text())
    return {}


def _definitions_file(workdir):
    return workdir / "analysis" / "definitions.json"
