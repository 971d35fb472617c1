"""Computes the missing rows of the tables of a workdir."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from ml_collections import ConfigDict
from rich.progress import track

from imp_jax.analysis.registry import ANALYSES, Analysis, NetworkInputs, RunInputs, is_requested
from imp_jax.analysis.tables import (
    drop_rounds_from,
    move_outdated_tables,
    move_unreadable_tables,
    read_other_tables,
    read_table,
    reporting_write_errors,
    write_table,
)
from imp_jax.experiment import Experiment
from imp_jax.members import Member, members_of_rows
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError
from imp_jax.workdir.epochs import read_epochs
from imp_jax.workdir.progress import make_console

_SAVE_EVERY_S = 10
_KEPT_BYTES = 2**30  # at most, of the networks of all rounds, if they stay in memory after their round

Members = dict[int, tuple[Member, ...]]  # of each round whose checkpoint is on disk


class Call(NamedTuple):
    """One call of an analysis: for a member in a round, and another network if `kind` is not empty."""

    analysis: Analysis
    round: int
    member: Member
    kind: str

    @property
    def key(self) -> tuple:
        """The values of the columns `analysis.keys`."""
        arm, replicate = self.member
        values = {"replicate": replicate, "arm": arm, "round": self.round, "kind": self.kind}
        return tuple(values[column] for column in self.analysis.keys)

    @property
    def other(self) -> tuple[int, Member]:
        """The round and member of the second network; the network itself if there is no second."""
        if self.kind == "successive":
            return self.round - 1, self.member
        if self.kind == "instability":
            return self.round, Member("twin", self.member.replicate)
        return self.round, self.member


def compute(
    checkpoints: Checkpoints,
    config: ConfigDict,
    experiment: Callable[[], Experiment],
    workdir: Path,
    results: pd.DataFrame,
    show_progress: bool = False,
) -> None:
    """Compute the rows missing from `analysis/*.csv` for all checkpointed rounds that are in `results`.

    Existing rows are kept, including those of deleted rounds. Outdated and unreadable tables are moved to
    set-aside/ and recomputed; damaged rounds are skipped; all of these print a warning.

    Args:
      experiment: returns the experiment; called only if needed, because it opens the data set.
      results: results.csv.
      show_progress: whether to show a progress bar on a terminal.
    """
    with reporting_write_errors(workdir):
        (workdir / "analysis").mkdir(exist_ok=True)
        move_outdated_tables(workdir)
        move_unreadable_tables(workdir)
    drop_rounds_from(workdir, int(results["round"].max()) + 1)
    rows = results.to_dict("records")
    on_disk = checkpoints.rounds()
    members = {n: members_of_rows(rows, n) for n in on_disk if (results["round"] == n).any()}
    tables = {name: read_table(workdir, analysis) for name, analysis in ANALYSES.items()}
    requested = [analysis for analysis in ANALYSES.values() if is_requested(analysis, config)]
    _warn_of_missing_rounds(workdir, tables, requested, {*results["round"]} - set(on_disk))

    epochs = read_epochs(workdir)  # while a run trains, it may have more rounds than `results`
    reader = NetworkReader(checkpoints, config, experiment, results, members)
    inputs = RunInputs(
        results,
        {**read_other_tables(workdir), **tables},
        config,
        members,
        reader.read_all,
        experiment,
        reader.read_once,
        epochs[epochs["round"].isin(results["round"])],
    )
    _print_costs(requested, inputs)
    _compute_missing(inputs.tables, requested, reader, workdir, config, members, show_progress)
    for analysis in requested:
        if analysis.needs == "run":
            table = analysis.make_table(analysis.function(inputs))
            inputs.tables[analysis.name] = _with_unknown_columns(analysis, table, tables[analysis.name])
        write_table(workdir, analysis.name, inputs.tables[analysis.name])  # the next may take long
    reader.release()


class NetworkReader:
    """Reads the networks of rounds; reports a damaged round once and returns no networks for it."""

    def __init__(self, checkpoints, config, get_experiment, results, members: Members):
        self._checkpoints = checkpoints
        self._shared = {"config": config, "get_experiment": get_experiment}
        self._thresholds = results.set_index(["arm", "replicate", "round"])["threshold"].to_dict()
        self._members = members
        self._damaged = set()
        self._in_memory = {}
        self._bytes_per_round = 0

    def read(self, number: int) -> dict[Member, NetworkInputs]:
        """Return the networks of a round; {} if its checkpoint is damaged."""
        if number in self._damaged:
            return {}
        try:
            restored = jax.tree.map(np.asarray, tuple(self._checkpoints.restore(number)))
        except DamagedError as error:
            print(f"{error}; it is left out of the analyses", file=sys.stderr)
            self._damaged.add(number)
            return {}
        self._bytes_per_round = sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
        networks = self._in_memory.setdefault(number, {})
        for index, member in enumerate(self._members[number]):
            initial, trained, mask = jax.tree.map(lambda leaf: leaf[index], restored)  # noqa: B023
            networks[member] = NetworkInputs(
                params=trained.pop("params"),
                initial=initial.pop("params"),
                mask=mask,
                model_state=trained,
                initial_state=initial,
                arm=member.arm,
                replicate=member.replicate,
                round=number,
                threshold=self._thresholds[(*member, number)],
                networks=networks,
                **self._shared,
            )
        return networks

    def read_once(self, number: int) -> dict[Member, NetworkInputs]:
        """Return the networks of a round, from memory if it has been read and not released."""
        return self._in_memory.get(number) or self.read(number)

    def read_all(self) -> dict[int, dict[Member, NetworkInputs]]:
        """Return the networks of all rounds that can be read."""
        return {number: networks for number in self._members if (networks := self.read_once(number))}

    def release(self, before: int | None = None) -> None:
        """Free the networks of all rounds, or of those before a round unless all of them are small."""
        if before is not None and self._bytes_per_round * len(self._members) < _KEPT_BYTES:
            return  # analyses of whole runs need them again
        for number in list(self._in_memory):
            if before is None or number < before:
                self._in_memory.pop(number).clear()  # they refer to each other


def _print_costs(requested, inputs):
    """Print the work of analyses on request whose rows are missing."""
    for analysis in requested:
        if analysis.cost and (images := analysis.cost(inputs)):
            epochs = images / inputs.experiment.dataset.train.examples
            trainings = epochs / inputs.config.epochs
            print(
                f"computing {analysis.name}, which analysis.also asks for: about as much work as {epochs:,.3g} "
                f"epochs of one network, or {trainings:,.3g} of its trainings"
            )


def _compute_missing(tables, requested, reader, workdir, config, members, show_progress):
    """Add missing rows to `tables`, round by round, for analyses that are called per network or pair."""
    missing = {number: [] for number in members}
    for call in _missing_calls(tables, requested, config, members):
        missing[call.round].append(call)
    needed = {number for calls in missing.values() for call in calls for number in (call.round, call.other[0])}
    networks, saved = {}, time.monotonic()
    console = make_console()
    disable = not (show_progress and console.is_interactive)
    for number in track(sorted(needed), "analysing", console=console, transient=True, disable=disable):
        networks = {n: networks[n] for n in networks if n == number - 1} | {number: reader.read(number)}
        reader.release(before=number - 1)
        for name in dict.fromkeys(call.analysis.name for call in missing[number]):
            calls = [call for call in missing[number] if call.analysis.name == name]
            rows = {call.key: _call(call, networks) for call in calls if _can_call(call, networks)}
            if rows:
                tables[name] = _replace_rows(ANALYSES[name], tables[name], rows)
        if time.monotonic() - saved > _SAVE_EVERY_S:
            for analysis in requested:
                write_table(workdir, analysis.name, tables[analysis.name])
            saved = time.monotonic()


def _missing_calls(tables, requested, config, members: Members) -> Iterator[Call]:
    """Yield the calls whose networks are on disk and whose rows are missing or not current."""
    for analysis in requested:
        if analysis.needs == "run":
            continue
        table = tables[analysis.name]
        current = pd.Series(True, table.index)
        if not set(analysis.columns) <= set(table):  # a table of an earlier version
            current[:] = False
        elif analysis.is_current and len(table):
            current = analysis.is_current(table, config).astype(bool)
        keys = list(analysis.keys)
        stale = set(table.loc[~current, keys].itertuples(index=False, name=None))
        known = set(table[keys].itertuples(index=False, name=None)) - stale
        for call in _calls(analysis, members):
            if call.key not in known:
                yield call


def _calls(analysis, members: Members) -> Iterator[Call]:
    """Yield the calls of an analysis whose networks are on disk."""
    pairs = {"successive": ["successive"], "twin": ["instability"], "pair": ["successive", "instability"]}
    for number, trained in members.items():
        for member in trained:
            if member.arm == "imp" or (member.arm != "twin" and analysis.needs == "round"):
                for kind in pairs.get(analysis.needs, [""]):
                    call = Call(analysis, number, member, kind)
                    other_round, other_member = call.other
                    if other_member in members.get(other_round, ()):
                        yield call


def _can_call(call, networks):
    other_round, other_member = call.other
    return call.member in networks[call.round] and other_member in networks.get(other_round, {})


def _call(call, networks):
    inputs = networks[call.round][call.member]
    if call.kind:
        other_round, other_member = call.other
        inputs = dataclasses.replace(inputs, kind=call.kind, other=networks[other_round][other_member])
    return call.analysis.make_table(call.analysis.function(inputs), call.key)


def _replace_rows(analysis, table, rows):
    """Return `table` with new rows; `rows` maps each key to a table, which replaces the rows of this key."""
    table = table.reindex(columns=[*analysis.columns, *(c for c in table if c not in analysis.columns)])
    new = pd.concat(rows.values())
    kept = table[~pd.MultiIndex.from_frame(table[list(analysis.keys)]).isin(list(rows))]
    return pd.concat([kept, new], ignore_index=True) if len(kept) else new.reindex(columns=table.columns)


def _with_unknown_columns(analysis, table, old):
    """Return `table` with the columns of `old`, the table on disk, that the analysis does not have."""
    unknown = [column for column in old if column not in analysis.columns]
    return table.merge(old[analysis.index + unknown], on=analysis.index, how="left") if unknown else table


def _warn_of_missing_rounds(workdir, tables, requested, not_on_disk):
    tables = [tables[analysis.name] for analysis in requested if analysis.needs == "round"]
    missing = sorted(n for n in not_on_disk if not all((table["round"] == n).any() for table in tables))
    if missing:
        numbers = ", ".join(map(str, missing))
        print(f"{workdir} has no checkpoint of round {numbers}; the analyses leave it out", file=sys.stderr)
