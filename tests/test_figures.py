import io
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
from IPython.core.formatters import DisplayFormatter

from imp_jax import figures


def results():
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        {"arm": arm, "replicate": replicate, "density": 0.8**number, "test_accuracy": draw.uniform(0.8, 0.9)}
        for number in range(25)
        for arm in ("imp", "reinit")
        for replicate in range(3)
    )


def test_accuracy_draws_means_with_min_and_max():
    table = results()
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


def test_one_round_and_an_unknown_arm_are_drawn_too():
    table = pd.DataFrame({"arm": ["other"], "density": [1.0], "test_accuracy": [0.5]})
    assert figures.to_bytes(figures.accuracy(table)).startswith(b"\x89PNG")


def test_equal_replicates_are_drawn():
    """The mean of equal values can lie outside them, by rounding."""
    accuracies = np.linspace(0.1, 0.9, 50).repeat(3)
    densities = np.geomspace(1, 0.01, 50).repeat(3)
    figures.accuracy(pd.DataFrame({"arm": "imp", "density": densities, "test_accuracy": accuracies}))


def test_a_notebook_shows_a_picture():
    data, _ = DisplayFormatter().format(figures.accuracy(results()))
    assert data["image/png"].startswith(b"\x89PNG")


def test_styles_of_the_user_change_nothing():
    """Nor end anything: without LaTeX `text.usetex` is an error when a figure is drawn."""
    pairs = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    table = pd.DataFrame(pairs, columns=["round_a", "round_b"])
    table = table.assign(arm="imp", metric="angular", distance=abs(table["round_a"] - table["round_b"]) / 2)

    def drawn():
        yield from (figures.to_bytes(figures.accuracy(results()), kind) for kind in ("png", "pdf"))
        figure = figures.distances(table)
        yield figure._repr_png_()
        figure.savefig(own := io.BytesIO(), dpi=50)
        yield own.getvalue()

    expected = list(drawn())
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "axes.facecolor": "k"}):
        assert list(drawn()) == expected


def test_figures_need_no_jax():
    code = "import sys, imp_jax.figures; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
