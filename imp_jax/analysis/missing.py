"""Compute the rows that the tables of a workdir lack."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import pandas as pd
from jaxtyping import PyTree
from ml_collections import ConfigDict
from rich.progress import track

from imp_jax import similarity
from imp_jax.analysis.distances import compute_distances, pair_on_disk
from imp_jax.analysis.paths import compute_barriers, compute_paths, drop_stale_paths, replicates_with_both_ends
from imp_jax.analysis.registry import compute_registered
from imp_jax.analysis.tables import (
    INITIALISATION,
    KINDS,
    TABLES,
    add_rows,
    drop_incomplete_rows,
    drop_rounds_from,
    keep_unknown_columns,
    key_set,
    make_table,
    move_outdated_tables,
    move_unreadable_tables,
    read_table,
    reporting_write_errors,
    write_table,
)
from imp_jax.analysis.weights import compute_weights, incomplete_rounds
from imp_jax.arms import Member, members_of_rows
from imp_jax.experiment import Experiment
from imp_jax.training import Variables
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError, RoundNetworks
from imp_jax.workdir.progress import make_console


def compute(
    checkpoints: Checkpoints,
    config: ConfigDict,
    experiment: Callable[[], Experiment],
    workdir: Path,
    results: pd.DataFrame,
    shown: bool = False,
) -> None:
    """Compute the rows missing from `analysis/*.csv` for all checkpointed rounds that are in `results`.

    Existing rows are kept, including those of deleted rounds. Unreadable tables are moved to set-aside/ and
    recomputed; unreadable rounds are skipped; both print a warning.

    Args:
      experiment: returns the experiment; called only if needed, as it opens the data set.
      shown: show a progress bar on a terminal.
    """
    with reporting_write_errors(workdir):
        (workdir / "analysis").mkdir(exist_ok=True)
    finished = [number for number in checkpoints.rounds() if (results["round"] == number).any()]
    members = {number: members_of_rows(results.to_dict("records"), number) for number in finished}
    with reporting_write_errors(workdir):
        move_outdated_tables(workdir)
        move_unreadable_tables(workdir)
    drop_rounds_from(workdir, int(results["round"].max()) + 1)
    tables = {name: drop_incomplete_rows(name, read_table(workdir, name), finished) for name in TABLES}
    missing = sorted({*results["round"]} - {*checkpoints.rounds(), *tables["weights"]["round"]})
    if missing:
        numbers = ", ".join(map(str, missing))
        print(f"{workdir} has no checkpoint of round {numbers}; the analyses leave it out", file=sys.stderr)
    tables["paths"] = drop_stale_paths(tables["paths"], config.analysis, finished)

    there = key_set(tables["paths"], "kind", "round", "replicate", "split")
    paths = [
        (kind, number)
        for number, kind in itertools.product(finished, KINDS)
        for replicate, split in itertools.product(
            replicates_with_both_ends(kind, number, members), ("train", "test")
        )
        if (kind, number, replicate, split) not in there
    ]
    of_weights = incomplete_rounds(tables, members)
    there = key_set(tables["distances"], "arm", "replicate", "metric", "round_a", "round_b")
    of_distances = not there.issuperset(
        (*member, metric, a, b)
        for member in {member for of_round in members.values() for member in of_round if member.arm != "twin"}
        for a, b in itertools.product([n for n in finished if member in members[n]], repeat=2)
        if pair_on_disk(config, a, b)
        for metric in similarity.METRICS
    )
    needed = {number for _, number in paths} | of_weights | (set(finished) if of_distances else set())
    needed |= {number - 1 for kind, number in paths if kind == "successive"}

    networks, before = {}, None
    console = make_console()
    disable = not (shown and console.is_interactive)
    progress = {"description": "analysing", "console": console, "disable": disable}
    for number in track(sorted(needed), transient=True, **progress):
        try:
            now = Networks(members[number], checkpoints.restore(number))
        except DamagedError as error:
            print(f"{error}; it is left out of the analyses", file=sys.stderr)
            before = None
            continue
        if number in of_weights:
            new = compute_weights(experiment(), number, now, results[results["round"] == number])
            for name, rows in new.items():
                tables[name] = add_rows(name, tables[name][tables[name]["round"] != number], rows)
        for kind in KINDS:
            if (kind, number) not in paths or (kind == "successive" and before is None):
                continue
            other = tables["paths"][(tables["paths"]["round"] != number) | (tables["paths"]["kind"] != kind)]
            tables["paths"] = add_rows(
                "paths", other, list(compute_paths(experiment(), config.analysis, number, kind, before, now))
            )
            write_table(workdir, "paths", tables["paths"])  # the one that takes long
        if of_distances:
            if number == 0:
                networks[INITIALISATION] = now.split_members((now.round.initial["params"], now.round.mask))
            networks[number] = now.split_members((now.round.trained["params"], now.round.mask))
        before = now

    if of_distances:
        old = tables["distances"]
        rows = compute_distances(networks, tuple(config.pruning.exclude))
        rows = (row for row in rows if pair_on_disk(config, *row[3:5]))
        new = make_table("distances", rows)
        keys = ["replicate", "arm", "metric", "round_a", "round_b"]
        tables["distances"] = (pd.concat([new, old]) if len(old) else new).drop_duplicates(keys)
    barriers = compute_barriers(tables["paths"], config.analysis.baseline)
    tables["barriers"] = keep_unknown_columns("barriers", barriers, tables["barriers"])
    for name, table in tables.items():
        write_table(workdir, name, table)
    compute_registered(checkpoints, experiment, workdir, results)


class Networks(NamedTuple):
    """The networks of a round, and the members of their leading axis."""

    members: tuple[Member, ...]
    round: RoundNetworks

    def trained(self, arm: str, replicate: int) -> Variables:
        index = self.members.index(Member(arm, replicate))
        return jax.tree.map(lambda leaf: leaf[index], self.round.trained)

    def split_members(self, tree: PyTree) -> dict[Member, PyTree]:
        """Split a tree of all members into those of the members, without twins."""
        return {
            member: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: B023
            for i, member in enumerate(self.members)
            if member.arm != "twin"
        }
