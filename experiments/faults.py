"""Faults, injected for real: `python -m experiments.faults` breaks runs in every way it can, and compares.

The real command trains a small network on mnist5k, in a process of its own. It is killed, interrupted, starved
of disk or given damaged files, and started again, fault after fault, until the run is finished. What it has
come to is then compared with a run that nothing has happened to: results, masks and weights bit for bit, the
analyses to rounding, as distances are computed of all rounds that are at hand. It needs Linux.

Full disks and read-only file systems need a file system of their own, a tmpfs, which root may mount; elsewhere
a limit on the size of files and the permissions of folders stand in for them.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.reliability.faulty_run import SIZE, Chain, LostError, difference

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
# --- the faults: each breaks a chain's run once; False if it came too late to do so ---


def kill_at_any_time(chain: Chain) -> bool:
    process = chain.training()
    time.sleep(chain.draw.uniform(0, 1.5))
    process.kill()
    return chain.end(process) != 0


def kill_while_writing(chain: Chain) -> bool:
    return chain.end(chain.start("write", str(chain.draw.randint(1, 120)))) != 0


def kill_while_pruning(chain: Chain) -> bool:
    return chain.end(chain.start("prune", str(chain.draw.randint(1, 3)))) != 0


def signal_to_stop(chain: Chain) -> bool:
    number = chain.draw.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    process = chain.training()
    time.sleep(chain.draw.uniform(0, 1.5))
    start = time.monotonic()
    process.send_signal(number)
    status = chain.end(process)
    chain.expect(status in (0, 128 + number), f"exit status {status} after {number.name}")
    chain.expect(time.monotonic() - start < 30, "it took more than 30 s to stop")
    said = chain.said()
    words = (f"stopped by {number.name}", f"stopped at once by {number.name}")  # in its training, or outside
    chain.expect(status == 0 or any(word in said for word in words), "it did not say so")
    return status != 0


def two_signals(chain: Chain) -> bool:
    process = chain.training()
    time.sleep(chain.draw.uniform(0, 1))
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(chain.draw.uniform(0, 0.05))
    return chain.end(process) != 0


def full_disk(chain: Chain) -> bool:
    try:
        return _full_disk(chain)
    finally:
        if chain.mounted:
            chain.set_size(SIZE)


def _full_disk(chain):
    if chain.mounted:
        used = sum(path.lstat().st_blocks * 512 for path in chain.folder.rglob("*")) / 2**20
        chain.set_size(used + chain.draw.uniform(0.05, 1.5))
        process = chain.start()
    else:
        process = chain.training()
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**15, 2**15))
    if chain.end(process) != 0:
        said = chain.said()
        chain.expect(process.returncode == 1, f"exit status {process.returncode} of a full disk")
        chain.expect_one_sentence()
        chain.expect("No space left" in said or "File too large" in said, "the cause was not said")
    return process.returncode != 0


def read_only(chain: Chain) -> bool:
    if not chain.mounted and os.geteuid() == 0:
        return False  # permissions do not keep root from writing
    chain.workdir.mkdir(exist_ok=True)
    if chain.mounted:
        chain.set_read_only()
    else:
        for folder in [chain.workdir, *chain.workdir.rglob("*/")]:
            folder.chmod(0o555)
    try:
        chain.refused(chain.start(), "Read-only file system", "Permission denied")
    finally:
        if chain.mounted:
            chain.set_size(SIZE)
        else:
            for folder in [chain.workdir, *chain.workdir.rglob("*/")]:
                folder.chmod(0o755)
    return True


def two_at_once(chain: Chain) -> bool:
    first = chain.training()
    alive = first.poll() is None
    try:
        if alive:
            first.send_signal(signal.SIGSTOP)  # or it may end before the other has begun
            chain.refused(chain.start(), f"process {first.pid} on ")
    finally:
        first.kill()
        first.communicate()
    return alive


def _damage(change: Callable[[Path, random.Random], None]) -> Callable[[Chain], bool]:
    def fault(chain: Chain) -> bool:
        folders = [_newest(chain.workdir / name) for name in ("checkpoints", "progress")]
        files = [sorted(_files(folder)) for folder in folders if folder]
        if not files:
            return False
        change(chain.draw.choice(chain.draw.choice(files)), chain.draw)
        return True

    return fault


def _newest(folder):
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / str(max(steps)) if steps else None


def _files(folder):
    return (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _truncate(path, draw):
    os.truncate(path, draw.randrange(path.stat().st_size))


def _flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _delete(path, draw):
    path.unlink()


def tear_results(chain: Chain) -> bool:
    path = chain.workdir / "results.csv"
    if not path.exists():
        return False
    _truncate(path, chain.draw)
    return True


FAULTS = {
    "SIGKILL at any time": kill_at_any_time,
    "SIGKILL between two file operations": kill_while_writing,
    "SIGKILL while pruning": kill_while_pruning,
    "SIGTERM, SIGINT or SIGUSR1": signal_to_stop,
    "a second signal": two_signals,
    "disk full": full_disk,
    "read-only file system": read_only,
    "two at once": two_at_once,
    "file of the newest checkpoint truncated": _damage(_truncate),
    "a bit of the newest checkpoint flipped": _damage(_flip),
    "file of the newest checkpoint deleted": _damage(_delete),
    "results.csv torn": tear_results,
}
SHORT = [  # a chain for the tests
    "SIGKILL between two file operations",
    "disk full",
    "a bit of the newest checkpoint flipped",
    "SIGTERM, SIGINT or SIGUSR1",
    "file of the newest checkpoint truncated",
    "read-only file system",
    "SIGKILL while pruning",
]
CHAIN = [  # killed most often
    "SIGKILL at any time",
    "SIGKILL between two file operations",
    "SIGKILL while pruning",
    *FAULTS,
]


def run_chain(
    scratch: Path,
    name: str,
    fields: dict[str, object],
    seed: int,
    faults: list[str],
    undisturbed: dict[str, Any],
) -> list[tuple[str, str]]:
    """Break one run by `faults`, finish it and compare; what became of each, "" if it survived."""
    chain = Chain(scratch, name, fields, seed)
    outcomes = []
    try:
        for fault in faults:
            try:
                if FAULTS[fault](chain):
                    outcomes.append((fault, ""))
            except LostError as lost:
                outcomes.append((fault, f"{name}: {lost}"))
        try:
            found = chain.finish()
            keys = sorted(undisturbed | found)
            compared = {key: difference(undisturbed.get(key), found.get(key)) for key in keys}
            differ = [f"{key} ({words})" for key, words in compared.items() if words]
            outcome = f"{name}: in the end other {', '.join(differ)}" if differ else ""
        except LostError as lost:
            outcome = f"{name}: {lost}"
        if outcome:  # any of them may have done it
            outcomes = [(fault, said or outcome) for fault, said in outcomes]
    finally:
        chain.close()
    return outcomes


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chains", type=int, default=8, help="runs to break, 15 times each (default: 8)")
    parser.add_argument("--short", action="store_true", help="one run, broken 7 times")
    parser.add_argument("--seed", type=int, default=0, help="of where the faults hit (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    arguments = parser.parse_args()
    for name in ("chains", "jobs"):
        if getattr(arguments, name) < 1:
            sys.exit(f"error: --{name} is {getattr(arguments, name)}; it should be at least 1")

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        scratch = Path(scratch).resolve()
        settings, undisturbed, chains = [SHORT_FIELDS], [], []
        if not arguments.short:
            settings = [{**FIELDS, "keep_checkpoints": keep} for keep in ("all", "ends")]
        for i, fields in enumerate(settings):
            with contextlib.closing(Chain(scratch, f"undisturbed-{i}", fields, arguments.seed)) as chain:
                undisturbed.append(chain.finish())
        for i in range(1 if arguments.short else arguments.chains):
            faults, which = list(SHORT if arguments.short else CHAIN), i % len(settings)
            if not arguments.short:
                random.Random(f"{arguments.seed} {i}").shuffle(faults)
            order = (scratch, f"chain-{i}", settings[which], arguments.seed, faults, undisturbed[which])
            chains.append(pool.submit(run_chain, *order))
        outcomes = [outcome for chain in chains for outcome in chain.result()]
    tries, lost = Counter(fault for fault, _ in outcomes), Counter(fault for fault, said in outcomes if said)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    table = Table(
        "fault", "tries", "survived", "lost", title=f"seed {arguments.seed}, {minutes}:{seconds:02} min"
    )
    for fault in FAULTS:
        if tries[fault]:
            table.add_row(fault, *map(str, (tries[fault], tries[fault] - lost[fault], lost[fault])))
    table.add_row("all", *map(str, (len(outcomes), len(outcomes) - lost.total(), lost.total())))
    Console(soft_wrap=True).print(table)
    for said in sorted({said for _, said in outcomes if said}):
        print(said, file=sys.stderr)
    if lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
