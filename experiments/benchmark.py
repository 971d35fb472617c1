"""How fast the main job runs on this machine: `python -m experiments.benchmark lenet`.

Timed is the real thing, `imp.rounds` of a config into a temporary workdir, from one round to the next:
training, evaluation, pruning, checkpoint, results and figure. Recording goes on beside the next training,
so the CPU time it takes from that training counts as training.
"""

import argparse
import importlib
import itertools
import resource
import statistics
import sys
import tempfile
import time

from absl import logging

CONFIGS = {"lenet": "mnist5k"}


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__)
    parser.add_argument("network", choices=CONFIGS)
    parser.add_argument("--rounds", type=int, default=8, help="rounds to time (default: 8)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        sys.exit(f"error: --rounds is {arguments.rounds}; it should be at least 1")
    logging.set_verbosity(logging.ERROR)
    benchmark(CONFIGS[arguments.network], arguments.rounds)


def benchmark(config_name: str, timed_rounds: int) -> None:
    """Time `timed_rounds` rounds of a config and print the table."""
    import jax
    from rich.console import Console
    from rich.table import Table

    from imp_jax import data, imp

    config = importlib.import_module(f"configs.{config_name}").get_config()
    config.rounds = timed_rounds + 2
    examples = data.load(config.dataset.name, config.dataset.data_dir).train.examples
    members = len(config.arms) * config.replicates
    images = members * config.epochs * (examples // config.batch_size) * config.batch_size

    with tempfile.TemporaryDirectory() as workdir:
        times, trainings = [time.perf_counter()], []
        for rows in imp.rounds(config, workdir):
            times.append(time.perf_counter())
            trainings.append(rows[0]["seconds"])
    # a round is handed over once the next has trained, beside its recording: the first interval holds
    # two trainings and the compilation, the last none
    first, *rounds, _ = [end - start for start, end in itertools.pairwise(times)]
    trainings = trainings[2:]
    other = [1 - training / whole for training, whole in zip(trainings, rounds, strict=True)]

    device = jax.devices()[0].device_kind
    title = f"configs/{config_name}.py, {members} members on {device}, JAX {jax.__version__}"
    table = Table("quantity", "median", "min", "max", title=title)

    def add(name, values, pattern):
        table.add_row(name, *[pattern.format(f(values)) for f in (statistics.median, min, max)])

    add("images/s, all members, whole round", [images / seconds for seconds in rounds], "{:,.0f}")
    add("images/s, all members, training", [images / seconds for seconds in trainings], "{:,.0f}")
    add("seconds a round", rounds, "{:.2f}")
    add("share of a round not training", other, "{:.1%}")
    table.add_row("start, data, compilation (s)", f"{first - 2 * statistics.median(rounds):.2f}", "", "")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table.add_row("peak host memory (GiB)", f"{peak:.2f}", "", "")
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
