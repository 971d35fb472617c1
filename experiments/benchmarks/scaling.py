"""From one device to many: images/s over more and more devices, and what the paper's sweeps would take.

Weak scaling: each device has the same work, of more members, or of larger batches. Virtual devices of a CPU
share its cores, so that there what all of them train in a second should stay as it is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from experiments.paper import catalogue
from experiments.paper.scales import PAPER
from experiments.sweeps import cost
from experiments.sweeps.runs import REPOSITORY, Run
from imp_jax.runtime.distributed import visible_gpus

VIRTUAL = (1, 2, 4)  # devices of a CPU
# of each network, on a CPU and on GPUs: members of a device, its part of a batch, steps of a timing
WORK = {
    "lenet": ((2, 60, 200), (6, 60, 600)),
    "resnet20": ((1, 32, 2), (2, 128, 20)),
    "resnet50": (None, (1, 64, 10)),
}


class Plan(NamedTuple):
    """How a sweep goes on so many devices."""

    seconds: float
    data: int  # the mesh of each run
    member: int
    at_once: int  # runs


def benchmark(repeats: int) -> None:
    """Print the images/s of each network over members and over batches, then the plan."""
    from rich.console import Console
    from rich.table import Table

    there = visible_gpus(os.environ)
    sizes = [n for n in (1, 2, 4, 8, 16) if n <= len(there)] if there else VIRTUAL
    kind = "GPUs" if there else f"virtual devices on {os.cpu_count()} cores"
    table = Table("network", "divided", "devices", "images/s", "min", "max", "efficiency", title=f"On {kind}")
    for network, (on_cpu, on_gpus) in WORK.items():
        work = on_gpus if there else on_cpu
        if work is None:
            continue
        for divided in ("members", "batch"):
            alone = None
            for devices in sizes:
                rates = timed(network, divided, devices, work, repeats, there)
                rate = statistics.median(rates)
                alone = alone or rate
                efficiency = rate / alone / (devices if there else 1)
                cells = (f"{value:,.0f}" for value in (rate, min(rates), max(rates)))
                table.add_row(network, divided, str(devices), *cells, f"{efficiency:.0%}")
    Console(soft_wrap=True).print(table)
    print_plan()


def timed(
    network: str, divided: str, devices: int, work: tuple[int, int, int], repeats: int, there: Sequence[str]
) -> list[float]:
    """Images/s of all devices together, `repeats` times, in a process that has so many."""
    environment = dict(os.environ)
    if there:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(there[:devices])
    else:
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.scaling",
        network,
        divided,
        *map(str, (devices, *work, repeats)),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """What `timed` starts."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.scaling", description=main.__doc__)
    for name, kind in (("network", str), ("divided", str)):
        parser.add_argument(name, type=kind)
    for name in ("devices", "members", "batch_size", "steps", "repeats"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()

    import importlib

    from experiments.benchmarks.train_fn import make_train_fn

    config = importlib.import_module(f"configs.{arguments.network}").get_config()
    members, config.batch_size = arguments.members, arguments.batch_size
    if arguments.divided == "members":
        members *= arguments.devices
        config.mesh.member = arguments.devices
    else:
        config.batch_size *= arguments.devices
        config.mesh.member, config.mesh.data = 1, arguments.devices
    train, _ = make_train_fn(config, members, arguments.steps)
    rates = []
    for _ in range(1 + arguments.repeats):
        start = time.perf_counter()
        train()
        rates.append(members * config.batch_size * arguments.steps / (time.perf_counter() - start))
    print(json.dumps(rates[1:]))


def plan(runs: Sequence[Run], devices: int, device: dict, most_data: int = 1) -> Plan | None:
    """The fastest way to train `runs`, all alike, on so many devices.

    Each run has a mesh of its own, and as many run at once as there are meshes. A round takes as long as the
    fullest device needs for its members. Devices that divide a batch are taken to lose nothing by it, and the
    input to keep up: at best it is so.

    Args:
      device: what one of them can do, an entry of `cost.read_throughput`.
      most_data: over how many a batch may be divided.

    Returns: None where the network was not measured.
    """
    alone = max((cost.seconds(run, device) or 0 for run in runs), default=0)
    if not alone:
        return None
    run = max(runs, key=lambda run: cost.seconds(run, device))
    config = run.config
    sizes = [config.replicates * len(config.arms)] * config.rounds
    for number in set(config.instability.rounds):
        if number < config.rounds:
            sizes[number] += config.replicates
    plans = []
    for member in range(1, min(devices, max(sizes)) + 1):
        for data in range(1, min(most_data, devices // member) + 1):
            if config.batch_size % data:
                continue
            at_once = min(devices // (member * data), len(runs))
            turns = -(-len(runs) // at_once)
            share = sum(-(-size // member) for size in sizes) / sum(sizes) / data
            plans.append(Plan(turns * share * alone, data, member, at_once))
    return min(plans)


def print_plan() -> None:
    """What figure 1 and the ResNet-50 table take on 1, 8 and 64 devices of each kind that was measured."""
    from rich.console import Console
    from rich.table import Table

    counts = (1, 8, 64)
    title = "Time on 1, 8 and 64 devices (runs at once, each on member × data)"
    table = Table("sweep", "batches", "device", *map(str, counts), title=title)
    for name, most_data, batches in (
        ("fig1", 1, "whole"),
        ("fig1", max(counts), "divided, at best"),
        ("tablec", 1, "whole"),
        ("tablec", max(counts), "divided, at best"),
    ):
        runs = catalogue.FIGURES[name].runs(PAPER)
        for kind, device in cost.read_throughput().items():
            cells = []
            for count in counts:
                best = plan(runs, count, device, most_data)
                mesh = f" ({best.at_once}, {best.member} × {best.data})" if best else ""
                cells.append(f"{cost.format_duration(best and best.seconds)}{mesh}")
            table.add_row(f"{name}, {len(runs)} runs", batches, kind, *cells)
    Console(soft_wrap=True, width=160).print(table)
    table = Table(
        "network",
        "parameters",
        "state (MB)",
        "summed over devices in a step (MB)",
        title="A member: what its device holds, and what it tells the others where they divide its batch",
    )
    for name in ("lenet", "conv4", "resnet20", "resnet50"):
        count, state, told = sizes_of(name)
        table.add_row(name, f"{count:,}", f"{state / 1e6:,.1f}", f"{told / 1e6:,.1f}")
    Console(soft_wrap=True).print(table)


def sizes_of(name: str) -> tuple[int, int, int]:
    """Of a member of a config: parameters; bytes of its state on a device; bytes summed over devices a step."""
    import importlib

    import jax

    from experiments.paper.networks import SETS
    from imp_jax import experiment, models

    config = importlib.import_module(f"configs.{name}").get_config()
    _, image_shape, classes = SETS[config.dataset.name]
    shapes = models.shapes(experiment.create_model(config, classes, image_shape), image_shape)
    moments = jax.eval_shape(experiment.make_optimizer(config).init, shapes["params"])

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    statistics = {name: leaves for name, leaves in shapes.items() if name != "params"}
    # weights, moments, the gradient, the mask; the ticket waits on the host
    state = size(shapes) + size(moments) + size(shapes["params"]) + count
    return count, state, size(shapes["params"]) + size(statistics) + 8  # and loss and accuracy


if __name__ == "__main__":
    main()
