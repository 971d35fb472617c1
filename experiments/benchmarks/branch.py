"""Time the training of a branch beside that of a run: `python -m experiments.benchmark branch`.

A run of six members, three arms of two replicates, is timed in turn with a branch that trains as many arms on
all rounds, in the groups that `imp_jax.branch` makes. Compilation is timed apart. The peak memory of the
process is that after the first run and that after the first branch.
"""

import resource
import tempfile
from pathlib import Path

from experiments.benchmarks.tables import print_quantities
from experiments.benchmarks.whole_runs import make_mnist5k_config
from imp_jax import branch, runs

ARMS = ("shuffled", "signs", "random")
REPLICATES = 2


def benchmark_branch(rounds: int, repeats: int, epochs: int | None) -> None:
    """Train a run of `rounds` rounds; then time six members for two rounds, and a branch on all of them."""
    config = make_mnist5k_config(rounds, epochs)
    config.replicates, config.instability.rounds = REPLICATES, ()
    beside = config.copy_and_resolve_references()
    beside.rounds, beside.arms = 2, ("imp", "reinit", ARMS[0])
    run_rates, branch_rates, compile_times, memory = [], [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        trunk = Path(folder) / "trunk"
        runs.run(config, trunk)
        for i in range(repeats):
            ends = []
            runs.run(beside, Path(folder) / f"run{i}", on_epoch=[ends.append])
            run_rates.append(_images_per_second(ends, config.batch_size))
            memory.setdefault("run", _peak_bytes())
            ends = []
            branch.run(trunk, ARMS, name=f"branch{i}", on_epoch=[ends.append])
            branch_rates.append(_images_per_second(ends, config.batch_size))
            compile_times.append(sum(end.compile_seconds for end in ends))
            memory.setdefault("branch", _peak_bytes())
    members = len(ARMS) * REPLICATES * rounds
    print_quantities(
        f"configs/mnist5k.py, {len(ARMS) * REPLICATES} members of a run and {members} of a branch",
        {
            "images/s, all members, run": (run_rates, "{:,.0f}"),
            "images/s, all members, branch": (branch_rates, "{:,.0f}"),
            "branch × run": ([b / a for a, b in zip(run_rates, branch_rates, strict=True)], "{:.2f}"),
            "compilation of a branch (s)": (compile_times, "{:.1f}"),
            "peak memory of the process after a run (GB)": ([memory["run"] / 1e9], "{:.2f}"),
            "peak memory of the process after a branch (GB)": ([memory["branch"] / 1e9], "{:.2f}"),
        },
    )


def _images_per_second(ends, batch_size):
    """Return the images/s of all members, without compilation; the first call warms up."""
    timed = ends[1:] or ends
    return sum(end.metrics.loss.size for end in timed) * batch_size / sum(end.seconds for end in timed)


def _peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB on Linux
