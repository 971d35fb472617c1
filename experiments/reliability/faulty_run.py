"""A run to be broken, for `experiments.faults`: its processes, its file system, and what it comes to."""

import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from imp_jax.workdir.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds, after which a process counts as hung
SIZE = 64  # MiB of a file system with room


class LostError(Exception):
    """A run did not survive a fault; says how."""


class Chain:
    """One run, broken again and again."""

    def __init__(self, scratch: Path, name: str, fields: dict[str, object], seed: int):
        self.draw = random.Random(f"{seed} {name}")
        self.folder = scratch / name
        self.workdir = self.folder / "run"
        self._scratch, self._fields = scratch, fields
        self._said = []  # on stderr, by all processes
        self.folder.mkdir()
        self.mounted = self._mount(f"size={SIZE}m")

    def start(self, *victim: str) -> subprocess.Popen:
        """Start the command; as a `victim` of a kind and a count, if they are given."""
        fields = {**self._fields, "dataset.data_dir": self._scratch / "data"}
        module = ["experiments.reliability.faulty_run", *victim] if victim else ["imp_jax.main"]
        command = [sys.executable, "-m", *module, "--config=configs/mnist5k.py", f"--workdir={self.workdir}"]
        self._said.append(tempfile.TemporaryFile("w+", dir=self._scratch))  # noqa: SIM115
        return subprocess.Popen(
            [*command, *(f"--config.{name}={value}" for name, value in fields.items())],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._said[-1],
            text=True,
            env={**os.environ, **_cache(self._scratch)},
        )

    def training(self) -> subprocess.Popen:
        """Start the command, and wait until it trains, or has ended."""
        process = self.start()
        if not any(" parameters, " in line for line in process.stdout):
            process.wait(PATIENCE)
        return process

    def end(self, process: subprocess.Popen) -> int:
        """Wait until it has ended; returns its exit status."""
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise LostError(f"it hung; it had said {self.said()!r}") from None
        return process.returncode

    def said(self, of: int = -1) -> str:
        """What the latest process wrote to stderr."""
        self._said[of].seek(0)
        return self._said[of].read()

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise LostError(f"{what}; it said {self.said()!r}")

    def refused(self, process: subprocess.Popen, *words: str) -> None:
        """Expect one sentence with one of `words`, and a failure."""
        status, said = self.end(process), self.said()
        self.expect(status == 1, f"exit status {status} where 1 was expected")
        self.expect_one_sentence()
        self.expect(any(word in said for word in words), f"none of {words} was said")

    def expect_one_sentence(self) -> None:
        """Beside those that tell of an earlier damage, or of a figure or an event file that is not written."""
        others = ("it is moved to", "is without")
        lines = [line for line in self.said().splitlines() if not any(word in line for word in others)]
        self.expect(len(lines) == 1 and lines[0].startswith("error: "), "not one sentence")

    def set_size(self, mebibytes: float) -> None:
        subprocess.run(["mount", "-o", f"remount,rw,size={int(mebibytes * 1024)}k", self.folder], check=True)

    def set_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)

    def finish(self) -> dict[str, Any]:
        """Run to the end; what it has come to."""
        self.expect(self.end(self.start()) == 0, "the run could not be finished")
        aside = list(self.workdir.glob("set-aside/*"))
        sentences = sum(self.said(i).count("it is moved to") for i in range(len(self._said)))
        self.expect(sentences == len(aside), f"{len(aside)} checkpoints were moved, {sentences} said to be")
        return fingerprint(self.workdir)

    def close(self) -> None:
        for file in self._said:
            file.close()
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.folder], check=False)

    def _mount(self, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        mount = shutil.which("mount")
        return bool(mount) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def fingerprint(workdir: Path) -> dict[str, Any]:
    """What a run has come to, but for the seconds it took: rows, checksums of networks, tables."""
    lines = (workdir / "results.csv").read_text().splitlines()
    found = {"results.csv": "\n".join(line.rpartition(",")[0] for line in lines)}
    for table in sorted((workdir / "analysis").glob("*.csv")):
        found[table.name] = pd.read_csv(table)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        for number in checkpoints.rounds():
            checkpoints.restore(number)  # that they hold what their checksums say
            version = json.loads((workdir / "checkpoints" / str(number) / "version" / "metadata").read_text())
            found[f"networks of round {number}"] = version["sha256"]["networks"]
    return found


def difference(one: Any, other: Any) -> str:
    """How two entries of fingerprints differ, tables by more than rounding; empty if they do not."""
    if not isinstance(one, pd.DataFrame) or not isinstance(other, pd.DataFrame):
        return "" if type(one) is type(other) and one == other else "other content"
    try:
        pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-6)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def _cache(scratch):
    """What the processes compile alike is compiled once."""
    return {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(scratch / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def victim(kind: str, count: int, arguments: list[str]) -> None:
    """Be the command, and be killed before the `count`-th file operation in the workdir, or by a pruning."""
    workdir = next(a.partition("=")[2] for a in arguments if a.startswith("--workdir="))

    def one_less():
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_operation(event, details):
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (changes or writes) and str(details[0]).startswith(workdir):
            one_less()

    if kind == "write":
        sys.addaudithook(before_operation)
    else:
        from imp_jax import imp

        prune = imp.prune

        def prune_and_count(*args):
            pruned = prune(*args)
            one_less()
            return pruned

        imp.prune = prune_and_count
    sys.argv = ["imp_jax.main", *arguments]
    runpy.run_module("imp_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    victim(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
