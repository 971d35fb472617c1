import subprocess
import sys
from pathlib import Path


def test_the_lenet_benchmark_prints_its_table():
    command = [sys.executable, "-m", "experiments.benchmark", "lenet", "--rounds=1"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for quantity in (
        "all members, whole round",
        "share of a round not training",
        "compilation",
        "peak host memory",
    ):
        assert quantity in done.stdout
