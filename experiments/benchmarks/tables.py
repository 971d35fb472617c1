"""Print the results of a benchmark as a table."""

import resource
import statistics
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from imp_jax.errors import UserError


def require_folder_of(out: str | None) -> None:
    """Raise a `UserError` if the folder of the file --out does not exist; None is no file."""
    if out and not Path(out).resolve().parent.is_dir():
        raise UserError(f"--out is {out!r}, whose folder does not exist; create the folder first")


def print_quantities(
    title: str, quantities: dict[str, tuple[list[float], str]], *, memory: bool = True
) -> None:
    """Print the median, minimum and maximum of each quantity.

    Args:
      quantities: by name, the measured values and a format string for them.
      memory: whether to print the peak memory of this process and its device, too.
    """
    device = jax.devices()[0]
    table = Table(
        "quantity", "median", "min", "max", title=f"{title} on {device.device_kind}, JAX {jax.__version__}"
    )
    for name, (values, pattern) in quantities.items():
        spread = [pattern.format(f(values)) for f in (min, max)] if len(values) > 1 else ["", ""]
        table.add_row(name, pattern.format(statistics.median(values)), *spread)
    if memory:
        _add_peak_memory(table, device)
    Console(soft_wrap=True).print(table)


def _add_peak_memory(table, device):
    device_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if device_bytes:
        table.add_row("peak device memory (GiB)", f"{device_bytes / 2**30:.2f}", "", "")
    host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table.add_row("peak host memory (GiB)", f"{host_gib:.2f}", "", "")
