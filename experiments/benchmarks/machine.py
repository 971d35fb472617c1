"""Describe this machine and measure its peaks."""

import platform
import time
from pathlib import Path

import jax

from imp_jax.runtime import devices


def measure_peaks(dtype: str) -> tuple[float, float]:
    """Return the FLOP/s of a large matrix product, and the bytes/s of adding to a large array; best of ten."""
    on_cpu = jax.default_backend() == "cpu"
    side, count = (2048, 2**26) if on_cpu else (8192, 2**28)
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    row = jax.numpy.zeros(count, "float32")

    def time_fastest(function, argument, chained):
        times = []
        for _ in range(11):
            start = time.perf_counter()
            result = jax.block_until_ready(function(argument))
            times.append(time.perf_counter() - start)
            argument = result if chained else argument
        return min(times[1:])

    product = jax.jit(lambda square: square @ square)
    add = jax.jit(lambda row: row + 1, donate_argnums=0)  # in place: a CPU is slow to allocate new memory
    return 2 * side**3 / time_fastest(product, square, False), 2 * row.nbytes / time_fastest(add, row, True)


def describe_cpu() -> str:
    """Return the number of cores that this process may use and the processor's name."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(": ")[2] if lines else name
    return f"{devices.available_cores()} cores of {name}"
