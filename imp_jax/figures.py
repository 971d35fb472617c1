"""Tables → matplotlib figures. No JAX here: in a notebook, pass a DataFrame and get the Figure back."""

import io

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Okabe and Ito's colours, which the colour-blind tell apart; imp solid and its control dashed, as in the paper
STYLES = {
    "imp": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "reinit": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
}
LABELS = {"imp": "IMP", "reinit": "random reinitialisation"}
DENSITY_TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


def accuracy(results: pd.DataFrame) -> Figure:
    """Test accuracy over density (figure 1): a line an arm, the mean over replicates with min–max bars.

    Args:
      results: the columns arm, density and test_accuracy of results.csv.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for arm, rows in results.groupby("arm", sort=False):
        over = 100 * rows.groupby("density")["test_accuracy"].agg(["mean", "min", "max"]).sort_index(
            ascending=False
        )
        axes.errorbar(
            over.index,
            over["mean"],
            # the mean of equal values may miss them by rounding, and matplotlib takes no negative bar
            yerr=[(over["mean"] - over["min"]).clip(lower=0), (over["max"] - over["mean"]).clip(lower=0)],
            label=LABELS.get(arm, arm),
            markersize=3.5,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2,
            **STYLES.get(arm, {}),
        )
    _density_axis(axes, results.query("density > 0")["density"].min())
    axes.set_ylabel("Test accuracy (%)")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file, at print resolution."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _density_axis(axes, lowest):
    """Logarithmic, dense on the left, as in the paper."""
    axes.set_xscale("log")
    end = min(lowest, 0.5) / 1.15
    axes.set_xlim(1.15, end)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in DENSITY_TICKS if tick >= end]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{100 * density:g}"))
    axes.set_xlabel("Density: weights remaining (%)")
