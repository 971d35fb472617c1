"""Sweeps on a real Slurm cluster of one node."""

import os
import subprocess
import sys
import time

import pytest

from experiments.paper.catalogue import FIGURES
from experiments.paper.scales import SMOKE
from experiments.sweeps.sweep import Sweep
from tests.helpers import ROOT, slurm

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=f"no Slurm here: {slurm.missing()}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start Slurm; return the environment variables with which commands find it."""
    with slurm.running(tmp_path_factory.mktemp("slurm")) as environment:
        yield os.environ | environment


def run_experiments(cluster, *arguments):
    """Run `python -m experiments.run` with these arguments on the cluster."""
    command = [sys.executable, "-m", "experiments.run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, check=False)


def test_a_stopped_job_is_requeued_and_resumes(cluster, data_dir, tmp_path, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster[name])
    sweep = Sweep(tmp_path / "sweep")
    arguments = ("fig14", "--scale=smoke", f"--root={sweep.root}", f"--data_dir={data_dir}")
    options = ("--launcher=slurm", "--gpus=0", "--cpus=1", "--timeout_min=10")
    submitted = run_experiments(cluster, "run", *arguments, *options)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.count("job 1_") == 2
    runs = FIGURES["fig14"].runs(SMOKE)
    assert {state.status for state in sweep.read_states(runs).values()} <= {"queued", "running"}
    resubmitted = run_experiments(cluster, "run", *arguments, *options)
    assert "0 runs to train" in resubmitted.stdout  # no job is submitted twice

    first, _ = runs
    wait_until(lambda: (sweep.workdir(first) / "results.csv").exists())
    subprocess.run(
        ["scancel", "--signal=USR2", sweep.log_path(first, "job").read_text()], env=cluster, check=True
    )
    wait_until(lambda: {state.status for state in sweep.read_states(runs).values()} == {"done"})
    log = sweep.log_path(first).read_text()
    assert "stopped at once by SIGUSR1" in log or "SIGUSR1: stopping where the run can be resumed" in log
    assert log.count("report: ") == 1
    job = ["scontrol", "show", "job", sweep.log_path(first, "job").read_text()]
    shown = subprocess.run(job, env=cluster, capture_output=True, text=True, check=True).stdout
    assert "Restarts=1" in shown
    drawing = run_experiments(cluster, "figure", *arguments)
    assert "lacks" not in drawing.stdout
    assert (sweep.root / "figures" / "fig14.png").exists()


def test_a_job_that_slurm_rejects_is_reported_in_one_line(cluster, data_dir, tmp_path):
    options = ("--launcher=slurm", "--gpus=0", "--partition=absent", f"--data_dir={data_dir}")
    refused = run_experiments(cluster, "run", "fig18", "--scale=smoke", f"--root={tmp_path}", *options)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: Slurm rejects the jobs: invalid partition specified: absent")
    assert len(refused.stderr.splitlines()) == 1


def test_the_tasks_of_srun_train_one_run_together(cluster, data_dir, tmp_path):
    command = ["srun", "--ntasks=2", "--overcommit", "--label", sys.executable, "-m", "imp_jax.main"]
    command += ["--config=configs/mnist5k.py", f"--workdir={tmp_path / 'run'}", "--config.batch_size=500"]
    command += ["--config.rounds=1", "--config.epochs=1", f"--config.dataset.data_dir={data_dir}"]
    environment = cluster | {"JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "0: mesh 2 × 1 (member × data) on 2 of 2 devices of 2 processes" in finished.stdout
    assert "1: round" not in finished.stdout
    assert (tmp_path / "run" / "report.html").exists()


def wait_until(ready, seconds=240):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)
