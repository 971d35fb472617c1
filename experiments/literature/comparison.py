"""Compare arms with imp and its reinit: the lines of a figure, and the rows of a table with verdicts."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from experiments.paper.evidence import PART_OF_LEAD_PCT, Expected
from experiments.paper.panels import COLUMNS, clip_accuracy, mark_not_run
from experiments.paper.quantities import HIGH, MEDIUM, VERY_HIGH, Values, accuracy_in_rounds, rounds_in_bands
from experiments.sweeps.runs import AnyRun
from experiments.sweeps.sweep import Finished
from imp_jax import figures

BANDS = {"medium": (MEDIUM,), "high": (HIGH, VERY_HIGH)}  # of sparsity
Y_RANGE_POINTS = 30
TOO_LITTLE, NO_LEAD = "too little data", "IMP has no lead"
# parts of imp's lead over its reinit (ours): which part is called what
REACHES_IMP = Expected(f"mean > {100 - PART_OF_LEAD_PCT}", low=100 - PART_OF_LEAD_PCT)
LIKE_REINIT = Expected(f"mean within ±{PART_OF_LEAD_PCT}", -PART_OF_LEAD_PCT, PART_OF_LEAD_PCT)
BELOW_REINIT = Expected(f"mean < -{PART_OF_LEAD_PCT}", high=-PART_OF_LEAD_PCT)
NO_BETTER_THAN_REINIT = Expected(f"mean < {PART_OF_LEAD_PCT}", high=PART_OF_LEAD_PCT)
VERDICTS = {"reaches IMP": REACHES_IMP, "like reinit": LIKE_REINIT, "below reinit": BELOW_REINIT}


class Series(NamedTuple):
    """The results of one arm, in a run or a branch."""

    run: AnyRun
    arm: str = "imp"
    column: str = "test_accuracy"  # or train_accuracy

    def measure(self, finished: Finished, rounds: Sequence[int]) -> Values:
        """Compute the accuracy in %, the mean over `rounds`, of each replicate; empty if it is not finished."""
        if self.run not in finished:
            return pd.Series(dtype=float)
        return accuracy_in_rounds(finished[self.run], self.arm, rounds, self.column)


class Comparison(NamedTuple):
    """One arm beside imp and its reinit.

    Attributes:
      words: its name in the table.
      series: its results.
      imp, reinit: the results that it is compared with.
      rounds: the rounds in which they are compared.
      expected: the part of imp's lead in % that the literature predicts; None if it predicts none.
    """

    words: str
    series: Series
    imp: Series
    reinit: Series
    rounds: tuple[int, ...]
    expected: Expected | None = None


def part_of_lead(comparison: Comparison, finished: Finished, band: str) -> Values | str:
    """Compute which part of imp's mean lead over reinit an arm has, in % by replicate.

    Return `TOO_LITTLE` if fewer than two replicates have all rounds, and `NO_LEAD` if imp is not above reinit
    in each of them.
    """
    rounds = _rounds(comparison, finished, band)
    series = (comparison.series, comparison.imp, comparison.reinit)
    table = pd.concat([one.measure(finished, rounds) for one in series], axis=1).dropna()
    if len(table) < 2:
        return TOO_LITTLE
    arm, imp, reinit = (table.iloc[:, i] for i in range(3))
    lead = imp - reinit
    return 100 * (arm - reinit) / lead.mean() if (lead > 0).all() else NO_LEAD


def judge(part: Values | str) -> str:
    """Return the verdict on a part of imp's lead."""
    if isinstance(part, str):
        return part
    return next((words for words, interval in VERDICTS.items() if interval.contains(part.mean())), "between")


def format_comparisons(comparisons: Sequence[Comparison], finished: Finished) -> str:
    """Return a Markdown table: accuracy, part of imp's lead and verdict at medium and at high sparsity."""
    with_expected = any(comparison.expected for comparison in comparisons)
    columns = ["arm"]
    for band in BANDS:
        columns += [f"accuracy, {band} sparsity (%)", "of IMP's lead (%)", "verdict"]
        columns += ["literature"] if with_expected else []
    rows = []
    for comparison in comparisons:
        cells = [comparison.words]
        for band in BANDS:
            values = comparison.series.measure(finished, _rounds(comparison, finished, band)).dropna()
            part = part_of_lead(comparison, finished, band)
            cells += [format_values(values, "{:.1f}"), "–" if isinstance(part, str) else format_values(part)]
            references = (comparison.imp, comparison.reinit)
            cells += ["–" if comparison.series in references else judge(part)]
            if with_expected:
                cells.append(_compare_with_literature(comparison.expected, part))
        rows.append(cells)
    return format_table(columns, rows)


def _compare_with_literature(expected, part):
    if expected is None or isinstance(part, str):
        return "–"
    return f"{expected.words}: {'agrees' if expected.contains(part.mean()) else 'differs'}"


def format_values(values: Values, pattern: str = "{:.0f}") -> str:
    """Format the mean of the replicates, and their minimum and maximum."""
    if not len(values):
        return "–"
    mean, low, high = (pattern.format(v) for v in (values.mean(), values.min(), values.max()))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def draw_series(
    axes: Axes,
    finished: Finished,
    series: Sequence[tuple[str, Series, dict]],
    y_range_points: float = Y_RANGE_POINTS,
) -> None:
    """Draw the accuracy of several arms over density.

    Args:
      series: (label, series, style) of each line.
      y_range_points: how far below the best accuracy the y axis reaches, see `clip_accuracy`.
    """
    lowest = []
    for label, one, style in series:
        if one.run not in finished:
            continue
        results = finished[one.run].results
        rows = results[results["arm"] == one.arm]
        if len(rows):
            factor, words = COLUMNS[one.column]
            figures.draw_mean(axes, rows, one.column, factor, label=label, **style)
            axes.set_ylabel(words)
            lowest.append(rows["density"].min())
    if not lowest:
        return mark_not_run(axes)
    figures.density_axis(axes, min(lowest))
    clip_accuracy(axes, y_range_points)


def _rounds(comparison, finished, band):
    """List the compared rounds whose density is within the band."""
    if comparison.imp.run not in finished:
        return []
    in_band = rounds_in_bands(finished[comparison.imp.run], BANDS[band])
    return [number for number in comparison.rounds if number in in_band]
