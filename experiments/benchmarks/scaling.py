"""Measure weak scaling over devices: `python -m experiments.benchmark scaling`.

Each device has the same work: with more devices there are more members, or larger batches. The virtual devices
of a CPU share its cores, so there the images/s of all together should stay constant.
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

from rich.console import Console
from rich.table import Table

from experiments.benchmarks.plan import print_member_sizes, print_plans
from experiments.benchmarks.train_fn import make_train_fn
from experiments.sweeps.runs import REPOSITORY, load_config
from imp_jax.runtime.distributed import visible_gpus

CPU_DEVICES = (1, 2, 4)  # virtual
GPU_DEVICES = (1, 2, 4, 8, 16)


class DeviceWork(NamedTuple):
    """What one device trains."""

    members: int
    batch_size: int
    steps: int  # per timing


CPU_WORK = {"lenet": DeviceWork(2, 60, 200), "resnet20": DeviceWork(1, 32, 2)}
GPU_WORK = {
    "lenet": DeviceWork(6, 60, 600),
    "resnet20": DeviceWork(2, 128, 20),
    "resnet50": DeviceWork(1, 64, 10),
}


def benchmark_scaling(repeats: int) -> None:
    """Print the images/s of each network over more members and larger batches, and plans for the sweeps."""
    gpus = visible_gpus(os.environ)
    counts = [n for n in GPU_DEVICES if n <= len(gpus)] if gpus else CPU_DEVICES
    kind = "GPUs" if gpus else f"virtual devices on {os.cpu_count()} cores"
    table = Table("network", "divided", "devices", "images/s", "min", "max", "efficiency", title=f"On {kind}")
    for network, work in (GPU_WORK if gpus else CPU_WORK).items():
        for divided in ("members", "batch"):
            single_rate = None
            for count in counts:
                rates = time_in_subprocess(network, divided, count, work, repeats, gpus)
                rate = statistics.median(rates)
                single_rate = single_rate or rate
                efficiency = rate / single_rate / (count if gpus else 1)
                cells = (f"{value:,.0f}" for value in (rate, min(rates), max(rates)))
                table.add_row(network, divided, str(count), *cells, f"{efficiency:.0%}")
    Console(soft_wrap=True).print(table)
    print_plans()
    print_member_sizes()


def time_in_subprocess(
    network: str, divided: str, devices: int, work: DeviceWork, repeats: int, gpus: Sequence[str]
) -> list[float]:
    """Return `repeats` timings of the images/s of all devices together, in a process that has `devices`.

    Args:
      divided: what is divided over the devices, "members" or "batch".
      gpus: the GPUs to choose from; without any, the devices are virtual ones of the CPU.
    """
    environment = dict(os.environ)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:devices])
    else:
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}
    numbers = map(str, (devices, *work, repeats))
    command = [sys.executable, "-m", "experiments.benchmarks.scaling", network, divided, *numbers]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Time one network and print its images/s as JSON; started by `time_in_subprocess`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.scaling", description=main.__doc__)
    for name in ("network", "divided"):
        parser.add_argument(name)
    for name in ("devices", "members", "batch_size", "steps", "repeats"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()

    config = load_config(arguments.network)
    members, config.batch_size = arguments.members, arguments.batch_size
    if arguments.divided == "members":
        members *= arguments.devices
        config.mesh.member = arguments.devices
    else:
        config.batch_size *= arguments.devices
        config.mesh.member, config.mesh.data = 1, arguments.devices
    train, _ = make_train_fn(config, members, arguments.steps)
    rates = []
    for _ in range(1 + arguments.repeats):  # the first one compiles
        start = time.perf_counter()
        train()
        rates.append(members * config.batch_size * arguments.steps / (time.perf_counter() - start))
    print(json.dumps(rates[1:]))


if __name__ == "__main__":
    main()
