"""The faults: each breaks a chain's run once, and returns False if it came too late to do so."""

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from experiments.reliability.chain import FILE_SYSTEM_MIB, Chain

STOP_LIMIT_S = 30  # a run that takes longer to stop after a signal is lost


def kill_at_any_time(chain: Chain) -> bool:
    """Send SIGKILL within 1.5 s after the training has started."""
    process = chain.start_and_wait_for_training()
    time.sleep(chain.rng.uniform(0, 1.5))
    process.kill()
    return chain.wait(process) != 0


def kill_while_writing(chain: Chain) -> bool:
    """Kill the process before one of its first 120 file operations."""
    return chain.wait(chain.start("write", str(chain.rng.randint(1, 120)))) != 0


def kill_while_pruning(chain: Chain) -> bool:
    """Kill the process after one of its first three prunings."""
    return chain.wait(chain.start("prune", str(chain.rng.randint(1, 3)))) != 0


def send_stop_signal(chain: Chain) -> bool:
    """Send a signal, and expect that the run stops soon and prints that it did."""
    number = chain.rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    process = chain.start_and_wait_for_training()
    time.sleep(chain.rng.uniform(0, 1.5))
    start = time.monotonic()
    process.send_signal(number)
    status = chain.wait(process)
    chain.expect(status in (0, 128 + number), f"exit status {status} after {number.name}")
    chain.expect(time.monotonic() - start < STOP_LIMIT_S, f"it took more than {STOP_LIMIT_S} s to stop")
    printed = chain.read_stderr()
    phrases = (f"stopped by {number.name}", f"stopped at once by {number.name}")  # during training, or outside
    chain.expect(status == 0 or any(phrase in printed for phrase in phrases), "it did not print its stop")
    return status != 0


def send_two_signals(chain: Chain) -> bool:
    """Send SIGTERM and, up to 50 ms later, SIGINT."""
    process = chain.start_and_wait_for_training()
    time.sleep(chain.rng.uniform(0, 1))
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(chain.rng.uniform(0, 0.05))
    return chain.wait(process) != 0


def fill_disk(chain: Chain) -> bool:
    """Let the disk become full, or limit the size of files, and expect one error message."""
    try:
        if chain.mounted:
            used = sum(path.lstat().st_blocks * 512 for path in chain.folder.rglob("*")) / 2**20
            chain.resize(used + chain.rng.uniform(0.05, 1.5))
            process = chain.start()
        else:
            process = chain.start_and_wait_for_training()
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**15, 2**15))
        if (status := chain.wait(process)) != 0:
            printed = chain.read_stderr()
            chain.expect(status == 1, f"exit status {status} with a full disk")
            chain.expect_one_sentence()
            chain.expect("No space left" in printed or "File too large" in printed, "the cause was not printed")
        return status != 0
    finally:
        if chain.mounted:
            chain.resize(FILE_SYSTEM_MIB)


def make_read_only(chain: Chain) -> bool:
    """Make the file system read-only, or the folders, and expect that the run refuses to start."""
    if not chain.mounted and os.geteuid() == 0:
        return False  # root may write into read-only folders
    chain.workdir.mkdir(exist_ok=True)
    if chain.mounted:
        chain.make_read_only()
    else:
        _set_permissions(chain.workdir, 0o555)
    try:
        chain.expect_refusal(chain.start(), "Read-only file system", "Permission denied")
    finally:
        if chain.mounted:
            chain.resize(FILE_SYSTEM_MIB)
        else:
            _set_permissions(chain.workdir, 0o755)
    return True


def start_twice(chain: Chain) -> bool:
    """Start the run while another process trains it, and expect that the second one refuses."""
    first = chain.start_and_wait_for_training()
    alive = first.poll() is None
    try:
        if alive:
            first.send_signal(signal.SIGSTOP)  # otherwise it may end before the second one has started
            chain.expect_refusal(chain.start(), f"process {first.pid} on ")
    finally:
        first.kill()
        first.communicate()
    return alive


def tear_results(chain: Chain) -> bool:
    """Truncate results.csv."""
    path = chain.workdir / "results.csv"
    if not path.exists():
        return False
    _truncate(path, chain.rng)
    return True


def _make_damage(change: Callable[[Path, random.Random], None]) -> Callable[[Chain], bool]:
    """Return a fault that changes a file of the newest checkpoint or of the state within a round."""

    def damage_checkpoint(chain: Chain) -> bool:
        folders = [_find_newest(chain.workdir / name) for name in ("checkpoints", "progress")]
        files = [_list_files(folder) for folder in folders if folder]
        if not files:
            return False
        change(chain.rng.choice(chain.rng.choice(files)), chain.rng)
        return True

    return damage_checkpoint


def _find_newest(folder):
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / str(max(steps)) if steps else None


def _list_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def _flip_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _delete(path, rng):
    path.unlink()


def _set_permissions(workdir, mode):
    for folder in [workdir, *workdir.rglob("*/")]:
        folder.chmod(mode)


FAULTS = {
    "SIGKILL at any time": kill_at_any_time,
    "SIGKILL between two file operations": kill_while_writing,
    "SIGKILL while pruning": kill_while_pruning,
    "SIGTERM, SIGINT or SIGUSR1": send_stop_signal,
    "a second signal": send_two_signals,
    "disk full": fill_disk,
    "read-only file system": make_read_only,
    "two processes on one workdir": start_twice,
    "file of the newest checkpoint truncated": _make_damage(_truncate),
    "a bit of the newest checkpoint flipped": _make_damage(_flip_bit),
    "file of the newest checkpoint deleted": _make_damage(_delete),
    "results.csv torn": tear_results,
}
