"""Tables, figures and report of a small trained run, compared with the networks in its checkpoints."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import warnings

import jax
import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from imp_jax import analysis, connectivity, figures, masking, models, runs, similarity, training
from imp_jax import config as configs
from imp_jax.analysis import __main__ as analysis_main
from imp_jax.analysis import report
from imp_jax.errors import UserError
from imp_jax.experiment import setup
from imp_jax.runtime import distributed
from imp_jax.workdir.checkpoints import Checkpoints
from imp_jax.workdir.lock import store_config_file
from imp_jax.workdir.results import read_results
from tests.helpers import ROOT

ROUNDS = 4


@pytest.fixture(scope="module")
def analysed(data_dir, tmp_path_factory):
    """Return the workdir of a narrow LeNet, trained on mnist5k with a twin in round 2, and analysed."""
    config = configs.default()
    config.update({"replicates": 2, "rounds": ROUNDS, "epochs": 1, "batch_size": 100})
    config.dataset.data_dir = data_dir
    config.model.width = 0.1
    config.instability.rounds = (2,)
    config.analysis.path_points = 5
    workdir = tmp_path_factory.mktemp("analysed")
    runs.run(config, workdir, analyses=analysis)
    analysis.run(workdir)
    return workdir


@pytest.fixture
def copy(analysed, tmp_path, one_figure):
    """Return a copy of the analysed workdir that a test may change. Analyses of it draw one figure."""
    return shutil.copytree(analysed, tmp_path / "run")


@pytest.fixture(scope="module")
def run(analysed):
    """Return the config and tables of the analysed run."""
    return analysis.load(analysed)


def get_network(run, number, arm, replicate):
    index = run.members(number).index((arm, replicate))
    networks = run.round(number)
    return jax.tree.map(lambda leaf: leaf[index], networks)


def test_distances_match_the_pairwise_functions_of_the_networks(run):
    assert len(run.distances) == 2 * 2 * 3 * (ROUNDS + 1) ** 2
    distance = run.distances.set_index(["metric", "arm", "replicate", "round_a", "round_b"])["distance"]
    for arm, replicate in (("imp", 1), ("reinit", 0)):
        early, late = (get_network(run, number, arm, replicate) for number in (1, 3))
        initial = get_network(run, 0, arm, replicate)
        for metric, function in similarity.METRICS.items():
            expected = function(early.trained["params"], early.mask, late.trained["params"], late.mask)
            assert distance[metric, arm, replicate, 1, 3] == pytest.approx(float(expected), rel=1e-4)
            assert distance[metric, arm, replicate, 3, 1] == distance[metric, arm, replicate, 1, 3]
            expected = function(initial.initial["params"], initial.mask, late.trained["params"], late.mask)
            assert distance[metric, arm, replicate, -1, 3] == pytest.approx(float(expected), rel=1e-4)
            assert distance[metric, arm, replicate, 2, 2] == 0


def test_mean_accuracies_of_the_agreement_match_the_results(run):
    accuracy = run.results.set_index(["replicate", "arm", "round"])["test_accuracy"]
    assert len(run.agreement) == 4 * (ROUNDS * (ROUNDS - 1) // 2) + ROUNDS * 4 + 2  # members, rounds, twins
    for row in run.agreement.itertuples():
        ends = (row.replicate, row.arm, row.round_a), (row.replicate_b, row.arm_b, row.round_b)
        assert row.mean_accuracy == pytest.approx(accuracy.loc[list(ends)].mean(), abs=1e-6)


def test_masks_of_the_replicates_overlap_as_their_layers_say(run):
    """A round prunes the replicates independently, apart from the densities of their layers."""
    assert set(zip(run.overlap["arm"], run.overlap["arm_b"], strict=True)) == {("imp", "imp")}
    assert run.overlap["round"].tolist() == list(range(ROUNDS))
    np.testing.assert_allclose(run.overlap["jaccard"], run.overlap["chance"], atol=0.05)


def test_both_ends_of_a_path_match_the_results(run):
    paths = run.paths[run.paths["kind"] == "successive"]
    assert len(run.paths) == (ROUNDS - 1 + 1) * 2 * 2 * 5  # pairs and twins, replicates, splits, points
    results = run.results[run.results["arm"] == "imp"].set_index(["replicate", "round"])
    for (replicate, number, split), path in paths.groupby(["replicate", "round", "split"]):
        np.testing.assert_allclose(path["alpha"], np.linspace(0, 1, 5))
        for row, end_round in ((0, number - 1), (-1, number)):
            result = results.loc[(replicate, end_round)]
            assert path["error"].iloc[row] == pytest.approx(1 - result[f"{split}_accuracy"], abs=1e-6)
            assert path["loss"].iloc[row] == pytest.approx(result[f"{split}_loss"], rel=1e-5)


def test_instability_is_the_barrier_between_imp_and_its_twin(run):
    experiment = setup(run.config, use_mesh=False)
    ends = (get_network(run, 2, arm, 1).trained for arm in ("imp", "twin"))
    points = connectivity.linear_path(*ends, 5)
    losses, correct = training.evaluate(points, experiment.dataset.test, spec=experiment.spec)
    row = run.barriers.query("kind == 'instability' and replicate == 1 and split == 'test'")
    assert list(row["round"]) == [2]
    errors = 1 - np.asarray(correct) / 1000
    assert row["barrier"].item() == pytest.approx(errors.max() - (errors[0] + errors[-1]) / 2, abs=1e-6)
    losses = np.asarray(losses)
    assert row["loss_barrier"].item() == pytest.approx(losses.max() - (losses[0] + losses[-1]) / 2, abs=1e-5)


def test_every_round_but_the_first_has_successive_barriers(run):
    successive = run.barriers[run.barriers["kind"] == "successive"]
    assert sorted(successive["round"]) == sorted([*range(1, ROUNDS)] * 4)


def test_weight_statistics_match_the_networks(run):
    threshold = run.results.set_index(["arm", "replicate", "round"])["threshold"]
    statistics = run.weights.set_index(["arm", "replicate", "round"])
    for arm, replicate, number in (("imp", 0, 0), ("reinit", 1, 3)):
        trained, mask = get_network(run, number, arm, replicate)[1:]
        pairs = zip(*(masking.prunable_leaves(tree) for tree in (trained["params"], mask)), strict=True)
        values = np.concatenate([np.asarray(leaf)[np.asarray(keep)] for leaf, keep in pairs])
        row = statistics.loc[(arm, replicate, number)]
        assert row["survivors"] == len(values)
        near_zero = np.mean(np.abs(values) < threshold[arm, replicate, number] / 2)
        assert row["near_zero"] == pytest.approx(near_zero, abs=1e-6)
        z = (values - values.mean()) / values.std()
        assert row["bimodality"] == pytest.approx((np.mean(z**3) ** 2 + 1) / np.mean(z**4), rel=1e-3)
        bins = run.histograms.query("arm == @arm and replicate == @replicate and round == @number")
        assert bins["count"].sum() == len(values)
        inside = (values >= bins["left"].iloc[60]) & (values < bins["right"].iloc[60])
        assert abs(bins["count"].iloc[60] - inside.sum()) <= 1  # a value on an edge may round to either side


def test_survivors_of_the_layers_sum_to_those_of_the_network(run):
    survivors = run.weights.query("arm == 'imp'").set_index(["replicate", "round"])["survivors"]
    by_layer = run.layers.groupby(["replicate", "round"])
    pd.testing.assert_series_equal(by_layer["survivors"].sum(), survivors.sort_index())
    assert (by_layer["weights"].sum() == 784 * 30 + 30 * 10 + 10 * 10).all()
    assert list(run.layers["units"][:3]) == [30, 10, 10]


def test_dead_units_are_counted_by_layer(copy, run):
    """In a checkpoint whose mask leaves two units without inputs and a third one without outputs."""
    networks = run.round(3)
    kernels = {name: np.array(layer["kernel"]) for name, layer in networks.mask.items()}
    kernels["Dense_0"][:, :, :2] = False
    kernels["Dense_1"][:, 2] = False
    mask = {name: {**networks.mask[name], "kernel": kernel} for name, kernel in kernels.items()}
    with contextlib.closing(Checkpoints(copy)) as checkpoints:
        rows = checkpoints.rows(3)
        shutil.rmtree(copy / "checkpoints" / "3")
    with contextlib.closing(Checkpoints(copy)) as checkpoints:
        checkpoints.save(3, networks._replace(mask=mask), rows)
    (copy / "analysis" / "layers.csv").unlink()
    analysis.run(copy)
    layers = analysis.load(copy).layers.query("round == 3 and replicate == 0").set_index("layer")["dead_units"]
    original = run.layers.query("round == 3 and replicate == 0").set_index("layer")["dead_units"]
    assert layers["Dense_0"] == original["Dense_0"] + 3
    assert original["Dense_0"] == 0


def test_only_missing_rows_are_computed(copy, monkeypatch):
    original = {path.name: path.read_text() for path in (copy / "analysis").glob("*.csv")}
    always = [name for name, registered in analysis.ANALYSES.items() if not registered.cost]
    assert {f"{name}.csv" for name in always} == set(original)

    def refuse(*_, **__):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(connectivity, "path_metrics", refuse)
        patch.setattr(similarity, "distance_matrices", refuse)
        patch.setattr(analysis, "setup", refuse)  # the data set is not even opened
        analysis.run(copy)
        (copy / "analysis" / "barriers.csv").unlink()  # computed from paths.csv
        analysis.run(copy)
    paths = pd.read_csv(copy / "analysis" / "paths.csv")
    paths[paths["round"] != 2].to_csv(copy / "analysis" / "paths.csv", index=False)
    (copy / "analysis" / "layers.csv").write_text("damaged")
    (copy / "analysis" / "distances.csv").unlink()
    calls = []
    path_metrics = connectivity.path_metrics

    def count_and_compute(*ends_and_split, **options):
        calls.append(1)
        return path_metrics(*ends_and_split, **options)

    monkeypatch.setattr(connectivity, "path_metrics", count_and_compute)
    analysis.run(copy)
    assert len(calls) == 2 * 2 * 2  # kinds, replicates and splits of round 2
    for name, content in original.items():
        a, b = (pd.read_csv(file) for file in (copy / "analysis" / name, pd.io.common.StringIO(content)))
        pd.testing.assert_frame_equal(a, b, rtol=1e-5)


def test_truncated_tables_are_completed_and_unreadable_ones_moved(copy, capsys):
    folder = copy / "analysis"
    original = {path.name: path.read_text() for path in folder.glob("*.csv")}
    for name in ("histograms", "weights", "layers", "distances", "paths"):
        lines = original[f"{name}.csv"].splitlines(keepends=True)
        (folder / f"{name}.csv").write_text("".join(lines[: len(lines) - 2]))
    analysis.run(copy)
    for name, content in original.items():
        a, b = (pd.read_csv(file) for file in (folder / name, pd.io.common.StringIO(content)))
        pd.testing.assert_frame_equal(a, b, rtol=1e-5)
    capsys.readouterr()
    (folder / "weights.csv").write_bytes(b"\xff" + original["weights.csv"].encode()[1:-1])
    analysis.run(copy)
    assert f"{folder / 'weights.csv'} cannot be read; it is moved to" in capsys.readouterr().err
    assert (copy / "set-aside" / "analysis-weights.csv").exists()
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "weights.csv"),
        pd.read_csv(pd.io.common.StringIO(original["weights.csv"])),
        rtol=1e-5,
    )


def test_tables_of_an_older_definition_are_moved_and_computed_again(copy, capsys):
    """Without definitions.json, tables are of definition 1, which is outdated for `distances` and `layers`."""
    folder = copy / "analysis"
    names = ("distances", "layers")
    original = {name: pd.read_csv(folder / f"{name}.csv") for name in names}
    for name, column in zip(names, ("distance", "dead_units"), strict=True):
        original[name].assign(**{column: 7}).to_csv(folder / f"{name}.csv", index=False)
    (folder / "definitions.json").unlink()
    with pytest.warns(UserWarning, match="earlier version, which defined it differently"):
        assert set(analysis.load(copy).distances["distance"]) == {7}
    analysis.run(copy)
    errors = capsys.readouterr().err
    for name in names:
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name}.csv"), original[name], rtol=1e-5)
        moved = copy / "set-aside" / f"analysis-{name}.csv"
        assert f"{folder / name}.csv was computed by an earlier version" in errors
        assert str(moved) in errors
        assert moved.exists()
    analysis.run(copy)
    assert len(list((copy / "set-aside").iterdir())) == 2
    with warnings.catch_warnings(action="error"):
        analysis.load(copy)


def test_rows_in_another_order_are_sorted(copy):
    path = copy / "analysis" / "distances.csv"
    original = path.read_bytes()
    pd.read_csv(path).sample(frac=1, random_state=0).to_csv(path, index=False, float_format="%.9g")
    assert path.read_bytes() != original
    analysis.run(copy)
    assert path.read_bytes() == original


def test_a_damaged_round_is_left_out_of_the_analyses(copy, capsys):
    shutil.rmtree(copy / "analysis")
    shutil.rmtree(copy / "checkpoints" / "1" / "networks")
    analysis.run(copy)
    assert "checkpoints/1 is damaged" in capsys.readouterr().err
    run = analysis.load(copy)
    assert set(run.weights["round"]) == {0, *range(2, ROUNDS)}
    assert set(run.paths.query("kind == 'successive'")["round"]) == set(range(3, ROUNDS))
    assert 1 not in set(run.distances["round_a"])


def test_missing_columns_are_computed_and_unknown_ones_kept(copy, capsys):
    """A missing column is NaN when loaded, and is computed for rounds on disk; an unknown column is kept."""
    files = {path.stem: path for path in (copy / "analysis").glob("*.csv")}
    original = {name: pd.read_csv(file) for name, file in files.items()}
    original["weights"].drop(columns="near_zero").assign(note="mine").to_csv(files["weights"], index=False)
    original["barriers"].assign(note=range(len(original["barriers"]))).to_csv(files["barriers"], index=False)
    # `layer` identifies the rows: without it the table is of no use
    original["layers"].drop(columns="layer").to_csv(files["layers"], index=False)
    with pytest.warns(match="layers.csv cannot be read; imp_jax.analysis.run"):  # noqa: SIM117
        with pytest.warns(match=r"weights\.csv has no column near_zero; filled with NaN"):
            loaded = analysis.load(copy)
    assert loaded.weights["near_zero"].isna().all()
    pd.testing.assert_series_equal(loaded.weights["bimodality"], original["weights"]["bimodality"])
    assert (loaded.weights["note"] == "mine").all()

    shutil.move(copy / "checkpoints" / "0", copy / "0")
    config = loaded.config
    with contextlib.closing(Checkpoints(copy)) as checkpoints:
        analysis.compute(checkpoints, config, lambda: setup(config, use_mesh=False), copy, read_results(copy))
    loaded = analysis.load(copy)
    deleted = loaded.weights["round"] == 0
    assert loaded.weights["near_zero"].isna().equals(deleted)
    pd.testing.assert_frame_equal(
        loaded.weights[~deleted].drop(columns="note"), original["weights"][~deleted], rtol=1e-5
    )
    assert (loaded.weights["note"][deleted] == "mine").all()
    assert loaded.barriers["note"].tolist() == list(range(len(original["barriers"])))
    pd.testing.assert_frame_equal(
        loaded.layers, original["layers"][original["layers"]["round"] > 0].reset_index(drop=True)
    )
    destination = f"it is moved to {copy / 'set-aside' / 'analysis-layers.csv'}"
    assert f"{files['layers']} cannot be read; {destination}, and computed again\n" == capsys.readouterr().err


def test_the_config_file_of_the_run_is_executed(copy, tmp_path, monkeypatch):
    """It may register a model. The workdir stores its path, and a copy that is executed only on request."""
    monkeypatch.setattr("imp_jax.models.MODELS", dict(models.MODELS))
    monkeypatch.setattr(analysis, "draw", lambda run: {})
    stored = json.loads((copy / "config.json").read_text())
    stored["model"]["name"] = "mine"
    (copy / "config.json").write_text(json.dumps(stored))
    (copy / "analysis" / "layers.csv").unlink()
    config_file = tmp_path / "own.py"
    config_file.write_text(
        "from imp_jax import config, models\n\n"
        "def get_config(name):\n"
        "    models.MODELS[name] = models.MODELS['lenet']\n"
        "    return config.default()\n"
    )
    store_config_file(copy, f"{config_file}:mine")
    assert (copy / "config_file.py").read_text() == config_file.read_text()

    def analyse(*arguments):
        monkeypatch.setattr(sys, "argv", ["analysis", f"--workdir={copy}", *arguments])
        analysis_main.main()

    moved = config_file.rename(tmp_path / "moved.py")
    with pytest.raises(SystemExit) as error:
        analyse()
    message = str(error.value)
    assert message.startswith("error: model.name is 'mine'; it should be one of lenet,")
    assert f"if {config_file}:mine, the config file of the run, registers it" in message
    assert f"--config=PATH executes it, or the copy {copy / 'config_file.py'}" in message
    with pytest.raises(SystemExit, match=r"cannot execute the config file .*/moved.py: .*get_config"):
        analyse(f"--config={moved}")
    analyse(f"--config={moved}:mine")
    layers = (copy / "analysis" / "layers.csv").read_bytes()
    del models.MODELS["mine"]
    (copy / "analysis" / "layers.csv").unlink()
    moved.rename(config_file)
    analyse()
    assert (copy / "analysis" / "layers.csv").read_bytes() == layers


def test_the_copy_of_the_config_file_stays_once_a_round_is_recorded(copy, tmp_path, capsys):
    config_file, new = tmp_path / "own.py", tmp_path / "new"
    new.mkdir()
    for text in ("first", "second"):
        config_file.write_text(text)
        for workdir in (copy, new):
            store_config_file(workdir, str(config_file))
    assert (copy / "config_file.py").read_text() == "first"
    assert (new / "config_file.py").read_text() == "second"  # no round is recorded
    assert capsys.readouterr().err == (
        f"{config_file} has changed since the rounds in {copy} were trained; "
        f"{copy / 'config_file.py'} is a copy of the earlier text; give another --workdir if the model or the "
        f"data set has changed\n"
    )


def test_the_config_file_is_only_named_in_errors_about_unknown_names(copy, tmp_path):
    store_config_file(copy, f"{tmp_path}/own.py")
    stored = json.loads((copy / "config.json").read_text())
    stored["batch_size"] = 5000
    (copy / "config.json").write_text(json.dumps(stored))
    (copy / "analysis" / "layers.csv").unlink()
    with pytest.raises(UserError, match="batch_size is 5000; mnist5k has 4000 training images") as error:
        analysis.run(copy)
    assert "own.py" not in str(error.value)


def test_a_run_on_another_data_set_is_refused(copy):
    stored = json.loads((copy / "dataset.json").read_text())
    assert stored == {"train_examples": 4000, "test_examples": 1000, "num_classes": 10, "classes": []}
    (copy / "dataset.json").write_text(json.dumps(stored | {"train_examples": 5000}))
    (copy / "analysis" / "layers.csv").unlink()
    with pytest.raises(UserError, match="begun with another data set: 5,000 training and 1,000 test images"):
        analysis.run(copy)


def test_a_run_without_a_readable_round_still_has_a_report(copy, capsys):
    shutil.rmtree(copy / "analysis")
    for number in range(ROUNDS):
        shutil.rmtree(copy / "checkpoints" / str(number) / "networks")
    analysis.run(copy)
    assert capsys.readouterr().err.count("is left out of the analyses") == ROUNDS
    assert len(analysis.load(copy).distances) == 0
    assert "accuracy" in (copy / "report.html").read_text()


def test_a_figure_that_cannot_be_drawn_is_skipped_with_a_message(analysed, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(analysed, tmp_path / "run")

    def fail_once(figure, *arguments):
        if not failed:
            failed.append(figure)
            raise RuntimeError("Failed to process string with tex because latex could not be found")
        return b"picture"

    failed = []
    monkeypatch.setattr(figures, "to_bytes", fail_once)
    pngs = analysis.draw(analysis.load(copy))
    assert "accuracy" not in pngs
    assert len(pngs) == 11
    message = capsys.readouterr().err
    assert message.startswith(
        f"{copy / 'figures' / 'accuracy.png'} is missing, as it cannot be drawn: RuntimeError"
    )
    assert message.count("\n") == 1


def test_a_single_missing_round_of_paths_is_computed(copy):
    """Its paths start in the round before, whose networks no other missing row needs."""
    file = copy / "analysis" / "paths.csv"
    original = pd.read_csv(file)
    original[(original["round"] != 2) | (original["kind"] != "successive")].to_csv(file, index=False)
    analysis.run(copy)
    pd.testing.assert_frame_equal(pd.read_csv(file), original, rtol=1e-5)


def test_analysis_settings_of_a_finished_run_may_change(copy):
    config = analysis.load(copy).config
    config.analysis.baseline, config.analysis.path_points = "max", 3
    runs.run(config, copy, analyses=analysis)
    analysis.run(copy)
    run = analysis.load(copy)
    assert len(run.paths) == (ROUNDS - 1 + 1) * 2 * 2 * 3
    for key, path in run.paths.groupby(["replicate", "kind", "round", "split"]):
        errors = path["error"].to_numpy()
        row = run.barriers.set_index(["replicate", "kind", "round", "split"]).loc[key]
        assert row["barrier"] == pytest.approx(errors.max() - max(errors[0], errors[-1]), abs=1e-6)
    experiment = setup(config, use_mesh=False)
    config.analysis.batch_norm = "reestimate"  # after `setup`, which refuses it for networks without BatchNorm
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        path_metrics = connectivity.path_metrics
        patch.setattr(connectivity, "path_metrics", lambda *a, **k: calls.append(k) or path_metrics(*a, **k))
        with contextlib.closing(Checkpoints(copy)) as checkpoints:
            analysis.compute(checkpoints, config, lambda: experiment, copy, read_results(copy))
    assert {(k["batch_norm"], k["train"].examples) for k in calls} == {("reestimate", 4000)}
    assert set(analysis.load(copy).paths["batch_norm"]) == {"reestimate"}


def test_truncated_results_are_repaired(copy):
    content = (copy / "results.csv").read_text()
    (copy / "results.csv").write_text(content[: len(content) // 2])
    analysis.run(copy)
    assert (copy / "results.csv").read_text() == content


def test_the_finished_rounds_of_an_unfinished_run_are_analysed(copy):
    for number in (2, 3):
        shutil.rmtree(copy / "checkpoints" / str(number))
    shutil.rmtree(copy / "analysis")
    analysis.run(copy)
    run = analysis.load(copy)
    assert set(run.distances["round_a"]) == {-1, 0, 1}
    assert set(run.paths["round"]) == {1}


def test_a_terminal_shows_a_progress_bar(copy, monkeypatch):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80)
    monkeypatch.setattr("imp_jax.analysis.computation.make_console", lambda: console)
    shutil.rmtree(copy / "analysis")
    analysis.run(copy)
    assert "analysing" in terminal.getvalue()


def test_analyses_do_not_call_global_max(copy, monkeypatch):
    def refuse(value):
        raise AssertionError("only process 0 analyses: a collective would wait for the other processes")

    monkeypatch.setattr(distributed, "global_max", refuse)
    shutil.rmtree(copy / "analysis")
    analysis.run(copy)
    assert set(analysis.load(copy).distances["round_a"]) == {-1, *range(ROUNDS)}


def test_every_figure_is_drawn_as_png_and_pdf(analysed):
    names = {"accuracy", "threshold", "histograms", "barriers", "instability", "sublevel", "permuted_paths"}
    names |= {"agreement", "overlap"}
    names |= {f"distances_{metric}" for metric in ("angular", "cosine", "euclidean")}
    assert {path.name for path in (analysed / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")
    }
    assert (analysed / "figures" / "barriers.png").read_bytes().startswith(b"\x89PNG")
    assert (analysed / "figures" / "barriers.pdf").read_bytes().startswith(b"%PDF")


def test_the_report_is_one_file_with_all_figures_and_numbers(analysed, run):
    report = (analysed / "report.html").read_text()
    assert len(re.findall(r'<img alt="\w+" src="data:image/png;base64,', report)) == 12
    assert not re.findall(r'(?:src|href)="(?!data:)', report)
    means = 100 * run.results.query("arm == 'imp'").groupby("round")["test_accuracy"].mean()
    for mean in means:
        assert f"{mean:.2f} (" in report
    assert "&quot;path_points&quot;: 5" in report
    barriers = run.barriers.query("split == 'test'").groupby(["kind", "round"])["barrier"].mean()
    for mean_barrier in barriers:
        assert f"<td>{100 * mean_barrier:.2f}</td>" in report
    dead = run.layers.groupby("round")[["dead_units", "units"]].sum()
    for share in dead["dead_units"] / dead["units"]:
        assert f"<td>{share:.1%}</td>" in report


def test_the_report_omits_dead_units_if_the_units_are_unknown(run):
    layers = run.layers.assign(units=np.nan, dead_units=np.nan)
    unknown = dataclasses.replace(run, tables={**run.tables, "layers": layers})
    assert "dead units" not in report._results(unknown)
    assert (report._results(run)["dead units"].str.endswith("%")).all()


def test_figures_show_the_values_of_the_tables(run):
    left, right = figures.barriers(run.paths, run.barriers, run.results).axes
    expected = run.paths.query("kind == 'successive' and split == 'test' and round == 1")
    np.testing.assert_allclose(left.lines[0].get_ydata(), 100 * expected.groupby("alpha")["error"].mean())
    assert len(left.get_legend().get_texts()) == 3
    barriers = run.barriers.query("kind == 'successive' and split == 'test'").groupby("round")["barrier"].mean()
    np.testing.assert_allclose(right.lines[0].get_ydata(orig=False), 100 * barriers)

    test, train = right.containers
    assert [test.get_label(), train.get_label()] == ["test set", "train set"]
    thresholds = figures.threshold(run.results).axes[0].lines[0].get_ydata(orig=False)
    expected = run.results.query("arm == 'imp'").groupby("round")["threshold"].mean()
    np.testing.assert_allclose(thresholds, expected)

    imp_axes, reinit_axes, _ = figures.distances(run.distances, "cosine").axes
    cosine = run.distances.query("metric == 'cosine'")
    for axes, arm in ((imp_axes, "imp"), (reinit_axes, "reinit")):
        expected = cosine[cosine["arm"] == arm].groupby(["round_a", "round_b"])["distance"].mean()
        shown = axes.images[0].get_array()
        assert shown[1, 3] == pytest.approx(expected[1, 3])
        assert shown[-1, 2] == pytest.approx(expected[-1, 2])  # the initialisation comes last
        assert axes.images[0].get_clim() == imp_axes.images[0].get_clim()
    assert [label.get_text() for label in imp_axes.get_xticklabels()][-1] == "init"

    panels = figures.histograms(run.histograms).axes  # round 10 by default, or else the last round
    assert [axes.get_title() for axes in panels] == ["IMP, round 3", "random reinitialisation, round 3"]
    assert panels[0].patches[0].get_data().values.sum() == pytest.approx(100)
    instability = figures.instability(run.barriers, run.results).axes[0]
    expected = run.barriers.query("kind == 'instability' and split == 'test'")["barrier"].mean()
    assert instability.lines[0].get_ydata(orig=False) == pytest.approx([100 * expected])


def test_figures_of_missing_rows_raise_a_value_error(run):
    with pytest.raises(ValueError, match=r"rounds is \[0\]; the paths end in the rounds \[1, 2, 3\]"):
        figures.barriers(run.paths, run.barriers, run.results, rounds=[0])
    with pytest.raises(ValueError, match="no distances of metric 'angle'"):
        figures.distances(run.distances, "angle")
    with pytest.raises(ValueError, match="no barriers of kind 'instability'"):
        figures.instability(run.barriers[run.barriers["kind"] != "instability"], run.results)


def test_folders_that_cannot_be_analysed_raise_a_user_error(copy, tmp_path):
    with pytest.raises(UserError, match=r"is not the workdir of a run: it has no config\.json"):
        analysis.run(tmp_path)
    for data_dir, sentence in (("", "--data_dir is empty"), ("~nobody-here", "--data_dir is '~nobody-here'")):
        with pytest.raises(UserError, match=sentence):
            analysis.run(copy, data_dir=data_dir)
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot write the analyses of"):
        analysis.run(copy)
    shutil.rmtree(copy / "checkpoints" / "1" / "networks")
    with pytest.raises(UserError, match=r"the checkpoint .*/checkpoints/1 is damaged"):
        analysis.load(copy).round(1)
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no finished round to analyse"):
        analysis.run(copy)
    with pytest.raises(UserError, match=r"has no round 1; it has \[\]"):
        analysis.load(copy).round(1)
    stored = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(stored | {"colour": 1}))
    with pytest.raises(UserError, match="there is no config field colour"):
        analysis.run(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json as a config"):
        analysis.run(copy)


def test_the_command_takes_another_data_dir_and_reports_errors(copy, tmp_path):
    def run_command(*arguments):
        command = [sys.executable, "-m", "imp_jax.analysis", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    (copy / "report.html").unlink()
    (copy / "analysis" / "paths.csv").unlink()
    stored = json.loads((copy / "config.json").read_text())
    data_dir = stored["dataset"]["data_dir"]
    stored["dataset"]["data_dir"] = "/moved"
    (copy / "config.json").write_text(json.dumps(stored))
    finished = run_command(f"--workdir={copy}", f"--data_dir={data_dir}")
    assert finished.returncode == 0, finished.stderr
    assert f"report:  {copy / 'report.html'}" in finished.stdout
    assert (copy / "report.html").exists()
    refused = run_command(f"--workdir={tmp_path / 'absent'}")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "absent is not the workdir of a run" in refused.stderr


def test_the_explore_run_notebook_draws_six_figures(analysed, monkeypatch):
    monkeypatch.setenv("IMP_WORKDIR", str(analysed))
    notebook = nbformat.read(ROOT / "experiments" / "notebooks" / "explore_run.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / "experiments" / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
