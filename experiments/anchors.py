"""Compare IMP, weight rewinding, learning-rate rewinding and one-shot pruning with published numbers.

    python -m experiments.anchors                  # ResNet-20 on CIFAR-10: 165 trainings, on a GPU
    python -m experiments.anchors --scale=smoke    # tiny networks: checks that the command works

Prints the cost, trains what is missing, and prints ours, theirs, the difference and a verdict for each number
of Renda, Frankle and Carbin 2020. The table is also written to `anchors.md` in the folder of the runs. The same
command continues after an interruption.
"""

import argparse
import os
import sys
from pathlib import Path

from absl import logging

from experiments.literature import anchors
from experiments.paper import commands
from experiments.sweeps import cost, launchers
from experiments.sweeps.sweep import Sweep
from imp_jax import cli
from imp_jax.errors import UserError, lookup, user_path
from imp_jax.runtime.distributed import visible_gpus
from imp_jax.workdir.files import write_atomically


def main() -> None:
    cli.replace_unprintable()
    parser = argparse.ArgumentParser(prog="python -m experiments.anchors", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", default="full", help="full, which needs a GPU, or smoke (default: full)")
    parser.add_argument("--root", help="folder of the runs (default: runs/anchors/SCALE)")
    parser.add_argument("--data_dir", help="folder of the data sets (default: ~/tensorflow_datasets)")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    try:
        compare_with_published(arguments.scale, arguments.root, arguments.data_dir)
    except UserError as error:
        sys.exit(f"error: {error}")
    except launchers.Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + interrupted.number)


def compare_with_published(scale_name: str, root: str | None, data_dir: str | None) -> None:
    """Train the runs of a scale, and print and write the table.

    Raises:
      UserError: a flag is wrong; `full` is asked for without a GPU; a run failed.
    """
    scale = lookup(anchors.SCALES, "--scale", scale_name)
    root = Path("runs", "anchors", scale_name) if root is None else user_path(root, "--root")
    if data_dir is not None:
        data_dir = str(user_path(data_dir, "--data_dir").absolute())
    sweep, runs = Sweep(root.absolute()), anchors.list_runs(scale)
    sweep.check_configs_match(runs)
    print(describe_cost(runs), flush=True)
    unfinished = [run for run, state in sweep.read_states(runs).items() if state.status != "done"]
    if scale.comparable and unfinished and not visible_gpus(os.environ):
        raise UserError("--scale=full needs a GPU, and there is none here; --scale=smoke trains tiny networks")
    failed = commands.train_locally(runs, sweep, data_dir)
    table = anchors.format_rows(anchors.compare(scale, sweep.load_finished(runs)))
    print(table)
    write_atomically(sweep.root / "anchors.md", table + "\n")
    print(f"anchors: {sweep.root / 'anchors.md'}")
    if failed:
        raise UserError(f"{failed} runs failed; what they printed is in {sweep.logs}")


def describe_cost(runs: list) -> str:
    """Describe how many trainings and images the runs have, and how long they take on measured devices."""
    images = sum(cost.count_images(run) for run in runs)
    words = (
        f"{len(runs)} runs, {sum(run.trainings for run in runs)} trainings, {images / 1e9:.2g} billion images"
    )
    times = []
    for name, device in cost.read_throughput().items():
        seconds = [cost.estimate_seconds(run, device) for run in runs]
        times.append(f"{name}: {cost.format_duration(None if None in seconds else sum(seconds))}")
    return f"{words}; estimated time on {', '.join(times)}"


if __name__ == "__main__":
    main()
