"""`experiments.faults`: a run that is repeatedly killed or damaged, and resumed."""

import subprocess
import sys
from pathlib import Path

import pytest


def run_faults(*arguments):
    """Run `python -m experiments.faults` with these arguments."""
    command = [sys.executable, "-m", "experiments.faults", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)


def test_a_run_survives_every_fault():
    """`--short` breaks a run seven times; its results should equal those of an undisturbed run bit for bit."""
    finished = run_faults("--short")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [line.split("│")[1:-1] for line in finished.stdout.splitlines() if line.startswith("│")]
    table = {fault.strip(): list(map(int, counts)) for fault, *counts in rows}
    assert table["SIGKILL while pruning"] == [1, 1, 0]  # tries, survived, lost
    assert table["all"] == [7, 7, 0]


@pytest.mark.parametrize("name", ["chains", "jobs"])
def test_bad_arguments_print_one_line(name):
    finished = run_faults(f"--{name}=0")
    assert finished.returncode == 1
    assert finished.stderr == f"error: --{name} is 0; it should be at least 1\n"
