"""A folder of runs: where each of them stands.

The folder holds a workdir for each run, by its name; `logs/NAME.log`, what it printed; `logs/NAME.failed`, why
it failed; `logs/NAME.job`, its job on Slurm; `slurm/`, of submitit; the drawn `figures/`; and `claims.md`.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from filelock import FileLock, Timeout

from experiments.paper.panels import Finished
from experiments.sweeps.runs import Run
from imp_jax import __version__, analysis, config_files
from imp_jax.errors import UserError
from imp_jax.workdir.checkpoints import versions


class State(NamedTuple):
    status: str  # done, running, queued (on Slurm), failed, or missing
    rounds: int  # finished
    why: str = ""  # it failed


class Sweep:
    """The runs in the folder `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.logs = root / "logs"

    def workdir(self, run: Run) -> Path:
        return self.root / run.name

    def log(self, run: Run, ending: str = "log") -> Path:
        return self.logs / f"{run.name}.{ending}"

    def check_configs_match(self, runs: Iterable[Run]) -> None:
        """
        Raises:
          UserError: under the name of one of `runs` there is a run of another config, or of another version
            of this package, with which figures should not be mixed.
        """
        for run in runs:
            stored = self.workdir(run) / "config.json"
            if not stored.exists():
                continue
            try:
                differences = config_files.differences(run.config, json.loads(stored.read_text()))
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"cannot read {stored} as a config; give another --root") from error
            differences += [f"it was written by imp_jax {v}" for v in versions(stored.parent) - {__version__}]
            if differences:
                raise UserError(
                    f"{stored.parent} holds a run of another config or version (this is imp_jax "
                    f"{__version__}): {'; '.join(differences)}; give another --root"
                )

    def states(self, runs: Iterable[Run]) -> dict[Run, State]:
        """Where each of `runs` stands."""
        runs = list(runs)
        jobs = {run: self.log(run, "job").read_text() for run in runs if self.log(run, "job").exists()}
        queued = in_queue(jobs.values())
        return {run: self._state(run, jobs.get(run), queued) for run in runs}

    def finished(self, runs: Iterable[Run]) -> Finished:
        """The tables of those of `runs` that have a round at least."""
        finished = {}
        for run in runs:
            if (self.workdir(run) / "config.json").exists():
                tables = analysis.load(self.workdir(run))
                if len(tables.results):
                    finished[run] = tables
        return finished

    def diverged(self, run: Run) -> str:
        """The networks of a run that diverged, in words; empty if none did."""
        try:
            table = pd.read_csv(self.workdir(run) / "divergences.csv")
        except FileNotFoundError:
            return ""
        return ", ".join(f"{row.arm} {row.replicate} from round {row.round}" for row in table.itertuples())

    def _state(self, run, job, queued):
        workdir = self.workdir(run)
        results, report = workdir / "results.csv", workdir / "report.html"
        rounds = 0
        with contextlib.suppress(FileNotFoundError, pd.errors.EmptyDataError, ValueError):
            rounds = int(pd.read_csv(results)["round"].max()) + 1
        if _is_locked(workdir):
            return State("running", rounds)
        if job in queued:
            return State("queued", rounds)
        # the report is written last of all, and may be left of an earlier analysis
        if (
            rounds == run.config.rounds
            and report.exists()
            and report.stat().st_mtime >= results.stat().st_mtime
        ):
            return State("done", rounds)
        if self.log(run, "failed").exists():
            return State("failed", rounds, self.log(run, "failed").read_text().strip())
        if job:
            return State("failed", rounds, f"job {job} is gone; its log is in {self.root / 'slurm'}")
        return State("missing", rounds)


def in_queue(jobs: Iterable[str]) -> set[str]:
    """Those of this user's Slurm `jobs`, such as 12_3, that wait or run; none where there is no Slurm.

    Raises:
      UserError: Slurm does not answer.
    """
    jobs = set(jobs)
    if not jobs or not shutil.which("squeue"):
        return set()
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(f"cannot tell which jobs are in Slurm's queue: {' '.join(listed.stderr.split())}")
    return jobs & set(listed.stdout.split())


def _is_locked(workdir):
    """Whether a process is at work in `workdir`; its lock is tried only where one has left its name."""
    if not (workdir / ".holder").exists():
        return False
    try:
        with FileLock(workdir / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
