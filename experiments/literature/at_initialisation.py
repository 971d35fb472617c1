"""Pruning at initialisation, with masks that are shuffled within each layer or have other initial weights.

Frankle et al. 2021 ("Pruning neural networks at initialization: why are we missing the mark?") permute the
masks of SNIP, GraSP and SynFlow within each layer, and train other initialisations under them. Neither reduces
the accuracy of these methods, unlike that of magnitude pruning after training.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.literature.comparison import (
    BANDS,
    TOO_LITTLE,
    Series,
    draw_series,
    format_table,
    format_values,
)
from experiments.literature.controls import style_series
from experiments.paper.evidence import LEVEL_POINTS
from experiments.paper.panels import Finished, PaperFigure, add_common_legend, make_grid
from experiments.paper.quantities import rounds_in_bands
from experiments.paper.scales import Scale
from experiments.sweeps.runs import AnyRun, Branch, Run
from imp_jax.methods import METHODS

NAMES = {"imp": "IMP", "snip": "SNIP", "grasp": "GraSP", "synflow": "SynFlow", "random": "random mask"}
CHANGES = {"shuffled": "mask shuffled within each layer", "reinit": "other initialisation"}


def make_run(scale: Scale, method: str) -> Run:
    """Return the run of a method of pruning at initialisation, with both changes beside it."""
    return scale.at_initialisation.with_overrides(METHODS[method], arms=("imp", *CHANGES))


def make_branch(scale: Scale) -> Branch:
    """Return the branch that trains the trunk's tickets under its shuffled masks."""
    return Branch(scale.trunk, "shuffled", ("shuffled",), scale.trunk_rounds)


def list_runs(scale: Scale) -> list[AnyRun]:
    """List the run of IMP with its branch, and a run per method."""
    return [scale.trunk, make_branch(scale), *(make_run(scale, method) for method in list(NAMES)[1:])]


def list_series(scale: Scale, method: str) -> dict[str, Series]:
    """Return the results of a method and of its changes, by arm."""
    if method == "imp":
        trunk = {arm: Series(scale.trunk, arm) for arm in ("imp", "reinit")}
        return trunk | {"shuffled": Series(make_branch(scale), "shuffled")}
    return {arm: Series(make_run(scale, method), arm) for arm in ("imp", "reinit", "shuffled")}


def draw(scale: Scale, finished: Finished) -> Figure:
    """Draw the accuracy over density, one panel per method."""
    figure, panels = make_grid(len(NAMES), columns=3, width=3.4, height=2.7)
    for axes, (method, name) in zip(panels, NAMES.items(), strict=True):
        series = [style_series(arm, one) for arm, one in list_series(scale, method).items()]
        names = {"imp": "the method's mask and ticket"} | CHANGES
        draw_series(axes, finished, [(names[one.arm], one, style) for _, one, style in series])
        axes.set_title(name, fontsize="medium")
    add_common_legend(figure, columns=3)
    return figure


def tabulate(scale: Scale, finished: Finished) -> str:
    """Return a table: accuracy of each method, and what each change adds to it, in points."""
    columns = ["method"]
    for band in BANDS:
        columns.append(f"accuracy, {band} sparsity (%)")
        for change in CHANGES:
            columns += [f"{change} − method (points)", "verdict"]
    rows = []
    for method, name in NAMES.items():
        series, cells = list_series(scale, method), [name]
        for band in BANDS:
            rounds = _rounds(series.values(), scale, finished, band)
            measured = {arm: one.measure(finished, rounds) for arm, one in series.items()}
            cells.append(format_values(measured["imp"].dropna(), "{:.1f}"))
            for change in CHANGES:
                table = pd.concat([measured[change], measured["imp"]], axis=1).dropna()
                difference = table.iloc[:, 0] - table.iloc[:, 1]
                cells += [format_values(difference, "{:+.1f}"), judge(difference)]
        rows.append(cells)
    return format_table(columns, rows)


def judge(difference: pd.Series) -> str:
    """Return the verdict on a difference in points: a change loses accuracy, gains some, or has no effect."""
    if len(difference) < 2:
        return TOO_LITTLE
    if abs(difference.mean()) < LEVEL_POINTS:
        return "no effect"
    return "loses" if difference.mean() < 0 else "gains"


def _rounds(series: Sequence[Series], scale, finished, band):
    """List the rounds within the band that all series have."""
    runs = {one.run for one in series}
    if not all(run in finished for run in runs):
        return []
    numbers = next(rounds_in_bands(finished[run], BANDS[band]) for run in runs if isinstance(run, Run))
    branches = [run.numbers for run in runs if isinstance(run, Branch)]
    return [number for number in numbers if all(number in rounds for rounds in branches)]


FIGURES = (
    PaperFigure(
        "at_initialisation",
        "accuracy, masks of initialisations, shuffled and with other weights",
        list_runs,
        draw,
        tabulate,
    ),
)
