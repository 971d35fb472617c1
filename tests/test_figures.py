import io
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
from IPython.core.formatters import DisplayFormatter

from imp_jax import figures


def make_results():
    """Return random results of 25 rounds, two arms and three replicates."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"arm": arm, "replicate": replicate, "density": 0.8**number, "test_accuracy": rng.uniform(0.8, 0.9)}
        for number in range(25)
        for arm in ("imp", "reinit")
        for replicate in range(3)
    )


def test_accuracy_shows_the_mean_with_min_and_max():
    table = make_results()
    axes = figures.accuracy(table).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.xaxis_inverted()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["IMP", "random reinitialisation"]
    for container, arm in zip(axes.containers, ("imp", "reinit"), strict=True):
        line, _, (bars,) = container.lines
        rows = table[table["arm"] == arm].groupby("density")["test_accuracy"]
        densities = sorted(set(table["density"]), reverse=True)
        np.testing.assert_allclose(line.get_xdata(orig=False), densities)
        np.testing.assert_allclose(line.get_ydata(orig=False), 100 * rows.mean()[densities])
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends[:, 0], 100 * rows.min()[densities])
        np.testing.assert_allclose(ends[:, 1], 100 * rows.max()[densities])
        assert line.get_linestyle() == {"imp": "-", "reinit": "--"}[arm]


def test_accuracy_accepts_one_round_and_an_unknown_arm():
    table = pd.DataFrame({"arm": ["other"], "density": [1.0], "test_accuracy": [0.5]})
    assert figures.to_bytes(figures.accuracy(table)).startswith(b"\x89PNG")


def test_accuracy_accepts_equal_replicates():
    """By rounding, the mean of equal values can differ from them, which would make error bars negative."""
    accuracies = np.linspace(0.1, 0.9, 50).repeat(3)
    densities = np.geomspace(1, 0.01, 50).repeat(3)
    figures.accuracy(pd.DataFrame({"arm": "imp", "density": densities, "test_accuracy": accuracies}))


def test_notebook_displays_a_figure_as_png():
    data, _ = DisplayFormatter().format(figures.accuracy(make_results()))
    assert data["image/png"].startswith(b"\x89PNG")


def test_matplotlib_styles_of_the_user_do_not_change_figures():
    """They raise no error either: `text.usetex` would be an error on a machine without LaTeX."""
    pairs = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    table = pd.DataFrame(pairs, columns=["round_a", "round_b"])
    table = table.assign(arm="imp", metric="angular", distance=abs(table["round_a"] - table["round_b"]) / 2)

    def draw_figures():
        yield from (figures.to_bytes(figures.accuracy(make_results()), kind) for kind in ("png", "pdf"))
        figure = figures.distances(table)
        yield figure._repr_png_()
        figure.savefig(file := io.BytesIO(), dpi=50)
        yield file.getvalue()

    expected = list(draw_figures())
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "axes.facecolor": "k"}):
        assert list(draw_figures()) == expected


def test_figures_do_not_import_jax():
    code = "import sys, imp_jax.figures; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
