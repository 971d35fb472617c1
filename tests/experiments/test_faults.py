import subprocess
import sys
from pathlib import Path

import pytest


def faults(*arguments):
    command = [sys.executable, "-m", "experiments.faults", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)


def test_a_run_survives_whatever_is_done_to_it():
    """The short version: a run of the real command, broken seven times, ends in the bits of one left alone."""
    done = faults("--short")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    table = {fault.strip(): list(map(int, counts)) for fault, *counts in rows}
    assert len(table) == 8
    assert table["SIGKILL while pruning"] == [1, 1, 0]
    tries, survived, lost = table["all"]
    assert (tries, lost) == (survived, 0)
    assert tries >= 5  # a fault may come too late to break anything


@pytest.mark.parametrize("name", ["chains", "jobs"])
def test_bad_arguments_are_one_sentence(name):
    done = faults(f"--{name}=0")
    assert done.returncode == 1
    assert done.stderr == f"error: --{name} is 0; it should be at least 1\n"
