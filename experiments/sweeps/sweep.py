"""A folder of runs, and the state of each run.

For each run, the folder contains its workdir NAME; `logs/NAME.log`, what it printed; `logs/NAME.failed`, why
it failed; and `logs/NAME.job`, its job on Slurm. Runs that train in one program print to one
`logs/pack-….log`. The workdir of a branch is `NAME/branches/LABEL`, and its logs are called `NAME+LABEL`.
`slurm/` belongs to submitit; `figures/` and `claims.md` are drawn from the runs.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from filelock import FileLock, Timeout

from experiments.sweeps.runs import AnyRun
from imp_jax import __version__, analysis, config_files
from imp_jax.errors import UserError
from imp_jax.workdir.checkpoints import versions

Finished = Mapping[AnyRun, analysis.Run]  # the tables of the runs that have a finished round


class State(NamedTuple):
    """The state of a run."""

    status: str  # done, running, queued (on Slurm), failed, or missing
    rounds: int  # number of finished rounds
    why: str = ""  # why it failed


class Sweep:
    """The runs in the folder `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.logs = root / "logs"

    def workdir(self, run: AnyRun) -> Path:
        """Return the path of a run's workdir."""
        return self.root / run.folder

    def log_path(self, run: AnyRun, ending: str = "log") -> Path:
        """Return the path of a run's file in `logs/` with this ending."""
        return self.logs / f"{run.name}.{ending}"

    def check_configs_match(self, runs: Iterable[AnyRun]) -> None:
        """Check that the workdirs of `runs` contain runs of these configs.

        Raises:
          UserError: a workdir has a run of another config, or of another version of this package. Runs of
            different versions should not be mixed in a figure.
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

    def read_states(self, runs: Iterable[AnyRun]) -> dict[AnyRun, State]:
        """Return the state of each run."""
        runs = list(runs)
        paths = {run: self.log_path(run, "job") for run in runs}
        jobs = {run: path.read_text() for run, path in paths.items() if path.exists()}
        queued = find_queued_jobs(jobs.values())
        return {run: self._read_state(run, jobs.get(run), queued) for run in runs}

    def load_finished(self, runs: Iterable[AnyRun]) -> Finished:
        """Load the tables of those `runs` that have at least one finished round."""
        finished = {}
        for run in runs:
            if (self.workdir(run) / "config.json").exists():
                tables = analysis.load(self.workdir(run))
                if len(tables.results):
                    finished[run] = tables
        return finished

    def describe_diverged(self, run: AnyRun) -> str:
        """Describe the networks of a run that diverged; empty if none did."""
        try:
            table = pd.read_csv(self.workdir(run) / "divergences.csv")
        except FileNotFoundError:
            return ""
        return ", ".join(f"{row.arm} {row.replicate} from round {row.round}" for row in table.itertuples())

    def _read_state(self, run, job, queued):
        workdir = self.workdir(run)
        results, report = workdir / "results.csv", workdir / "report.html"
        rounds = 0
        with contextlib.suppress(FileNotFoundError, pd.errors.EmptyDataError, ValueError):
            recorded = set(pd.read_csv(results)["round"])
            if run.needs and (workdir / "divergences.csv").exists():  # a branch leaves out diverged rounds
                recorded |= set(pd.read_csv(workdir / "divergences.csv")["round"])
            rounds = len(recorded)
        if _is_locked(workdir):
            return State("running", rounds)
        if job in queued:
            return State("queued", rounds)
        # the report is written last; an older one than the results is from an earlier analysis
        if rounds == run.rounds and report.exists() and report.stat().st_mtime >= results.stat().st_mtime:
            return State("done", rounds)
        if self.log_path(run, "failed").exists():
            return State("failed", rounds, self.log_path(run, "failed").read_text().strip())
        if job:
            return State("failed", rounds, f"job {job} is gone; its log is in {self.root / 'slurm'}")
        return State("missing", rounds)


def find_queued_jobs(jobs: Iterable[str]) -> set[str]:
    """Return those of this user's Slurm `jobs`, such as 12_3, that wait or run; none if there is no Slurm.

    Raises:
      UserError: squeue fails.
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
    """Return True if a process is working in `workdir`. Try the lock only if a process has left its name."""
    if not (workdir / ".holder").exists():
        return False
    try:
        with FileLock(workdir / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
