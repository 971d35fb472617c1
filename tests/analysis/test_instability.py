"""The table instability of a tiny run, compared with its own twins."""

import shutil

import jax
import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis
from imp_jax.analysis import instability
from imp_jax.errors import UserError
from imp_jax.figures import PATH_COLORS
from tests.helpers import on_request

SETTINGS = {"instability.steps": (0, 4, 9), "analysis.path_points": 5}
KEYS = ["replicate", "round", "kind", "step", "split"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the workdir of two rounds of 10 steps with twins, and its barriers of twins from three steps."""
    overrides = {"optimizer.learning_rate": 0.03, "optimizer.schedule": "cosine", "instability.rounds": (0, 1)}
    workdir = on_request.train(tmp_path_factory.mktemp("run"), rounds=2, arms=("imp",), **overrides)
    on_request.compute(workdir, "paths", "barriers", "instability", **SETTINGS)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_twins_from_step_0_have_the_barriers_of_the_twins_of_the_run(trained):
    run = analysis.load(trained)
    rows = run.instability.query("step == 0").set_index(KEYS)[["barrier", "loss_barrier"]]
    twins = run.barriers.query("kind == 'instability'").assign(kind="twin", step=0)
    pd.testing.assert_frame_equal(rows.sort_index(), twins.set_index(KEYS)[list(rows)].sort_index())
    assert len(rows) == 2 * 2 * 2
    assert rows["loss_barrier"].abs().min() > 0


def test_twins_that_part_at_the_last_step_have_almost_no_barrier(trained):
    barriers = analysis.load(trained).instability.pivot_table(
        index="step", values="loss_barrier", aggfunc="max"
    )
    assert abs(barriers["loss_barrier"][9]) < 0.05 * barriers["loss_barrier"][0]


def test_perturbed_trainings_have_the_data_order_of_imp(workdir):
    """With noise of rounding size they end where imp does, unlike a twin; with much noise elsewhere."""
    tiny = on_request.compute(workdir, "instability", **SETTINGS, **{"instability.noise": 1e-6})
    large = on_request.compute(workdir, "instability", **SETTINGS, **{"instability.noise": 3.0}).instability
    known = large[(large["noise"] != 3.0)].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        known.sort_values(list(known)[:6]), tiny.instability.sort_values(list(known)[:6])
    )
    for noise, kind in ((0, "twin"), (1e-6, "perturbed"), (3.0, "perturbed")):
        rows = large[large["noise"] == noise]
        assert set(rows["kind"]) == {kind}
        assert len(rows) == 2 * 2 * 2 * 3
    largest = large.query("step == 0").groupby("noise")["loss_barrier"].max()
    assert largest[1e-6] < 0.01 * largest[0]
    assert largest[3.0] > 10 * largest[1e-6]
    figure = analysis.FIGURES["instability_steps"].draw(analysis.load(workdir))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "other data order",
        "noise of 0.0001 % of the weights' norm",
        "noise of 300 % of the weights' norm",
    ]


def test_only_missing_rows_are_computed(workdir, capsys, monkeypatch):
    path = workdir / "analysis" / "instability.csv"
    table = pd.read_csv(path)
    on_request.compute(workdir, "instability", experiment=on_request.refuse, **SETTINGS)
    assert "computing" not in capsys.readouterr().out
    table[(table["round"] == 0) | (table["step"] == 0)].to_csv(path, index=False)
    trainings = []
    train_on = instability.train_on

    def record(experiment, members, masks, start, steps):
        trainings.append((members[0].arm, members[0].round, start.step, len(members)))
        return train_on(experiment, members, masks, start, steps)

    monkeypatch.setattr(instability, "train_on", record)
    on_request.compute(workdir, "instability", **SETTINGS)
    assert trainings == [("twin", 1, 4, 2), ("twin", 1, 9, 2)]
    # imp's 10 steps and the twins' 6 and 1, of 8 images, for two replicates
    assert f"about as much work as {2 * (10 + 6 + 1) * 8 / 46:.3g} epochs" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(path), table)


def test_rows_with_other_settings_of_paths_are_computed_again(workdir):
    before = analysis.load(workdir).instability
    shutil.rmtree(workdir / "checkpoints" / "0")
    run = on_request.compute(workdir, "instability", **SETTINGS, **{"analysis.baseline": "max"})
    assert run.instability.groupby("round")["baseline"].unique().to_dict() == {0: ["mean"], 1: ["max"]}
    assert len(run.instability) == len(before)
    assert (run.instability["loss_barrier"] <= before["loss_barrier"] + 1e-9).all()
    assert (run.instability["loss_barrier"] != before["loss_barrier"])[run.instability["round"] == 1].any()


def test_a_twin_that_diverges_has_nan_barriers(trained, monkeypatch):
    run = analysis.load(trained)
    initial, network, _ = on_request.network(run, 0, "imp", 0)
    inputs = analysis.registry.RunInputs(
        run.results, {}, run.config, {}, None, lambda: on_request.make_experiment(run.config), None
    )
    broken = jax.tree.map(np.array, network)
    broken["params"]["Dense_1"]["bias"][0] = np.inf
    test = inputs.experiment.dataset.test
    assert np.isnan(instability._compute_barriers(inputs, network, broken, test)).all()
    assert np.isfinite(instability._compute_barriers(inputs, network, initial, test)).all()


def test_the_figure_and_the_sentence_show_the_barriers_on_the_test_set(trained):
    run = analysis.load(trained)
    table = run.instability
    barriers = table["round"] / 10 + (9 - table["step"]) / 1000
    run.tables["instability"] = table.assign(barrier=barriers.where(table["split"] == "test", 1.0))
    (axes,) = analysis.FIGURES["instability_steps"].draw(run).axes
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["100 %", "80 %"]
    for handle, values, color in zip(handles, ([0.9, 0.5, 0], [10.9, 10.5, 10]), PATH_COLORS, strict=False):
        np.testing.assert_allclose(handle[0].get_ydata(orig=False), values, atol=1e-9)
        assert handle[0].get_color() == color
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "4", "9"]
    assert analysis.FIGURES["instability_steps"].sentence(run) == (
        "The barriers of twins are, in percentage points of test error, 0.90 from step 0, 0.50 from step 4, "
        "0.00 from step 9 at 100 % density; 10.90 from step 0, 10.50 from step 4, 10.00 from step 9 at 80 % "
        "density."
    )
    run.tables["instability"] = run.instability[:0]
    assert analysis.FIGURES["instability_steps"].draw(run) is None
    assert analysis.FIGURES["instability_steps"].sentence(run) == ""


def test_a_request_that_cannot_be_met_is_refused_before_it_is_stored(workdir):
    config = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"instability.steps is \(\)"):
        analysis.run(workdir, also=("instability",))
    assert (workdir / "config.json").read_bytes() == config
