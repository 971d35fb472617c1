"""How much training does the evidence of connectivity save? Accuracy and density against epochs trained.

The outlook of the paper (section 6) proposes shorter schedules once successive solutions are linearly
connected, and no weight decay for pruned networks. Each way of retraining is a run of IMP without controls.
"""

from typing import NamedTuple

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
from experiments.paper.panels import Finished, PaperFigure, add_common_legend, make_grid, mark_not_run
from experiments.paper.quantities import Values
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run
from imp_jax import analysis, figures
from imp_jax.config import default

FULL, DECAY = "full", "full, with weight decay"
WEIGHT_DECAY_UNTIL = 0.1  # density (ours); the paper names none
STYLES = {
    FULL: figures.STYLES["imp"],
    "learning-rate rewinding": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "short": {"color": "#E69F00", "linestyle": ":", "marker": "v"},
    "short, learning-rate rewinding": {"color": "#56B4E9", "linestyle": "--", "marker": "<"},
    "evidence": {"color": "#D55E00", "linestyle": "-", "marker": "s"},
    "evidence, pruning too": {"color": "#CC79A7", "linestyle": "--", "marker": "D"},
    DECAY: {"color": "#666666", "linestyle": ":", "marker": "x"},
    "weight decay until 10 %": {"color": "#000000", "linestyle": "--", "marker": "+"},
}


def make_runs(scale: Scale) -> dict[str, Run]:
    """Return the run of each way of retraining, by its name."""
    full = scale.effort
    short = {"retraining__epochs": scale.short_epochs}
    evidence = full.with_overrides(retraining__policy="evidence", **short)
    decay = full.with_overrides(optimizer__weight_decay=scale.weight_decay)
    return {
        FULL: full,
        "learning-rate rewinding": full.with_overrides(rewind_step=None),
        "short": full.with_overrides(retraining__policy="short", **short),
        # a control of evidence: from the trained weights in every round, whatever the barrier
        "short, learning-rate rewinding": full.with_overrides(
            retraining__policy="short", rewind_step=None, **short
        ),
        "evidence": evidence,
        "evidence, pruning too": evidence.with_overrides(
            pruning__policy="evidence",
            pruning__fraction=default().pruning.fraction,  # without effect
            rounds=scale.evidence_rounds,
        ),
        DECAY: decay,
        "weight decay until 10 %": decay.with_overrides(optimizer__weight_decay_until=WEIGHT_DECAY_UNTIL),
    }


def list_runs(scale: Scale) -> list[Run]:
    """List the runs of all ways of retraining."""
    return list(make_runs(scale).values())


def total_epochs(run: analysis.Run) -> pd.Series:
    """Return the epochs trained up to the end of each round, by round; the same for all replicates."""
    return run.results.groupby("round")["epochs"].first().cumsum()


def draw(scale: Scale, finished: Finished) -> Figure:
    """Draw accuracy over density, and over the epochs trained to reach it."""
    figure, (left, right) = make_grid(2, columns=2, width=4.2, height=3.4, sharey=False)
    runs = make_runs(scale)
    draw_series(left, finished, [(name, Series(run), STYLES[name]) for name, run in runs.items()])
    for name, run in runs.items():
        if run in finished:
            epochs = total_epochs(finished[run])
            density = figures.densities(finished[run].results)
            style = STYLES[name] | {"markersize": 3.5, "linewidth": 1.4}
            right.plot(density, epochs.reindex(density.index), label=name, **style)
    if not right.get_lines():
        mark_not_run(right)
    else:
        lowest = min(line.get_xdata().min() for line in right.get_lines())
        figures.density_axis(right, lowest)
        right.set_ylabel("Epochs trained in total")
    add_common_legend(figure, columns=4)
    return figure


class Effort(NamedTuple):
    """What one way of retraining reaches within a band of sparsity."""

    accuracy: Values  # in %, mean over the rounds within the band, by replicate
    epochs: int  # trained up to the last of these rounds


def measure(run: Run, finished: Finished, band: str) -> Effort | None:
    """Measure the accuracy within a band and the epochs trained so far; None if no round lies in it."""
    if run not in finished:
        return None
    results = finished[run].results.query("arm == 'imp'")
    in_band = results[[any(low <= d < high for low, high in BANDS[band]) for d in results["density"]]]
    if not len(in_band):
        return None
    accuracy = 100 * in_band.groupby("replicate")["test_accuracy"].mean()
    return Effort(accuracy, int(total_epochs(finished[run])[in_band["round"].max()]))


def judge(effort: Effort | None, reference: Effort | None) -> str:
    """Return the verdict: which share of the reference's epochs is saved, if the accuracy is as high.

    Accuracies are equal if their mean is not below the lowest replicate of the reference (ours).
    """
    if effort is None or reference is None:
        return TOO_LITTLE
    difference = effort.accuracy.mean() - reference.accuracy.mean()
    if effort.accuracy.mean() < reference.accuracy.min():
        return f"{-difference:.1f} points lower"
    saved = 1 - effort.epochs / reference.epochs
    words = f"saves {saved:.0%}" if saved > 0 else "saves nothing"
    return (
        f"{words}, {difference:.1f} points higher"
        if effort.accuracy.min() > reference.accuracy.max()
        else words
    )


def tabulate(scale: Scale, finished: Finished) -> str:
    """Return the table: accuracy, epochs and verdict at medium and at high sparsity."""
    runs = make_runs(scale)
    columns = ["retraining"]
    for band in BANDS:
        columns += [f"accuracy, {band} sparsity (%)", "epochs", "at equal accuracy"]
    rows = []
    for name, run in runs.items():
        reference = runs[DECAY if name.startswith("weight decay") else FULL]
        cells = [name]
        for band in BANDS:
            effort = measure(run, finished, band)
            cells += [format_values(effort.accuracy, "{:.1f}"), effort.epochs] if effort else ["–", "–"]
            verdict = judge(effort, measure(reference, finished, band))
            cells.append("–" if run is reference else verdict)
        rows.append(cells)
    return format_table(columns, rows)


FIGURES = (PaperFigure("effort", "accuracy and epochs, ways of retraining", list_runs, draw, tabulate),)
