"""Measure what the costs of runs are computed from: `python -m experiments.benchmark throughput`.

The training steps of all networks are timed at the batch sizes of the figures (on a CPU, the convolutional
networks of the paper at one batch size). Whole runs of configs/mnist5k.py, without and with repulsion, give the
time that a run takes in addition to its training and the factor of repulsion. With --record="one H100" the
result becomes the entry of `throughput.json` that `python -m experiments.run list` uses for that device.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.benchmarks.tables import print_quantities
from experiments.benchmarks.train_fn import make_train_fn
from experiments.paper import catalogue
from experiments.paper.networks import TABLE_1_CONFIGS
from experiments.paper.scales import MIDI, MINI, PAPER
from experiments.sweeps import cost
from experiments.sweeps.runs import REPOSITORY, Run, load_config
from imp_jax.workdir.files import write_atomically

CONFIGS = (*TABLE_1_CONFIGS, "resnet8_scenes", "conv4_scenes")
CPU_BATCH_SIZES = {"conv4": 128, "resnet20": 128, "resnet50": 16}  # a larger batch is no faster per image


def benchmark_throughput(rounds: int, repeats: int, record: str | None, names: Sequence[str] = CONFIGS) -> None:
    """Time all networks and whole runs, print the table, and write it to `throughput.json` if asked.

    Args:
      rounds: of the whole runs.
      record: name of this device in `throughput.json`; None to leave the file as it is.
      names: config files.
    """
    speeds, quantities = {}, {}
    for name in names:
        rates_by_size = speeds.setdefault(cost.network_key(Run(name).config), {})
        for size in _list_batch_sizes(name):
            rates, members = _time_steps(name, size, repeats)
            rates_by_size[str(size)] = round(statistics.median(rates), 1)
            quantities[f"{name}, batch {size}, {members} members (images/s)"] = (rates, "{:,.0f}")

    plain = Run("mnist5k", (("rounds", rounds),))
    training_s = cost.estimate_seconds(plain, {"images_per_second": speeds})
    plain_s = _time_process(plain)
    repelled_s = _time_process(plain.with_overrides(repulsion__strength=2.0))
    besides, factor = plain_s - training_s, 1 + (repelled_s - plain_s) / training_s
    quantities["time of a run outside its training (s)"] = ([besides], "{:.1f}")
    quantities["time of training with repulsion / without"] = ([factor], "{:.2f}")
    print_quantities("throughput", quantities)
    if record:
        entry = {
            "images_per_second": speeds,
            "repulsion": {"lenet": round(factor, 2)},
            "besides": {"lenet": round(besides, 1)},
        }
        write_atomically(cost.MEASURED, json.dumps(cost.read_throughput() | {record: entry}, indent=2) + "\n")
        print(f"recorded as {record!r} in {cost.MEASURED}")


def _list_batch_sizes(name):
    if jax.default_backend() == "cpu" and name in CPU_BATCH_SIZES:
        return [CPU_BATCH_SIZES[name]]
    scales, network = (PAPER, MIDI, MINI), cost.network_key(Run(name).config)
    runs = [run for scale in scales for run in catalogue.list_runs(catalogue.FIGURES.values(), scale)]
    return sorted({run.config.batch_size for run in runs if cost.network_key(run.config) == network})


def _time_steps(name, batch_size, repeats):
    """Return the images/s of `repeats` timings and the number of members trained."""
    config = load_config(name)
    config.batch_size = batch_size
    members = config.replicates * len(config.arms)
    steps = {"lenet": 60, "resnet8_scenes": 30, "conv4_scenes": 30}.get(name, 4)
    train, _ = make_train_fn(config, members, steps)
    times = []
    for _ in range(1 + repeats):  # the first one compiles
        start = time.perf_counter()
        train()
        times.append(time.perf_counter() - start)
    return [members * steps * batch_size / seconds for seconds in times[1:]], members


def _time_process(run):
    with tempfile.TemporaryDirectory() as workdir:
        start = time.perf_counter()
        command = run.command(Path(workdir) / "run")
        environment = os.environ | {"XDG_CACHE_HOME": workdir}  # an empty compilation cache
        subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start
