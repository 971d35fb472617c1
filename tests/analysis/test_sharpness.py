"""The table sharpness of a tiny run, compared with dense Hessians."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax.flatten_util import ravel_pytree

from imp_jax import analysis, masking
from imp_jax.analysis import sharpness
from imp_jax.models.lenet import LeNet
from tests.helpers import on_request

ROUNDS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the workdir of two rounds, the second with a twin, whose sharpness is computed on 20 images."""
    overrides = {"replicates": 1, "rounds": ROUNDS, "instability.rounds": (1,), "accumulate_steps": 2}
    workdir = on_request.train(tmp_path_factory.mktemp("run"), **overrides)
    on_request.compute(workdir, "sharpness", **{"analysis.images": 23})
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def dense_hessian(params, mask, images, labels):
    """Compute the Hessian of the mean cross-entropy with respect to the surviving weights."""
    flat, unravel = ravel_pytree(params)
    kept, _ = ravel_pytree(jax.tree.map(np.logical_and, mask, masking.prunable(mask)))

    def loss(flat):
        logits = LeNet(3, (6, 5)).apply({"params": unravel(flat)}, images)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])

    kept = np.flatnonzero(kept)
    return np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64)[np.ix_(kept, kept)]


def test_rows_match_the_dense_hessian_of_each_network(trained):
    """23 images are 5 batches of 4, because a batch of 8 is computed in two parts."""
    run = analysis.load(trained)
    rows = run.sharpness.set_index(["arm", "replicate", "round"])
    assert sorted(rows.index) == [(arm, 0, n) for arm in ("imp", "reinit") for n in range(ROUNDS)]
    assert set(rows["images"]) == {23}
    images, labels = on_request.subset(20)
    for (arm, replicate, number), row in rows.iterrows():
        _, trained_variables, mask = on_request.network(run, number, arm, replicate)
        hessian = dense_hessian(trained_variables["params"], mask, images, labels)
        assert row["largest_eigenvalue"] == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=2e-3)
        off_diagonal = hessian - np.diag(np.diag(hessian))
        error = np.sqrt(2 * np.sum(off_diagonal**2) / sharpness.PROBES)
        assert row["trace"] == pytest.approx(np.trace(hessian), abs=4 * error)
        assert error / 4 < row["trace_error"] < 4 * error


def test_only_missing_rows_are_computed(workdir, capsys):
    path = workdir / "analysis" / "sharpness.csv"
    table = pd.read_csv(path)
    on_request.compute(workdir, "sharpness", experiment=on_request.refuse, **{"analysis.images": 23})
    assert "computing" not in capsys.readouterr().out
    table[table["round"] == 0].to_csv(path, index=False)
    on_request.compute(workdir, "sharpness", **{"analysis.images": 23})
    assert "computing sharpness, which analysis.also asks for: about as much work as" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(path), table, rtol=1e-6)
    run = on_request.compute(workdir, "sharpness", **{"analysis.images": 8})
    assert set(run.sharpness["images"]) == {8}
    assert set(run.sharpness["trace"]).isdisjoint(table["trace"])


def test_all_rounds_and_arms_share_two_programs(workdir):
    for program in sharpness._programs():
        program.clear_cache()
    (workdir / "analysis" / "sharpness.csv").unlink()
    run = on_request.compute(workdir, "sharpness", **{"analysis.images": 23})
    assert len(run.sharpness) == 2 * ROUNDS
    assert [program._cache_size() for program in sharpness._programs()] == [1, 1]


def test_rows_of_a_network_that_is_not_finite_are_nan(workdir):
    def break_imp(networks):
        networks.trained["params"]["Dense_0"]["kernel"][0, 0, 0] = np.nan
        return networks

    on_request.replace_networks(workdir, 1, break_imp)
    (workdir / "analysis" / "sharpness.csv").unlink()
    run = on_request.compute(workdir, "sharpness", **{"analysis.images": 23})
    values = run.sharpness.set_index(["arm", "round"])[["largest_eigenvalue", "trace", "trace_error"]]
    assert values.loc[("imp", 1)].isna().all()
    assert values.drop(("imp", 1)).notna().all(axis=None)
    assert sharpness.draw(run.sharpness, run.results).axes[0].get_ylabel().startswith("Largest eigenvalue")


def test_cost_counts_the_gradients_of_missing_rows(workdir):
    run = analysis.load(workdir)
    costs = []

    def count(config):
        raise StopIteration

    for images in (23, 8):
        run.config.analysis.images = images
        inputs = analysis.registry.RunInputs(
            run.results, run.tables, run.config, {n: run.members(n) for n in range(ROUNDS)}, None, count, None
        )
        costs.append(sharpness.estimate_cost(inputs))
    assert costs == [0, 4 * 8 * 2 * (16 + 40)]  # four networks; a product is two gradients


def test_the_figure_and_the_sentence_show_the_means(trained):
    run = analysis.load(trained)
    figure = analysis.FIGURES["sharpness"].draw(run)
    for axes, column in zip(figure.axes, ("largest_eigenvalue", "trace"), strict=True):
        line = axes.get_lines()[0].get_ydata(orig=False)
        np.testing.assert_allclose(line, run.sharpness.query("arm == 'imp'")[column])
    first, last = (row for _, row in run.sharpness.query("arm == 'imp'").iterrows())
    assert analysis.FIGURES["sharpness"].sentence(run) == (
        f"At 100 % density the largest eigenvalue of imp is {first['largest_eigenvalue']:.3g} and the trace "
        f"{first['trace']:.3g} nats per squared weight; at 80 % they are {last['largest_eigenvalue']:.3g} and "
        f"{last['trace']:.3g}."
    )
    empty = analysis.load(trained)
    empty.tables["sharpness"] = run.sharpness[:0]
    assert analysis.FIGURES["sharpness"].draw(empty) is None
    assert analysis.FIGURES["sharpness"].sentence(empty) == ""
