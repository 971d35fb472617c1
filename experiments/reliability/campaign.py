"""Break several runs by many faults each, compare them with undisturbed runs, and print the outcomes."""

import contextlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.reliability.chain import Chain, LostError, compare_fingerprints
from experiments.reliability.faults import FAULTS

FIELDS = {
    "rounds": 12,
    "epochs": 4,
    "batch_size": 200,
    "replicates": 1,
    "checkpoint_every_epochs": 1,
    "model.width": 0.1,
    "instability.rounds": "(2,5)",
    "repulsion.strength": 2.0,
    "analysis.path_points": 3,
}
SHORT_FIELDS = {**FIELDS, "rounds": 6, "instability.rounds": "()", "repulsion.strength": 0.0}
CHAIN = [  # the SIGKILLs strike twice
    "SIGKILL at any time",
    "SIGKILL between two file operations",
    "SIGKILL while pruning",
    *FAULTS,
]
SHORT_CHAIN = [  # for the tests
    "SIGKILL between two file operations",
    "disk full",
    "a bit of the newest checkpoint flipped",
    "SIGTERM, SIGINT or SIGUSR1",
    "file of the newest checkpoint truncated",
    "read-only file system",
    "SIGKILL while pruning",
]


class Outcome(NamedTuple):
    """What a fault did to a run."""

    fault: str
    loss: str  # empty if the run survived


def run_chains(chains: int, short: bool, seed: int, jobs: int) -> list[Outcome]:
    """Break `chains` runs, `jobs` at a time, or one run if `short`; return the outcomes of all faults."""
    settings = [SHORT_FIELDS] if short else [{**FIELDS, "keep_checkpoints": keep} for keep in ("all", "ends")]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        scratch = Path(scratch).resolve()
        undisturbed, futures = [], []
        for i, fields in enumerate(settings):
            with contextlib.closing(Chain(scratch, f"undisturbed-{i}", fields, seed)) as chain:
                undisturbed.append(chain.finish())
        for i in range(1 if short else chains):
            faults, setting = list(SHORT_CHAIN if short else CHAIN), i % len(settings)
            if not short:
                random.Random(f"{seed} {i}").shuffle(faults)
            chain_arguments = (scratch, f"chain-{i}", settings[setting], seed, faults, undisturbed[setting])
            futures.append(pool.submit(run_chain, *chain_arguments))
        return [outcome for future in futures for outcome in future.result()]


def run_chain(
    scratch: Path,
    name: str,
    fields: dict[str, object],
    seed: int,
    faults: list[str],
    undisturbed: dict[str, Any],
) -> list[Outcome]:
    """Break one run by `faults`, finish it, and compare it with the fingerprint of an undisturbed run.

    The outcomes leave out faults that came too late. If the finished run differs, all faults count as lost.
    """
    chain = Chain(scratch, name, fields, seed)
    outcomes = []
    try:
        for fault in faults:
            try:
                if FAULTS[fault](chain):
                    outcomes.append(Outcome(fault, ""))
            except LostError as lost:
                outcomes.append(Outcome(fault, f"{name}: {lost}"))
        try:
            differences = compare_fingerprints(undisturbed, chain.finish())
            loss = f"{name}: the finished run differs in {differences}" if differences else ""
        except LostError as lost:
            loss = f"{name}: {lost}"
        return [Outcome(outcome.fault, outcome.loss or loss) for outcome in outcomes]
    finally:
        chain.close()


def print_outcomes(outcomes: Sequence[Outcome], seed: int, seconds: float) -> bool:
    """Print how often the runs survived each fault, and why they did not; return True if they always did."""
    tries = Counter(outcome.fault for outcome in outcomes)
    lost = Counter(outcome.fault for outcome in outcomes if outcome.loss)
    minutes, seconds = divmod(round(seconds), 60)
    table = Table("fault", "tries", "survived", "lost", title=f"seed {seed}, {minutes}:{seconds:02} min")
    for fault in FAULTS:
        if tries[fault]:
            table.add_row(fault, *map(str, (tries[fault], tries[fault] - lost[fault], lost[fault])))
    table.add_row("all", *map(str, (len(outcomes), len(outcomes) - lost.total(), lost.total())))
    Console(soft_wrap=True).print(table)
    for loss in sorted({outcome.loss for outcome in outcomes if outcome.loss}):
        print(loss, file=sys.stderr)
    return not lost
