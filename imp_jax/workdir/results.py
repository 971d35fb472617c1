"""results.csv, one row per member and round."""

import csv
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from imp_jax.workdir.files import write_atomically

FIELDS = (
    "replicate",
    "arm",
    "round",
    "density",  # surviving fraction of the prunable weights
    "threshold",  # largest magnitude removed after the round
    "train_loss",  # nats
    "train_accuracy",  # in [0, 1]
    "test_loss",
    "test_accuracy",
    "repulsion",  # J_r at the end of training; empty without repulsion
    "cosine",  # mean cosine similarity with earlier optima on the round's mask; empty if there are none
    "epochs",  # of the training
    "retraining_barrier",  # error barrier between the two last solutions, if it decided these epochs; in [0, 1]
    "pruning_barrier",  # increase of the error up to the next mask, if it decided its density; in [0, 1]
    "validation_loss",  # empty without a validation split
    "validation_accuracy",
    "seconds",  # wall time in which all members of the round were trained, without compilation
)

# columns that earlier versions did not write, and that are empty in most runs
_NEWER_FIELDS = (
    "epochs",
    "retraining_barrier",
    "pruning_barrier",
    "validation_loss",
    "validation_accuracy",
)

KEYS = ("replicate", "arm", "round")  # identify a row

Row = dict[str, Any]


class Results:
    """Writes results.csv: appends once per round, after the checkpoint of the round is on disk."""

    def __init__(self, workdir: Path, rows: Iterable[Row]):
        """Start from `rows`, those of the rounds on disk; rewrite the file if its content differs."""
        self._path = workdir / "results.csv"
        self.rows = _with_unknown_columns(rows, self._path)
        self._columns = list(dict.fromkeys([*FIELDS, *(name for row in self.rows for name in row)]))
        content = self._to_csv(self.rows, header=True)
        if not self._path.exists() or self._path.read_bytes() != content.encode():
            write_atomically(self._path, content)

    def append(self, rows: Sequence[Row]) -> None:
        """Append the rows of a round; they are on disk when this returns."""
        self.rows += rows
        with open(self._path, "a", newline="") as file:
            file.write(self._to_csv(rows))
            file.flush()
            os.fsync(file.fileno())

    def table(self) -> pd.DataFrame:
        """Return all rows as a table."""
        return pd.DataFrame(self.rows, columns=self._columns)

    def _to_csv(self, rows, header=False):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if header:
            writer.writeheader()
        for row in rows:  # nine digits distinguish any two values of float32
            writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
        return text.getvalue()


def value_columns(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return the columns of rows of results.csv or epochs.csv, without those that identify a row."""
    names = [name for name in (rows[0] if rows else ()) if name not in (*KEYS, "epoch")]
    return {name: [row[name] for row in rows] for name in names}


def recorded_rounds(workdir: Path) -> set[int]:
    """Return the rounds in results.csv; the empty set if it cannot be read."""
    try:
        return set(pd.read_csv(workdir / "results.csv")["round"].dropna().astype(int))
    except (FileNotFoundError, ValueError, KeyError):  # no file, or a truncated one
        return set()


def read_results(workdir: Path) -> pd.DataFrame:
    """Return results.csv of a workdir as a table; empty if there is no file.

    If a column of `FIELDS` is missing, it is filled with NaN, with a warning unless it is one that earlier
    versions did not write. Columns that are not in `FIELDS` come last.
    """
    path = workdir / "results.csv"
    if not path.exists():
        return pd.DataFrame(columns=list(FIELDS))
    table = pd.read_csv(path)
    newer = dict.fromkeys((name for name in _NEWER_FIELDS if name not in table), float("nan"))
    return with_columns(table.assign(**newer), FIELDS, path)


def with_columns(table: pd.DataFrame, columns: Sequence[str], path: Path) -> pd.DataFrame:
    """Put `columns` first in a table read from `path`; fill missing ones with NaN, with a warning."""
    if missing := [name for name in columns if name not in table]:
        warnings.warn(f"{path} has no column {', '.join(missing)}; filled with NaN", stacklevel=4)
    return table.reindex(columns=[*columns, *(name for name in table if name not in columns)])


def _with_unknown_columns(rows, path):
    """Return copies of `rows` with the values of columns that only the file has, such as one added by hand."""
    rows = [dict(row) for row in rows]
    try:
        table = pd.read_csv(path).set_index(list(KEYS))
    except (OSError, ValueError, KeyError):  # no file, or a truncated one
        return rows
    unknown = table[[name for name in table if name not in FIELDS]]
    if not len(unknown.columns) or not unknown.index.is_unique:
        return rows
    for row in rows:
        key = tuple(row.get(name) for name in KEYS)
        if key in unknown.index:
            row.update({k: None if pd.isna(v) else v for k, v in unknown.loc[key].items()})
    return rows
