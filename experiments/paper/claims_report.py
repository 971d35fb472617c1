"""Measure the paper's claims in finished runs, and report them as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich.table import Table
from scipy import stats

from experiments.paper.evidence import CLAIMS, Claim, Expected, Quantity
from experiments.paper.panels import PaperFigure, make_wide_console
from experiments.paper.scales import SCALES, Scale
from experiments.sweeps.runs import Run
from experiments.sweeps.sweep import Finished
from imp_jax.errors import UserError, lookup

HOLDS, FAILS, UNDECIDED, UNKNOWN = "holds", "does not hold", "cannot be told", "too little data"
LEVEL = 0.05  # of the one-sided t tests


class Row(NamedTuple):
    """A measured quantity, in the replicates that have all rounds it needs.

    The numbers are nan if there are too few such replicates.

    Attributes:
      mean, low, high: mean, minimum and maximum of the replicates.
      error: standard error of the mean.
      effect: how far the mean is inside the expected interval (negative: outside of it), in standard deviations
        of the replicates.
    """

    claim: Claim
    quantity: Quantity
    mean: float
    error: float
    low: float
    high: float
    effect: float
    verdict: str


def list_claim_runs(scale: Scale) -> list[Run]:
    """List all runs that the claims are measured in, each run once."""
    return list(
        dict.fromkeys(run for claim in CLAIMS for quantity in claim.quantities(scale) for run in quantity.runs)
    )


def measure_claims(scale: Scale, finished: Finished) -> list[Row]:
    """Measure every quantity of every claim, in the replicates that have all rounds it needs."""
    rows = []
    for claim in CLAIMS:
        for quantity in claim.quantities(scale):
            values = pd.Series(dtype=float)
            if all(run in finished for run in quantity.runs):
                values = quantity.measure(*(finished[run] for run in quantity.runs)).dropna()
            rows.append(_summarize(claim, quantity, values))
    return rows


def _summarize(claim, quantity, values):
    mean, deviation, expected = values.mean(), values.std(), quantity.expected
    return Row(
        claim,
        quantity,
        mean,
        values.sem(),
        values.min(),
        values.max(),
        min(mean - expected.low, expected.high - mean) / deviation if deviation else np.nan,
        judge_quantity(values, expected),
    )


def judge_quantity(values: pd.Series, expected: Expected) -> str:
    """Return the verdict of one-sided t tests over replicates, each at the level `LEVEL`.

    Replicates are paired: a difference of two arms or runs is taken in each replicate. The verdict is `HOLDS`
    if the expected interval contains the confidence interval of the mean, of level 1 − 2 `LEVEL` (with two
    limits, these are the two one-sided tests of equivalence), `FAILS` if the two are disjoint, and otherwise
    `UNDECIDED`. With fewer than two values it is `UNKNOWN`.
    """
    if len(values) < 2:
        return UNKNOWN
    margin = stats.t.ppf(1 - LEVEL, len(values) - 1) * values.sem()
    low, high = values.mean() - margin, values.mean() + margin
    if expected.low < low and high < expected.high:
        return HOLDS
    return FAILS if high <= expected.low or low >= expected.high else UNDECIDED


def judge_claim(rows: Sequence[Row]) -> str:
    """Return the verdict on a claim from the rows of its quantities: it holds if all of them do."""
    verdicts = [row.verdict for row in rows]
    found = next((verdict for verdict in (FAILS, UNKNOWN, UNDECIDED) if verdict in verdicts), HOLDS)
    count = verdicts.count(HOLDS)
    return f"{found} ({count} of {len(verdicts)} hold)" if found in (FAILS, UNDECIDED) and count else found


def format_claims(scale: Scale, finished: Finished) -> str:
    """Return the table as Markdown, followed by a list of the runs and the letters that stand for them."""
    rows, letters = measure_claims(scale, finished), _assign_letters(scale)
    lines = [
        "| | measured | mean ± standard error | min | max | expected | effect | verdict | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for claim, claim_rows in _group_by_claim(rows):
        lines.append(f"| **{claim.id}** | **{claim.words}** | | | | | | **{judge_claim(claim_rows)}** | |")
        lines += [f"| | {' | '.join(_format_cells(row, letters))} |" for row in claim_rows]
    legend = [f"{letter}: `{run.name}`" for run, letter in letters.items()]
    return "\n".join([*lines, "", "Runs: " + ", ".join(legend)])


def print_claims(scale: Scale, finished: Finished) -> None:
    """Print the table and the list of runs."""
    rows, letters = measure_claims(scale, finished), _assign_letters(scale)
    columns = ("", "measured", "mean ± standard error", "min", "max", "expected", "effect", "verdict", "runs")
    table = Table(*columns)
    for claim, claim_rows in _group_by_claim(rows):
        verdict = judge_claim(claim_rows)
        table.add_row(claim.id, f"[bold]{claim.words}", *[""] * 5, f"[bold]{verdict}", "")
        for row in claim_rows:
            table.add_row("", *_format_cells(row, letters))
        table.add_section()
    console = make_wide_console()
    console.print(table)
    for run, letter in letters.items():
        console.print(f"{letter}: {run.name}{'' if run in finished else ' (not run)'}", highlight=False)


def choose_scale(root: Path, name: str | None) -> Scale:
    """Return the scale called `name`; without a name, the only scale that has runs in `root`.

    Scales share runs of LeNet. One whose runs in `root` are some of another scale's is left out.

    Raises:
      UserError: the name is unknown, or `root` has runs of no scale or of several scales.
    """
    if name:
        return lookup(SCALES, "--scale", name)
    present = {
        scale: {run for run in list_claim_runs(scale) if (root / run.name).is_dir()}
        for scale in SCALES.values()
    }
    scales = [
        scale
        for scale, runs in present.items()
        if runs and not any(runs < others for others in present.values())
    ]
    if len(scales) != 1:
        contents = "no run that a claim is about"
        if scales:
            contents = f"runs of the scales {', '.join(scale.name for scale in scales)}"
        raise UserError(
            f"{root} holds {contents}; choose the scale with --scale={'|'.join(SCALES)}, or give another --root"
        )
    return scales[0]


def _group_by_claim(rows):
    return [(claim, [row for row in rows if row.claim is claim]) for claim in CLAIMS]


def _assign_letters(scale):
    return {run: chr(ord("a") + index) for index, run in enumerate(list_claim_runs(scale))}


def _format_cells(row, letters):
    quantity = row.quantity
    mean, error, low, high = (
        "–" if np.isnan(n) else quantity.pattern.format(n) for n in (row.mean, row.error, row.low, row.high)
    )
    effect = f"{row.effect:+.1f}" if np.isfinite(row.effect) else "–"
    runs = ", ".join(letters[run] for run in quantity.runs)
    return quantity.words, f"{mean} ± {error}", low, high, quantity.expected.words, effect, row.verdict, runs


FIGURES = (PaperFigure("claims", "the paper's claims, measured", list_claim_runs, format_claims),)
