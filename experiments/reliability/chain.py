"""A run that is broken by one fault after another: its processes, its file system, and its results."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.sweeps.runs import REPOSITORY
from imp_jax.workdir.checkpoints import Checkpoints

PROCESS_TIMEOUT_S = 120  # a process that takes longer counts as hung
FILE_SYSTEM_MIB = 64  # size of a file system with enough room
MOVED_NOTICE = "it is moved to"  # printed for each damaged checkpoint
SKIPPED_NOTICE = "is without"  # printed for a figure or an event file that cannot be written


class LostError(Exception):
    """Raised if a run did not survive a fault, with the reason."""


class Chain:
    """One run that is broken by one fault after another, on a file system of its own if it can be mounted.

    Attributes:
      rng: decides where the faults strike.
      folder: the mount point.
      workdir: the run's workdir, in `folder`.
      mounted: whether `folder` is a file system of its own.
    """

    def __init__(self, scratch: Path, name: str, fields: dict[str, object], seed: int):
        self.rng = random.Random(f"{seed} {name}")
        self.folder = scratch / name
        self.workdir = self.folder / "run"
        self._scratch, self._fields = scratch, fields
        self._stderr_files = []  # of all processes
        self.folder.mkdir()
        self.mounted = self._mount(f"size={FILE_SYSTEM_MIB}m")

    def start(self, *kill_at: str) -> subprocess.Popen:
        """Start or resume the run in a process.

        Args:
          kill_at: where the process kills itself, as arguments of `faulty_run`: a kind and a count.
        """
        fields = {**self._fields, "dataset.data_dir": self._scratch / "data"}
        module = ["experiments.reliability.faulty_run", *kill_at] if kill_at else ["imp_jax.main"]
        command = [sys.executable, "-m", *module, "--config=configs/mnist5k.py", f"--workdir={self.workdir}"]
        self._stderr_files.append(tempfile.TemporaryFile("w+", dir=self._scratch))  # noqa: SIM115
        return subprocess.Popen(
            [*command, *(f"--config.{name}={value}" for name, value in fields.items())],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=self._stderr_files[-1],
            text=True,
            env={**os.environ, **_make_cache_environment(self._scratch)},
        )

    def start_and_wait_for_training(self) -> subprocess.Popen:
        """Start the run, and wait until it trains or has ended."""
        process = self.start()
        if not any(" parameters, " in line for line in process.stdout):
            process.wait(PROCESS_TIMEOUT_S)
        return process

    def wait(self, process: subprocess.Popen) -> int:
        """Wait until a process has ended, and return its exit status."""
        try:
            process.communicate(timeout=PROCESS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise LostError(f"the process hung; stderr: {self.read_stderr()!r}") from None
        return process.returncode

    def read_stderr(self, index: int = -1) -> str:
        """Return what a process wrote to stderr, by default the latest one."""
        self._stderr_files[index].seek(0)
        return self._stderr_files[index].read()

    def expect(self, holds: bool, problem: str) -> None:
        """Raise a LostError with the problem unless the condition holds."""
        if not holds:
            raise LostError(f"{problem}; stderr: {self.read_stderr()!r}")

    def expect_refusal(self, process: subprocess.Popen, *phrases: str) -> None:
        """Expect that a process fails and prints one error message that contains one of the phrases."""
        status, printed = self.wait(process), self.read_stderr()
        self.expect(status == 1, f"exit status {status} where 1 was expected")
        self.expect_one_sentence()
        self.expect(any(phrase in printed for phrase in phrases), f"none of {phrases} was printed")

    def expect_one_sentence(self) -> None:
        """Expect one error message, apart from notices of earlier damage and of files that were skipped."""
        lines = [
            line
            for line in self.read_stderr().splitlines()
            if MOVED_NOTICE not in line and SKIPPED_NOTICE not in line
        ]
        self.expect(len(lines) == 1 and lines[0].startswith("error: "), "stderr is not one error message")

    def resize(self, mebibytes: float) -> None:
        """Remount the file system as writable, with this size."""
        subprocess.run(["mount", "-o", f"remount,rw,size={int(mebibytes * 1024)}k", self.folder], check=True)

    def make_read_only(self) -> None:
        """Remount the file system as read-only."""
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)

    def finish(self) -> dict[str, Any]:
        """Train the run to its end, and return its fingerprint."""
        self.expect(self.wait(self.start()) == 0, "the run could not be finished")
        moved = list(self.workdir.glob("set-aside/*"))
        notices = sum(self.read_stderr(i).count(MOVED_NOTICE) for i in range(len(self._stderr_files)))
        self.expect(notices == len(moved), f"{len(moved)} files were moved, but {notices} notices printed")
        return compute_fingerprint(self.workdir)

    def close(self) -> None:
        """Close files and unmount the file system."""
        for file in self._stderr_files:
            file.close()
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.folder], check=False)

    def _mount(self, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        mount = shutil.which("mount")
        return bool(mount) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def compute_fingerprint(workdir: Path) -> dict[str, Any]:
    """Return what a run computed, by name: results.csv without the seconds, tables, checksums of networks."""
    lines = (workdir / "results.csv").read_text().splitlines()
    fingerprint = {"results.csv": "\n".join(line.rpartition(",")[0] for line in lines)}
    for table in sorted((workdir / "analysis").glob("*.csv")):
        fingerprint[table.name] = pd.read_csv(table)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        for number in checkpoints.rounds():
            checkpoints.restore(number)  # compares the networks with their checksums
            version = json.loads((workdir / "checkpoints" / str(number) / "version" / "metadata").read_text())
            fingerprint[f"networks of round {number}"] = version["sha256"]["networks"]
    return fingerprint


def compare_fingerprints(expected: dict[str, Any], actual: dict[str, Any]) -> str:
    """Describe in which entries two fingerprints differ; empty if in none."""
    names = sorted(expected | actual)
    differences = {name: _describe_difference(expected.get(name), actual.get(name)) for name in names}
    return ", ".join(f"{name} ({difference})" for name, difference in differences.items() if difference)


def _describe_difference(expected, actual):
    """Describe how two entries differ, tables by more than rounding; empty if they do not."""
    if not isinstance(expected, pd.DataFrame) or not isinstance(actual, pd.DataFrame):
        return "" if type(expected) is type(actual) and expected == actual else "other content"
    try:
        pd.testing.assert_frame_equal(expected, actual, rtol=1e-5, atol=1e-6)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def _make_cache_environment(scratch):
    """Return environment variables by which all processes share one compilation cache."""
    return {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(scratch / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
