import subprocess
import sys

import numpy as np
import pandas as pd

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


def test_figures_need_no_jax():
    code = "import sys, imp_jax.figures; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
