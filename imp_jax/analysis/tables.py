"""The tables of a workdir: csv files in `analysis/`, what they hold, and how they are read and written."""

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from imp_jax import similarity
from imp_jax.errors import UserError
from imp_jax.workdir.checkpoints import move_aside
from imp_jax.workdir.files import write_atomically

INITIALISATION = -1  # the "round" of the weights that survivors are reset to, in distances.csv

KINDS = ("successive", "instability")  # of paths

BINS = 101  # of a histogram; an odd number, so that one is centred on 0

# The tables, a csv file each, with their columns.
TABLES = {
    # between the trained networks of two rounds, on the weights both keep
    "distances": ("replicate", "arm", "metric", "round_a", "round_b", "distance"),
    # kind successive: from the round before; instability: from imp to its twin. Error in [0, 1], loss in nats
    "paths": ("replicate", "kind", "round", "split", "alpha", "loss", "error", "batch_norm"),
    "barriers": ("replicate", "kind", "round", "split", "barrier", "loss_barrier"),  # of those paths
    # surviving weights in intervals from left to right, the same for all members of a round
    "histograms": ("replicate", "arm", "round", "left", "right", "count"),
    # Sarle's coefficient, and the share of survivors below half the round's own threshold
    "weights": ("replicate", "arm", "round", "survivors", "bimodality", "near_zero"),
    # of the mask, which all arms share; through a dead unit leads no path of surviving weights from input to
    # output; units and dead_units are empty where a model's paths are not known
    "layers": ("replicate", "round", "layer", "weights", "survivors", "units", "dead_units"),
}

# Versions of what a table means, where that has changed: older tables are computed again.
DEFINITIONS = {
    "distances": similarity.DEFINITION,
    "layers": 2,  # 1 found dead units by activations: all of them in a network that normalises layers
}

_DEFINITIONS_FILE = "definitions.json"

# columns that identify a row
_KEYS = ("replicate", "arm", "kind", "metric", "round", "round_a", "round_b", "split", "alpha", "layer")


def drop_rounds_from(workdir: Path, first: int) -> None:
    """Drop the rows of rounds from `first` on, which will be trained again."""
    for name in TABLES:
        table = read_table(workdir, name)
        numbers = table[[column for column in ("round", "round_a", "round_b") if column in table]]
        if not (known := (numbers < first).all(axis=1)).all():
            write_table(workdir, name, table[known])


def outdated(workdir: Path) -> list[str]:
    """Return the tables of a workdir that an earlier version computed by other `DEFINITIONS`."""
    stored = {}
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads((workdir / "analysis" / _DEFINITIONS_FILE).read_text())
    return [
        name
        for name, definition in DEFINITIONS.items()
        if stored.get(name, 1) != definition and (workdir / "analysis" / f"{name}.csv").exists()
    ]


def key_set(table, *columns):
    return set(table[list(columns)].itertuples(index=False, name=None))


def make_table(name, rows: Iterable):
    return pd.DataFrame(list(rows), columns=list(TABLES[name]))


def add_rows(name, table, rows):
    new = make_table(name, rows)
    return pd.concat([table, new]) if len(table) else new.reindex(columns=table.columns)


def keep_unknown_columns(name, table, old):
    """`table` with the columns of `old` that `TABLES` does not have."""
    keys = [column for column in TABLES[name] if column in _KEYS]
    unknown = [column for column in old if column not in TABLES[name]]
    return table.merge(old[keys + unknown], on=keys, how="left") if unknown else table


def read_table(workdir, name):
    """A table as it is on disk, with the columns that it has; empty where there is none that can be read."""
    path = workdir / "analysis" / f"{name}.csv"
    with contextlib.suppress(FileNotFoundError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError):
        table = pd.read_csv(path)
        keys = [column for column in TABLES[name] if column in _KEYS]
        if set(keys) <= set(table) and path.read_bytes().endswith(b"\n"):
            return table
    return make_table(name, [])


def move_outdated_tables(workdir):
    for name in outdated(workdir):
        path = workdir / "analysis" / f"{name}.csv"
        place = move_aside(path, workdir)
        print(
            f"{path} was computed by an earlier version, which defined it differently; it is moved to {place} "
            f"and computed again, for the rounds whose checkpoints are still on disk",
            file=sys.stderr,
        )
    write_atomically(workdir / "analysis" / _DEFINITIONS_FILE, json.dumps(DEFINITIONS))


def is_unreadable(workdir, name):
    path = workdir / "analysis" / f"{name}.csv"
    return (
        path.exists()
        and not len(read_table(workdir, name))
        and path.read_bytes() != to_csv(make_table(name, []))
    )


def drop_incomplete_rows(name, table, finished):
    """Add missing columns; drop rows that lack some and can be computed again from rounds on disk."""
    rounds = table[[column for column in ("round", "round_a", "round_b") if column in table]]
    if "kind" in table:
        rounds = rounds.assign(before=table["round"] - (table["kind"] == "successive"))
    if not set(TABLES[name]) <= set(table):
        table = table[~rounds.isin([INITIALISATION, *finished]).all(axis=1)]
    return table.reindex(columns=[*TABLES[name], *(column for column in table if column not in TABLES[name])])


def move_unreadable_tables(workdir):
    for name in TABLES:
        path = workdir / "analysis" / f"{name}.csv"
        if is_unreadable(workdir, name):
            with reporting_write_errors(workdir):
                place = move_aside(path, workdir)
            print(f"{path} cannot be read; it is moved to {place}, and computed again", file=sys.stderr)


@contextlib.contextmanager
def reporting_write_errors(workdir):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the analyses of {workdir}: {error}") from error


def save_file(workdir, path, content):
    with reporting_write_errors(workdir):
        write_atomically(path, content)


def write_table(workdir, name, table):
    names = ("replicate", "arm", "kind", "metric", "round", "round_a", "round_b")
    table = table.sort_values([name for name in names if name in table], kind="stable")
    content = to_csv(table)
    path = workdir / "analysis" / f"{name}.csv"
    if not path.exists() or path.read_bytes() != content:
        save_file(workdir, path, content)


def to_csv(table):
    return table.to_csv(index=False, float_format="%.9g").encode()
