"""Time a round of `--scale=midi`, before and after a change: `python -m experiments.benchmark midi`.

Rounds of configs/resnet8_scenes.py are trained and analysed, in turn with this version and with the commit
`--base`, each in a process of its own. The default is the last commit before the points of a path were divided
over the cores. A round includes training, evaluation, pruning, checkpoint and all analyses that a run makes by
default; start and compilation are left out.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.benchmarks.tables import print_quantities
from experiments.sweeps.runs import REPOSITORY
from imp_jax.errors import UserError

BASE = "a1034ba"  # the last commit before the points of a path were divided over the cores
CONFIG = REPOSITORY / "configs" / "resnet8_scenes.py"
WORKER = Path(__file__).with_name("round_worker.py")


def benchmark_midi(rounds: int, repeats: int, base: str, epochs: int | None = None) -> None:
    """Time rounds of this version and of the commit `base` in turn, and print their ratio.

    Args:
      rounds: number of timed rounds of each run.
      repeats: runs of each version.
      base: a commit of this repository.
      epochs: of each training; None for those of the config.

    Raises:
      UserError: there is no such commit, or a process failed.
    """
    with _checked_out(base) as base_tree:
        trees = {f"before, {base}": base_tree, "after": REPOSITORY}
        parts = {name: [] for name in trees}
        for _ in range(repeats):
            for name, tree in trees.items():
                parts[name].append(_time_in_process(tree, rounds, epochs))
    totals = {name: [part["round"] + part["analyses"] for part in values] for name, values in parts.items()}
    quantities = {}
    for name, values in parts.items():
        quantities |= {
            f"training and recording of a round, {name} (s)": ([part["round"] for part in values], "{:.1f}"),
            f"analyses of a round, {name} (s)": ([part["analyses"] for part in values], "{:.1f}"),
            f"whole round, {name} (s)": (totals[name], "{:.1f}"),
            f"peak memory, {name} (GiB)": ([part["peak_gib"] for part in values], "{:.2f}"),
        }
    before, after = totals.values()
    quantities["whole round, before / after"] = (
        [old / new for old, new in zip(before, after, strict=True)],
        "{:.2f}",
    )
    print_quantities(f"a round of configs/{CONFIG.name}", quantities, memory=False)


@contextlib.contextmanager
def _checked_out(commit: str) -> Iterator[Path]:
    """Check out a commit into a temporary folder, and yield the folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        add = [*git, "add", "--detach", tree, commit]
        done = subprocess.run(add, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = "".join(done.stderr.strip().splitlines()[-1:])
            raise UserError(
                f"--base is {commit!r}, which cannot be checked out ({reason}); it should be a commit of this "
                "repository, which must have been cloned with its history"
            )
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], capture_output=True, check=False)


def _time_in_process(tree: Path, rounds: int, epochs: int | None) -> dict[str, float]:
    """Run `round_worker.py` of this version with the package `imp_jax` of `tree`, and return its result."""
    command = [sys.executable, "-P", str(WORKER), str(CONFIG), str(rounds), str(epochs or 0)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise UserError(f"the run of {tree} failed; its messages are above")
    return json.loads(done.stdout.splitlines()[-1])
