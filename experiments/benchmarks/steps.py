"""Time training steps: `python -m experiments.benchmark table`, or the name of one network.

Each network is timed in a process of its own, on random images in the shape of its data set: in memory with
augmentation for CIFAR-10; as batches of a stream, whose decoding is not timed, for ImageNet. The machine's
peaks, of a large matrix product and of adding to a large array, are measured in the same process.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.benchmarks.machine import describe_cpu, measure_peaks
from experiments.benchmarks.patches import use_patches_convolution
from experiments.benchmarks.pytorch import TORCH_NETWORKS, make_torch_train_fns
from experiments.benchmarks.steps_table import print_ratios, print_rows, read_table
from experiments.benchmarks.tables import require_folder_of
from experiments.benchmarks.train_fn import make_train_fn
from experiments.benchmarks.work import count_work
from experiments.sweeps.runs import REPOSITORY, load_config
from imp_jax.errors import UserError
from imp_jax.runtime import devices
from imp_jax.runtime.execution import ExecutionMode
from imp_jax.workdir.files import write_atomically

REPULSION_ROUND = 8  # the row "repulsion" is timed in this round, with as many earlier optima
FORMS = {  # of the convolutions of several members; on a CPU each step is one program
    "unrolled": ExecutionMode(unroll=True),
    "vmapped": ExecutionMode(),
    "per_member": ExecutionMode(convolutions="per_member"),
    "grouped": ExecutionMode(convolutions="grouped"),
    "patches": ExecutionMode(convolutions="per_member"),  # replaced by `use_patches_convolution`
}


class Row(NamedTuple):
    """What a row of the table times."""

    config: str
    steps: int  # per timing
    members_on_cpu: int | None = None  # fewer than the config's, if those would take long
    batch_on_cpu: int | None = None
    strength: float = 0.0  # of repulsion


ROWS = {
    "lenet": Row("mnist5k", 60),
    "repulsion": Row("mnist5k", 60, strength=2.0),
    "conv4": Row("conv4", 8, members_on_cpu=2),
    "resnet8": Row("resnet8_scenes", 30),
    "resnet20": Row("resnet20", 8, members_on_cpu=2),
    "resnet50": Row("resnet50", 2, batch_on_cpu=16),
}


def benchmark_steps(
    names: Iterable[str], options: Sequence[str], torch: bool, out: str | None, old: str | None
) -> None:
    """Time the rows `names` and print their table.

    Args:
      options: command line options of `main`, the same for all rows.
      torch: also time the networks of `TORCH_NETWORKS` in eager PyTorch.
      out: a file to which the table is written as JSON.
      old: such a file, to compare the table with.

    Raises:
      UserError: `old` is not such a table, the folder of `out` does not exist, or a row's process was killed.
    """
    old_table = read_table(old) if old else None
    require_folder_of(out)
    rows = {}
    for name in names:
        torch_option = ["--torch"] if torch and name in TORCH_NETWORKS else []
        rows[name] = time_row_in_subprocess(name, [*options, *torch_option])
    print_rows(rows)
    table = {"date": datetime.date.today().isoformat(), "rows": rows}
    if old_table:
        print_ratios(old_table, table)
    if out:
        write_atomically(Path(out), json.dumps(table, indent=2) + "\n")
        print(f"table: {out}")


def time_row_in_subprocess(name: str, options: Sequence[str]) -> dict:
    """Return a row of the table, timed in a process of its own. Exit if that process fails.

    Raises:
      UserError: the process was killed.
    """
    command = [sys.executable, "-m", "experiments.benchmarks.steps", name, *options]
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # because compilation is timed
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode < 0:
        raise UserError(f"{name} could not be timed: its process ended by signal {-done.returncode}")
    if done.returncode:  # the process has printed why
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Time one row and print it as a line of JSON; started by `time_row_in_subprocess`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.steps", description=main.__doc__)
    parser.add_argument("name", choices=ROWS)
    for name in ("repeats", "members", "batch_size", "steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--execution")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--form", choices=FORMS)
    try:
        print(json.dumps(time_row(parser.parse_args())))
    except UserError as error:
        sys.exit(f"error: {error}")


def time_row(arguments: argparse.Namespace) -> dict:
    """Time the training steps of a row, and return all numbers of the row."""
    devices.use_one_device_per_cpu_core()
    if arguments.form == "patches":
        use_patches_convolution()
    row, on_cpu = ROWS[arguments.name], jax.default_backend() == "cpu"
    config = make_row_config(row, arguments, on_cpu)
    config_members = config.replicates * len(config.arms)
    members = arguments.members or (on_cpu and row.members_on_cpu) or config_members
    steps = arguments.steps or row.steps
    earlier_rounds = REPULSION_ROUND if row.strength else 0
    execution = FORMS[arguments.form]._replace(scan=not on_cpu) if arguments.form else None
    train, execution = make_train_fn(config, members, steps, earlier_rounds, execution)

    first = time_call(train)
    train()
    memory = measure_peak_bytes()
    torch_train_fns = {}
    if arguments.torch:
        torch_train_fns = make_torch_train_fns(arguments.name, members * steps, config.batch_size)
    for torch_train in torch_train_fns.values():
        torch_train()
    times, torch_times = [], {name: [] for name in torch_train_fns}
    for _ in range(arguments.repeats or 5):
        times.append(time_call(train))
        for name, torch_train in torch_train_fns.items():
            torch_times[name].append(time_call(torch_train))
    work = count_work(config)
    mesh = devices.make_mesh(members, config.batch_size, member=config.mesh.member, data=config.mesh.data)
    num_devices = mesh.size if mesh and not on_cpu else 1  # the devices of a CPU share its cores
    peak_flops, peak_bytes = (num_devices * peak for peak in measure_peaks(config.dtype))
    return {
        "machine": f"{jax.devices()[0].device_kind}, {describe_cpu()}",
        "versions": f"JAX {jax.__version__}, Python {platform.python_version()}",
        "members": members,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "execution": execution,
        "images_per_second": [members * steps * config.batch_size / s for s in times],
        "compilation": first - statistics.median(times),
        "memory": memory / 2**30,
        "flops_per_image": work.flops,
        "bytes_per_image": work.activations + work.state / config.batch_size,
        "peak_flops": peak_flops,
        "peak_bytes": peak_bytes,
        "lead": {
            name: [torch_s / own_s for torch_s, own_s in zip(seconds, times, strict=True)]
            for name, seconds in torch_times.items()
        },
    }


def make_row_config(row: Row, arguments: argparse.Namespace, on_cpu: bool):
    """Return the config of a row with the overrides of the command line."""
    config = load_config(row.config)
    config.repulsion.strength = row.strength
    config.batch_size = arguments.batch_size or (on_cpu and row.batch_on_cpu) or config.batch_size
    config.dtype = arguments.dtype or config.dtype
    config.execution = arguments.execution or config.execution
    return config


def time_call(function: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_peak_bytes() -> int:
    """Return the peak memory of the device, or of this process if the device does not report it."""
    device_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    maxrss_unit = 1 if sys.platform == "darwin" else 1024
    return device_bytes or maxrss_unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
