"""How fast the main job runs on this machine: `python -m experiments.benchmark lenet`.

Timed is the real thing, `imp.rounds` of a config into a temporary workdir: from the end of one round on disk
to the end of the next, evaluation, checkpoint, results and figure included.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from absl import logging

CONFIGS = {"lenet": "mnist5k.py"}


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__)
    parser.add_argument("network", choices=CONFIGS)
    parser.add_argument(
        "--rounds", type=int, default=8, help="timed rounds, after the one that compiles (default: 8)"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        sys.exit(f"error: --rounds is {arguments.rounds}; it should be at least 1")
    logging.set_verbosity(logging.ERROR)
    benchmark(arguments.network, arguments.rounds)


def benchmark(network: str, timed_rounds: int) -> None:
    """Time `timed_rounds` rounds of the network's config and print the table."""
    import jax
    from ml_collections import config_flags
    from rich.console import Console
    from rich.table import Table

    from imp_jax import data, imp

    path = Path(__file__).parent.parent / "configs" / CONFIGS[network]
    config = config_flags.config_flags.ConfigFileFlagParser("config").parse(str(path))
    with config.unlocked():
        config.rounds = timed_rounds + 1
    examples = len(data.load(config.dataset.name, config.dataset.data_dir).train_labels)
    members = len(config.arms) * config.replicates
    images = members * config.epochs * (examples // config.batch_size) * config.batch_size

    rounds, trainings = [], []
    with tempfile.TemporaryDirectory() as workdir:
        start = time.perf_counter()
        for rows in imp.rounds(config, workdir):
            end = time.perf_counter()
            rounds.append(end - start)
            trainings.append(rows[0]["seconds"])
            start = end
    first, *rounds = rounds
    fixed = [1 - training / whole for training, whole in zip(trainings[1:], rounds, strict=True)]

    device = jax.devices()[0]
    table = Table(
        "quantity",
        "median",
        "min",
        "max",
        title=f"{path.name}, {members} members on {device.device_kind}, JAX {jax.__version__}",
    )

    def add(name, values, pattern):
        table.add_row(name, *[pattern.format(f(values)) for f in (statistics.median, min, max)])

    add("images/s over all members, whole round", [images / seconds for seconds in rounds], "{:,.0f}")
    add(
        "images/s over all members, training alone",
        [images / seconds for seconds in trainings[1:]],
        "{:,.0f}",
    )
    add("seconds a round", rounds, "{:.2f}")
    add("share of evaluation, checkpoint, results, figure", fixed, "{:.1%}")
    table.add_row("start, data and compile, seconds", f"{first - statistics.median(rounds):.2f}", "", "")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table.add_row("peak host memory, GB", f"{peak:.2f}", "", "")
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
