"""The paper's claims, measured: `python -m experiments.claims --root=runs/mini`.

Every claim comes down to numbers, one for each replicate, and what they should be. The table goes to the
terminal and, as Markdown, to `claims.md` in the folder of the runs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from absl import logging
from rich.table import Table

from experiments.paper.evidence import CLAIMS, Claim, Quantity
from experiments.paper.panels import Finished, PaperFigure, wide_console
from experiments.paper.scales import SCALES, Scale
from experiments.sweeps.runs import Run
from experiments.sweeps.sweep import Sweep
from imp_jax import cli
from imp_jax.errors import UserError, lookup, user_path
from imp_jax.workdir.files import write_atomically

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "too little data"


class Row(NamedTuple):
    """A quantity as it was measured; nan where there is too little data."""

    claim: Claim
    quantity: Quantity
    mean: float
    low: float
    high: float
    verdict: str


def runs(scale: Scale) -> list[Run]:
    """All runs that the claims are measured in, each once."""
    return list(
        dict.fromkeys(run for claim in CLAIMS for quantity in claim.quantities(scale) for run in quantity.runs)
    )


def measure(scale: Scale, finished: Finished) -> list[Row]:
    """Every quantity of every claim, in the replicates that have all its rounds; it takes two of them."""
    rows = []
    for claim in CLAIMS:
        for quantity in claim.quantities(scale):
            values = pd.Series(dtype=float)
            if all(run in finished for run in quantity.runs):
                values = quantity.of(*(finished[run] for run in quantity.runs)).dropna()
            verdict = UNKNOWN
            if len(values) >= 2:
                verdict = HOLDS if quantity.expected.holds(values) else FAILS
            rows.append(Row(claim, quantity, values.mean(), values.min(), values.max(), verdict))
    return rows


def verdict(rows: Sequence[Row]) -> str:
    """Of a claim, from those of its quantities: it holds if all do."""
    verdicts = [row.verdict for row in rows]
    if FAILS in verdicts:
        return f"{FAILS} ({verdicts.count(HOLDS)} of {len(verdicts)} do)" if HOLDS in verdicts else FAILS
    return UNKNOWN if UNKNOWN in verdicts else HOLDS


def markdown(scale: Scale, finished: Finished) -> str:
    """The table, and below it the runs, which it calls by letters."""
    rows, letters = measure(scale, finished), _letters(scale)
    lines = [
        "| | measured | mean | min | max | expected | verdict | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim, of_claim in _by_claim(rows):
        lines.append(f"| **{claim.id}** | **{claim.words}** | | | | | **{verdict(of_claim)}** | |")
        lines += [f"| | {' | '.join(_cells(row, letters))} |" for row in of_claim]
    there = [f"{letter}: `{run.name}`" for run, letter in letters.items()]
    return "\n".join([*lines, "", "Runs: " + ", ".join(there)])


def show(scale: Scale, finished: Finished) -> None:
    """Print the table, and the runs."""
    rows, letters = measure(scale, finished), _letters(scale)
    table = Table("", "measured", "mean", "min", "max", "expected", "verdict", "runs")
    for claim, of_claim in _by_claim(rows):
        table.add_row(claim.id, f"[bold]{claim.words}", "", "", "", "", f"[bold]{verdict(of_claim)}", "")
        for row in of_claim:
            table.add_row("", *_cells(row, letters))
        table.add_section()
    console = wide_console()
    console.print(table)
    for run, letter in letters.items():
        console.print(f"{letter}: {run.name}{'' if run in finished else ' (not run)'}", highlight=False)


def _by_claim(rows):
    return [(claim, [row for row in rows if row.claim is claim]) for claim in CLAIMS]


def _letters(scale):
    return {run: chr(ord("a") + place) for place, run in enumerate(runs(scale))}


def _cells(row, letters):
    numbers = ["–" if np.isnan(n) else row.quantity.form.format(n) for n in (row.mean, row.low, row.high)]
    of = ", ".join(letters[run] for run in row.quantity.runs)
    return row.quantity.words, *numbers, row.quantity.expected.words, row.verdict, of


FIGURES = (PaperFigure("claims", "the paper's claims, measured", runs, markdown),)


def scale_of(root: Path, name: str | None) -> Scale:
    """The scale called `name`, or of which there are runs in `root`.

    Raises:
      UserError: an unknown scale; runs of none, or of several.
    """
    if name:
        return lookup(SCALES, "--scale", name)
    there = [scale for scale in SCALES.values() if any((root / run.name).is_dir() for run in runs(scale))]
    if len(there) != 1:
        held = (
            f"runs of the scales {', '.join(s.name for s in there)}"
            if there
            else "no run that a claim is about"
        )
        raise UserError(
            f"{root} holds {held}; say which with --scale={'|'.join(SCALES)}, or give another --root"
        )
    return there[0]


def main() -> None:
    cli.replace_unprintable()
    parser = argparse.ArgumentParser(prog="python -m experiments.claims", description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="folder of the runs, as of experiments.run")
    parser.add_argument("--scale", help="paper, mini or smoke (default: whichever there are runs of)")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    try:
        root = user_path(arguments.root, "--root").absolute()
        scale = scale_of(root, arguments.scale)
        sweep = Sweep(root)
        sweep.check_configs_match(runs(scale))
        finished = sweep.finished(runs(scale))
        if not finished:
            raise UserError(f"nothing that the claims are about has been run in {root} yet")
        show(scale, finished)
        write_atomically(root / "claims.md", markdown(scale, finished) + "\n")
        print(f"claims: {root / 'claims.md'}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
