"""The analysis sublevel on a tiny trained run, against NumPy."""

import contextlib
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis, runs
from imp_jax.analysis import sublevel
from imp_jax.experiment import setup
from imp_jax.workdir.checkpoints import Checkpoints
from imp_jax.workdir.results import read_results
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.numpy_lenet import compute_errors_on_path
from tests.helpers.rounds import take_member

POINTS = 6  # of each line: a quarter of the intervals of a path of 21 points


@pytest.fixture(scope="module", autouse=True)
def _only_sublevel():
    """Let analyses compute no other table."""
    registered = dict(analysis.ANALYSES)
    analysis.ANALYSES.clear()
    analysis.ANALYSES["sublevel"] = registered["sublevel"]
    yield
    analysis.ANALYSES.clear()  # in the order in which they were registered
    analysis.ANALYSES.update(registered)


def analyse(workdir, config):
    """Compute the analysis of a run on the tiny data set, and return its tables."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        experiment = setup(config, make_tiny_dataset(), use_mesh=False)
        analysis.compute(checkpoints, config, lambda: experiment, workdir, read_results(workdir))
    return analysis.load(workdir)


@pytest.fixture(scope="module")
def config():
    return make_tiny_config(**{"analysis.path_points": 21, "optimizer.learning_rate": 0.03, "rounds": 3})


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("sublevel")
    runs.run(config, path, dataset=make_tiny_dataset())
    analyse(path, config)
    return path


def test_rows_match_the_networks_in_numpy(workdir):
    run = analysis.load(workdir)
    dataset = make_tiny_dataset()
    assert len(run.sublevel) == 2 * 2 * 2  # replicates, pairs of rounds, splits
    for row in run.sublevel.itertuples():
        member = run.members(row.round).index(("imp", row.replicate))
        before, after = (take_member(run.round(number), member) for number in (row.round - 1, row.round))
        start, end = before.trained["params"], after.trained["params"]
        projection = {n: {k: start[n][k] * after.mask[n][k] for k in ("kernel", "bias")} for n in start}
        split = getattr(dataset, row.split)
        first, second = (
            compute_errors_on_path(*ends, split.images, split.labels, POINTS)
            for ends in ((start, projection), (projection, end))
        )
        assert [row.error, row.projected_error, row.next_error] == pytest.approx(
            [first[0], second[0], second[-1]], abs=1e-6
        )
        for value, leg in ((row.projection_barrier, first), (row.retraining_barrier, second)):
            assert value == pytest.approx(leg.max() - (leg[0] + leg[-1]) / 2, abs=1e-6)
        highest = max(first.max(), second.max())
        assert row.excess == pytest.approx(highest - max(first[0], second[-1]), abs=1e-6)


def test_nothing_is_recomputed_unless_a_setting_changes(workdir, config, tmp_path, monkeypatch):
    """With a model without statistics, the settings are the baseline and the number of points."""
    called = []
    path_metrics = sublevel.connectivity.path_metrics
    monkeypatch.setattr(
        sublevel.connectivity, "path_metrics", lambda *a, **k: called.append(1) or path_metrics(*a, **k)
    )
    analyse(workdir, config)
    assert not called
    for field, value in (("path_points", 5), ("baseline", "max")):
        changed = config.copy_and_resolve_references()
        changed.analysis[field] = value
        copy = shutil.copytree(workdir, tmp_path / field)
        table = analyse(copy, changed).sublevel
        assert set(table["points"]) == {2 if field == "path_points" else POINTS}
        assert set(table["baseline"]) == {changed.analysis.baseline}
    barrier = table[["error", "projected_error"]].max(axis=1) + table["projection_barrier"]
    highest = table[["error", "next_error"]].max(axis=1) + table["excess"]
    assert (barrier <= highest + 1e-6).all()  # the highest error on the first line, and on both


def test_the_projection_prunes_weights_and_keeps_statistics():
    state = {"batch_stats": {"mean": np.ones(2)}}
    network = SimpleNamespace(params={"kernel": np.array([1.0, -2.0])}, model_state=state)
    projected = sublevel.project(network, {"kernel": np.array([False, True])})
    np.testing.assert_array_equal(projected["params"]["kernel"], [0, -2])
    assert projected["batch_stats"] is state["batch_stats"]


def test_a_run_without_pairs_has_no_figure():
    empty = analysis.ANALYSES["sublevel"].empty_table()
    assert analysis.FIGURES["sublevel"].draw(SimpleNamespace(sublevel=empty)) is None


def make_table(points):
    """Make a table with a mean excess on the test set of `points` in rounds 1, 2, …, and results.csv."""
    rows = [
        {"replicate": replicate, "round": number, "split": split, "excess": excess / 100 + offset}
        for number, excess in enumerate(points, 1)
        for replicate, offset in ((0, 0.001), (1, -0.001))
        for split, offset in (("test", offset), ("train", 0.5))
    ]
    results = pd.DataFrame({"round": range(6), "density": 0.8 ** np.arange(6)})
    return pd.DataFrame(rows), results


def test_the_sentence_names_the_longest_range_of_connected_rounds():
    text = sublevel.describe_sublevel(*make_table([1, 9, 0.5, 1.5, 4]))
    assert text.startswith("From 51 to 41 % density, each solution is in the sublevel set")
    assert "by at most 1.5 points, and at other densities by up to 9.0 points" in text
    text = sublevel.describe_sublevel(*make_table([1, 0.5, 1.5, 0, 1]))
    assert text.startswith("From 80 to 33 % density")
    assert text.endswith("by at most 1.5 points.")
    text = sublevel.describe_sublevel(*make_table([8, 9, 7, 6, 5]))
    assert text.startswith("No solution is in the sublevel set")
    assert text.endswith("by at least 5.0 points.")


def test_the_figure_shows_the_means_of_the_test_set(workdir):
    run = analysis.load(workdir)
    left, right = analysis.FIGURES["sublevel"].draw(run).axes
    means = 100 * run.sublevel.query("split == 'test'").groupby("round").mean(numeric_only=True)
    for axes, columns in (
        (left, ["error", "projected_error", "next_error"]),
        (right, ["projection_barrier", "retraining_barrier", "excess"]),
    ):
        for line, column in zip(axes.containers, columns, strict=True):
            np.testing.assert_allclose(line[0].get_ydata(orig=False), means[column])
