"""Compare the forms of the convolutions of several members: `python -m experiments.benchmark forms`.

Members are unrolled, or vmapped with Flax's convolutions, with convolutions of one member at a time, with
grouped convolutions, or with batched matrix products of patches. The first two have all layers of Flax, the
others our normalisation and pooling for GPUs. On a CPU each step is one program, on a GPU each epoch.
"""

import itertools
import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import steps


def benchmark_forms(
    network: str, members: Sequence[int], batch_sizes: Sequence[int], options: Sequence[str]
) -> None:
    """Time the training steps of a network in each form, and print the images/s of all members.

    Args:
      options: further command line options of `steps.main`.
    """
    table = Table("members × batch", *steps.FORMS, title=f"images/s of all, {network}")
    for count, size in itertools.product(members, batch_sizes):
        cells = []
        for form in steps.FORMS:
            row = steps.time_row_in_subprocess(
                network, [*options, f"--members={count}", f"--batch_size={size}", f"--form={form}"]
            )
            rates = row["images_per_second"]
            cells.append(f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})")
        table.add_row(f"{count} × {size}", *cells)
    Console(width=200).print(table)
