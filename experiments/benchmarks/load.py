"""Time training steps while other processes use the cores: `python -m experiments.benchmark load`.

Other processes get their share of each core, so steps should take twice as long beside one busy process per
core. They would take much longer if a device waited for threads that are not running.
"""

import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from subprocess import Popen

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import steps
from imp_jax.runtime.devices import available_cores

NETWORKS = ("lenet", "resnet8")


def benchmark_load(options: Sequence[str]) -> None:
    """Time the training steps of `NETWORKS` alone and beside one busy process per core; print the ratio.

    Args:
      options: command line options of `steps.main`.
    """
    table = Table("network", "images/s alone", "beside busy processes", "share of the speed alone")
    for name in NETWORKS:
        alone = steps.time_row_in_subprocess(name, options)["images_per_second"]
        with run_busy_processes(available_cores()):
            beside = steps.time_row_in_subprocess(name, options)["images_per_second"]
        cells = [f"{statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})" for r in (alone, beside)]
        table.add_row(name, *cells, f"{statistics.median(beside) / statistics.median(alone):.2f}")
    Console(width=120).print(table)


@contextlib.contextmanager
def run_busy_processes(count: int) -> Iterator[None]:
    """Run `count` processes that compute without a pause; end them at the end of the context."""
    command = [sys.executable, "-c", "while True: pass"]
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(Popen(command))
            stack.callback(process.kill)
        yield
