"""Print, read and compare the tables of timed training steps."""

import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from imp_jax.errors import UserError

# two rows are comparable if they have the same value of each
WORK_FIELDS = ("machine", "members", "batch_size", "dtype", "execution")


def read_table(path: str) -> dict:
    """Read a table that `benchmark_steps` wrote as JSON.

    Raises:
      UserError: the file cannot be read or is not such a table.
    """
    try:
        table = json.loads(Path(path).read_text())
        keys = {"images_per_second", "compilation", "memory", *WORK_FIELDS}
        if not table["date"] or any(keys - row.keys() for row in table["rows"].values()):
            raise KeyError("fields are missing")
        return table
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--compare is {path!r}, which cannot be read as a table of --out: {type(error).__name__}: {error}"
        ) from error


def print_rows(rows: dict[str, dict]) -> None:
    """Print one line per network: medians, with minimum and maximum of the images/s."""
    first = next(iter(rows.values()))
    title = f"training steps on {first['machine']}, {first['versions']}"
    table = Table(
        "members × batch", "images/s of all (min to max)", "step (ms)", "TFLOP/s", "of peak", title=title
    )
    for heading in ("GB/s", "of peak", "compilation (s)", "memory (GiB)"):
        table.add_column(heading)
    torch_names = list(dict.fromkeys(name for row in rows.values() for name in row["lead"]))
    for name in torch_names:
        table.add_column(f"× {name}")
    for name, row in rows.items():
        rates = row["images_per_second"]
        rate = statistics.median(rates)
        flops, moved = rate * row["flops_per_image"], rate * row["bytes_per_image"]
        leads = [row["lead"].get(torch_name, []) for torch_name in torch_names]
        table.add_row(
            f"{name}: {row['members']} × {row['batch_size']}, {row['dtype']}",
            f"{rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
            f"{1e3 * row['members'] * row['batch_size'] / rate:,.2f}",
            f"{flops / 1e12:.3f}",
            f"{flops / row['peak_flops']:.0%}",
            f"{moved / 1e9:,.1f}",
            f"{moved / row['peak_bytes']:.0%}",
            f"{row['compilation']:.1f}",
            f"{row['memory']:.2f}",
            *(f"{statistics.median(values):.2f}" if values else "" for values in leads),
        )
    Console(width=200).print(table)
    for name, row in rows.items():
        print(
            f"{name}: {row['execution']}; {row['flops_per_image'] / 1e6:,.2f} MFLOP and at least "
            f"{row['bytes_per_image'] / 1e6:,.3f} MB per image; peaks {row['peak_flops'] / 1e12:.2f} TFLOP/s, "
            f"{row['peak_bytes'] / 1e9:,.0f} GB/s"
        )


def print_ratios(old_table: dict, new_table: dict) -> None:
    """Print what changed between two tables, as ratios of medians."""
    title = f"compared with {old_table['date']}"
    table = Table("new / old", "images/s", "compilation", "memory", title=title)
    for name in new_table["rows"].keys() & old_table["rows"].keys():
        new, old = new_table["rows"][name], old_table["rows"][name]
        comparable = all(new[field] == old[field] for field in WORK_FIELDS)
        table.add_row(
            name + ("" if comparable else " (not the same work, or machine)"),
            f"{statistics.median(new['images_per_second']) / statistics.median(old['images_per_second']):.2f}",
            f"{new['compilation'] / old['compilation']:.2f}" if old["compilation"] > 0 else "",
            f"{new['memory'] / old['memory']:.2f}",
        )
    Console(soft_wrap=True).print(table)
