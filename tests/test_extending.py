"""A project outside of the repository adds a model, data set, score, arm, analysis and optimizer of its own."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from tests.helpers import ROOT

CONFIG = ROOT / "tests" / "helpers" / "outside_config.py"


def run(folder, module, *arguments):
    """Run a module of the repository in a folder; return its stdout."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return the workdir of a finished run of the project."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(CONFIG, folder / "mine.py")
    run(folder, "imp_jax.main", f"--config={folder / 'mine.py'}")
    return folder / "runs" / "mine"


def test_config_file_has_at_most_80_lines():
    assert len(CONFIG.read_text().splitlines()) <= 80


def test_all_arms_train_under_the_masks_of_the_users_score(workdir):
    results = pd.read_csv(workdir / "results.csv")
    assert list(results[results["round"] == 1]["arm"].unique()) == ["imp", "reinit", "negated", "twin"]
    by_round = results.groupby("round")["density"].unique().map(list)
    assert [len(densities) for densities in by_round] == [1, 1, 1]
    assert np.allclose([densities[0] for densities in by_round], [1, 0.8, 0.64], atol=0.01)
    accuracy = results[results["round"] == 0].groupby("arm")["test_accuracy"].mean()
    assert (accuracy > 0.6).all()  # chance is 0.25


def test_users_analysis_writes_a_table_of_all_networks(workdir):
    table = pd.read_csv(workdir / "analysis" / "norms.csv")
    assert list(table.columns) == ["replicate", "arm", "round", "norm"]
    assert len(table) == 3 * 2 * 3  # arms, replicates, rounds
    assert (table["norm"] > 0).all()


def test_figures_and_report_are_written(workdir):
    assert "norms" in (workdir / "report.html").read_text()
    assert (workdir / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_analysis_command_computes_a_missing_table(workdir):
    table = workdir / "analysis" / "norms.csv"
    expected = pd.read_csv(table)
    table.unlink()
    run(workdir.parents[1], "imp_jax.analysis", f"--workdir={workdir}")
    pd.testing.assert_frame_equal(pd.read_csv(table), expected)
