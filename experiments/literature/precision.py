"""Compare a run in bfloat16 with the same run in float32 (ours): accuracy, thresholds and angles."""

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.literature.comparison import format_table, format_values
from experiments.paper.panels import (
    BLUE,
    ORANGE,
    Finished,
    PaperFigure,
    add_common_legend,
    draw_curves,
    mark_not_run,
)
from experiments.paper.quantities import HIGH, LOW, MEDIUM, Values, accuracy, angle, threshold_ratio
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run
from imp_jax import analysis, figures

TYPES = {"float32": BLUE, "bfloat16": ORANGE}
BANDS = {"low": LOW, "medium": MEDIUM, "high": HIGH}  # of sparsity

# by words: measures one number per replicate in a run and a band, and its format
QUANTITIES: dict[str, tuple[Callable[[analysis.Run, tuple[float, float]], Values], str]] = {
    "accuracy of IMP (%)": (lambda run, band: accuracy(run, "imp", band), "{:.1f}"),
    "accuracy of its reinit (%)": (lambda run, band: accuracy(run, "reinit", band), "{:.1f}"),
    "threshold of IMP / reinit": (threshold_ratio, "{:.2f}"),
    "angle of IMP to the round before": (lambda run, band: angle(run, "imp", band), "{:.3f}"),
    "angle of its reinit": (lambda run, band: angle(run, "reinit", band), "{:.3f}"),
}


def list_runs(scale: Scale) -> list[Run]:
    """List the run of figure 1 at the batch size of its config, in both types."""
    return [scale.resnet20.with_overrides(dtype=dtype) for dtype in TYPES]


def draw(scale: Scale, finished: Finished) -> Figure:
    """Draw accuracy, pruning threshold, and the angle between successive rounds over density."""
    figure = Figure(figsize=(10.2, 3.6), layout="constrained")
    *curves, angles = figure.subplots(1, 3)
    series = [(name, color, run) for (name, color), run in zip(TYPES.items(), list_runs(scale), strict=True)]
    for axes, column in zip(curves, ("test_accuracy", "threshold"), strict=True):
        draw_curves(axes, finished, series, column)
    _draw_angles(angles, finished, series)
    add_common_legend(figure)
    return figure


def _draw_angles(axes: Axes, finished: Finished, series):
    lowest = []
    for name, color, run in series:
        if run not in finished:
            continue
        table, results = finished[run].distances, finished[run].results
        chosen = (
            (table["metric"] == "angular")
            & (table["arm"] == "imp")
            & (table["round_b"] == table["round_a"] + 1)
        )
        rows = table[chosen].rename(columns={"round_b": "round"})
        rows = rows.merge(results[results["arm"] == "imp"][["replicate", "round", "density"]])
        if len(rows):
            figures.draw_mean(
                axes, rows, "distance", 1, label=f"{name}, {figures.LABELS['imp']}", color=color, marker="o"
            )
            lowest.append(rows["density"].min())
    axes.set_ylabel("Angle to the round before")
    if not lowest:
        return mark_not_run(axes)
    figures.density_axis(axes, min(lowest))


def tabulate(scale: Scale, finished: Finished) -> str:
    """Return a Markdown table of both types and of their differences, which are paired by replicate."""
    rows = []
    for words, (measure, pattern) in QUANTITIES.items():
        for band_name, band in BANDS.items():
            values = [
                measure(finished[run], band) if run in finished else pd.Series(dtype=float)
                for run in list_runs(scale)
            ]
            difference = (values[1] - values[0]).dropna()
            signed = "{:+" + pattern[2:]
            cells = [format_values(each.dropna(), pattern) for each in values]
            rows.append([words, band_name, *cells, format_values(difference, signed)])
    return format_table(["quantity", "sparsity", *TYPES, "difference"], rows)


FIGURES = (PaperFigure("bfloat16", "bfloat16 beside float32", list_runs, draw, tabulate),)
