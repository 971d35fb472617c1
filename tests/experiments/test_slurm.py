"""A sweep on a real Slurm of one node."""

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
    """The environment of a Slurm that runs."""
    with slurm.running(tmp_path_factory.mktemp("slurm")) as environment:
        yield os.environ | environment


def experiments_run(cluster, *arguments):
    command = [sys.executable, "-m", "experiments.run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, check=False)


def test_a_job_that_is_stopped_is_requeued_and_goes_on(cluster, data_dir, tmp_path, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster[name])
    sweep = Sweep(tmp_path / "sweep")
    asked = ("fig14", "--scale=smoke", f"--root={sweep.root}", f"--data_dir={data_dir}")
    options = ("--launcher=slurm", "--gpus=0", "--cpus=1", "--timeout_min=10")
    submitted = experiments_run(cluster, "run", *asked, *options)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.count("job 1_") == 2
    runs = FIGURES["fig14"].runs(SMOKE)
    assert {state.status for state in sweep.read_states(runs).values()} <= {"queued", "running"}
    again = experiments_run(cluster, "run", *asked, *options)
    assert "0 runs to train" in again.stdout  # not handed in twice

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
    drawn = experiments_run(cluster, "figure", *asked)
    assert "lacks" not in drawn.stdout
    assert (sweep.root / "figures" / "fig14.png").exists()


def test_what_slurm_rejects_is_said_once_in_its_own_words(cluster, data_dir, tmp_path):
    options = ("--launcher=slurm", "--gpus=0", "--partition=absent", f"--data_dir={data_dir}")
    refused = experiments_run(cluster, "run", "fig18", "--scale=smoke", f"--root={tmp_path}", *options)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: Slurm rejects the jobs: invalid partition specified: absent")
    assert len(refused.stderr.splitlines()) == 1


def test_the_tasks_of_srun_train_together(cluster, data_dir, tmp_path):
    command = ["srun", "--ntasks=2", "--overcommit", "--label", sys.executable, "-m", "imp_jax.main"]
    command += ["--config=configs/mnist5k.py", f"--workdir={tmp_path / 'run'}", "--config.batch_size=500"]
    command += ["--config.rounds=1", "--config.epochs=1", f"--config.dataset.data_dir={data_dir}"]
    environment = cluster | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0: mesh 2 × 1 (member × data) on 2 of 2 devices of 2 processes" in done.stdout
    assert "1: round" not in done.stdout
    assert (tmp_path / "run" / "report.html").exists()


def wait_until(ready, seconds=240):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)
