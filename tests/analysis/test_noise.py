"""The table noise of a tiny run, compared with gradients computed in NumPy."""

import shutil

import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis
from imp_jax.analysis import noise
from tests.helpers import on_request

SETTINGS = {"analysis.images": 20, "analysis.noise_rounds": (0, 1, 7), "analysis.noise_epochs": (0, 1, 2)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the workdir of two rounds of two epochs, whose noise is computed in batches of 2 and 20."""
    workdir = on_request.train(tmp_path_factory.mktemp("run"), rounds=2, arms=("imp", "reinit"))
    on_request.compute(workdir, "noise", **SETTINGS)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def gradient(params, mask, images, labels):
    """Compute the gradient of the mean cross-entropy of LeNet by backpropagation, as one vector."""
    weights, biases = (
        [np.asarray(params[f"Dense_{i}"][n], float) for i in range(3)] for n in ("kernel", "bias")
    )
    inputs = [images.reshape(len(images), -1)]
    for i in range(2):
        inputs.append(np.maximum(inputs[-1] @ weights[i] + biases[i], 0))
    logits = inputs[-1] @ weights[2] + biases[2]
    error = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[labels]) / len(labels)
    parts = []
    for i in (2, 1, 0):
        parts += [(inputs[i].T @ error)[mask[f"Dense_{i}"]["kernel"]], error.sum(0)]
        error = (error @ weights[i].T) * (inputs[i] > 0)
    return np.concatenate(parts)


def estimate(params, mask):
    """Estimate ‖G‖² and tr Σ from ten batches of 2 images and the batch of all 20."""
    images, labels = on_request.subset(20)
    small = [gradient(params, mask, images[i : i + 2], labels[i : i + 2]) for i in range(0, 20, 2)]
    small, big = np.mean([g @ g for g in small]), gradient(params, mask, images, labels)
    big = big @ big
    return (20 * big - 2 * small) / 18, (small - big) / (1 / 2 - 1 / 20)


def test_noise_at_the_start_and_the_end_of_a_training_matches_numpy(trained):
    run = analysis.load(trained)
    rows = run.noise.set_index(["replicate", "round", "epoch"])
    assert sorted(rows.index) == [(r, n, e) for r in range(2) for n in range(2) for e in range(3)]
    assert set(rows["images"]) == {20}
    assert set(rows["batch_size"]) == {8}
    for replicate in range(2):
        for number in range(2):
            initial, network, mask = on_request.network(run, number, "imp", replicate)
            for epoch, variables in ((0, initial), (2, network)):
                row = rows.loc[(replicate, number, epoch)]
                expected = estimate(variables["params"], mask)
                scale = abs(expected[1])  # ‖G‖² is a difference, with an error of rounding of this size
                np.testing.assert_allclose(
                    row[["gradient", "variance"]], expected, rtol=1e-3, atol=1e-5 * scale
                )
                if expected[0] > 0.01 * scale:
                    assert row["noise_scale"] == pytest.approx(expected[1] / expected[0], rel=5e-3)
    gradients = rows["gradient"].unstack()
    assert (gradients[1] != gradients[0]).all()
    assert (gradients[1] != gradients[2]).all()
    assert (rows["noise_scale"].isna() == (rows["gradient"] <= 0)).all()


def test_only_missing_rows_are_computed(workdir, capsys):
    path = workdir / "analysis" / "noise.csv"
    table = pd.read_csv(path)
    on_request.compute(workdir, "noise", experiment=on_request.refuse, **SETTINGS)
    table[(table["round"] == 0) | (table["epoch"] == 2)].to_csv(path, index=False)
    on_request.compute(workdir, "noise", **SETTINGS)
    printed = capsys.readouterr().out
    # two replicates of 5 steps of 8 images, and 20 images at two epochs, of 33 images an epoch
    assert f"about as much work as {2 * (40 + 40) / 46:.3g} epochs" in printed
    pd.testing.assert_frame_equal(pd.read_csv(path), table)
    # without its checkpoint, the rows of a round are kept, also if more images are asked for
    shutil.rmtree(workdir / "checkpoints" / "0")
    run = on_request.compute(workdir, "noise", **{**SETTINGS, "analysis.images": 30})
    assert run.noise.groupby("round")["images"].unique().to_dict() == {0: [20], 1: [30]}


def test_a_damaged_round_and_a_workdir_without_imp_have_no_rows(workdir, capsys):
    path = workdir / "analysis" / "noise.csv"
    path.unlink()
    shutil.rmtree(workdir / "checkpoints" / "1" / "networks")
    run = on_request.compute(workdir, "noise", **SETTINGS)
    assert set(run.noise["round"]) == {0}
    assert "checkpoints/1 is damaged" in capsys.readouterr().err
    path.unlink()
    results = pd.read_csv(workdir / "results.csv")
    inputs = analysis.registry.RunInputs(
        results[results["arm"] == "reinit"],
        {"noise": analysis.ANALYSES["noise"].empty_table()},
        run.config,
        {0: tuple(m for m in run.members(0) if m.arm == "reinit")},
        *[lambda *_: pytest.fail("the networks are not needed")] * 3,
    )
    assert list(noise.compute_noise(inputs)) == []
    assert noise.estimate_cost(inputs) == 0


def test_a_network_that_is_not_finite_has_nan_rows(workdir):
    def break_imp(networks):
        networks.initial["params"]["Dense_0"]["kernel"][0, 0, 0] = np.nan
        return networks

    (workdir / "analysis" / "noise.csv").unlink()
    on_request.replace_networks(workdir, 1, break_imp)
    rows = on_request.compute(workdir, "noise", **SETTINGS).noise.set_index(["replicate", "round"])
    assert rows.loc[(0, 1), ["gradient", "variance", "noise_scale"]].isna().all(axis=None)
    assert rows.drop((0, 1))["variance"].notna().all()


def test_batches_fit_small_sets_and_images(trained):
    run = analysis.load(trained)
    experiment = on_request.make_experiment(run.config)
    variables, mask = (
        {"params": {name: {k: v[None] for k, v in layer.items()} for name, layer in tree.items()}}
        for tree in (on_request.network(run, 0, "imp", 0)[i] for i in (1, 2))
        for tree in (tree.get("params", tree),)
    )
    for images in (1, 7, 10**6):
        estimates = noise.compute_noise_scales(experiment, variables, mask["params"], images)
        assert np.isfinite(estimates.variance).all()


def test_the_figure_and_the_sentence_show_the_estimates(trained):
    run = analysis.load(trained)
    table = run.noise.assign(
        gradient=1.0, variance=run.noise["epoch"] + 2.0, noise_scale=run.noise["epoch"] + 2.0
    )
    run.tables["noise"] = table
    axes = analysis.FIGURES["noise"].draw(run).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert "batch size, 8" in lines
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["batch size, 8", "at the start", "after 1 epoch", "after 2 epochs"]
    assert [list(h[0].get_ydata(orig=False)) for h in handles[1:]] == [[2, 2], [3, 3], [4, 4]]
    assert analysis.FIGURES["noise"].sentence(run) == (
        "The noise scale is 2 images at 100 % density and 2 at 80 % at the start; 3 images at 100 % density "
        "and 3 at 80 % after 1 epoch; 4 images at 100 % density and 4 at 80 % after 2 epochs; the run has "
        "batches of 8 images."
    )
    run.tables["noise"] = run.noise[:0]
    assert analysis.FIGURES["noise"].draw(run) is None
    assert analysis.FIGURES["noise"].sentence(run) == ""
