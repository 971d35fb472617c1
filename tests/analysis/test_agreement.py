"""The analysis agreement, compared with predictions that NumPy computes from the checkpoints."""

import contextlib
import functools
import itertools
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis, training
from imp_jax.analysis import agreement
from imp_jax.data import InMemory
from imp_jax.runtime.execution import EXECUTION_MODES
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_experiment
from tests.helpers import random_runs

KEYS = ["replicate", "arm", "round_a", "replicate_b", "arm_b", "round_b"]
VALUES = ["agreement", "ensemble_accuracy", "mean_accuracy"]
ARMS = [("imp", 0), ("imp", 1), ("reinit", 0), ("reinit", 1)]
TWINS = [("twin", 0), ("twin", 1)]


@pytest.fixture(autouse=True)
def only_agreement():
    """Let the tests compute no other analysis."""
    with random_runs.only_analysis("agreement"):
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the workdir of imp and reinit in two replicates and four rounds, with twins in round 1."""
    members = {0: ARMS, 1: ARMS + TWINS, 2: ARMS, 3: ARMS}
    return random_runs.write_run(tmp_path_factory.mktemp("run") / "run", members)


@pytest.fixture
def workdir(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


@functools.cache
def get_experiment():
    return make_tiny_experiment()


def compute(workdir, experiment=None, **config_fields):
    return random_runs.compute(workdir, experiment or get_experiment(), "agreement", **config_fields)


def predict(params, images):
    """Compute the probabilities of a LeNet with NumPy: [examples, classes]."""
    x = np.asarray(images, float).reshape(len(images), -1)
    for number in range(3):
        layer = params[f"Dense_{number}"]
        x = x @ np.asarray(layer["kernel"], float) + np.asarray(layer["bias"], float)
        if number < 2:
            x = np.maximum(x, 0)
    exponentials = np.exp(x - x.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def predict_all(workdir):
    """Return the probabilities of each network on the test set, by (round, arm, replicate), and the labels."""
    run, experiment = analysis.load(workdir), get_experiment()
    test, predictions = experiment.dataset.test, {}
    images = experiment.spec.normalize(test.images)
    for number in run.results["round"].unique():
        for index, (arm, replicate) in enumerate(run.members(number)):
            params = jax.tree.map(lambda leaf: leaf[index], run.round(number).trained["params"])  # noqa: B023
            predictions[number, arm, replicate] = predict(params, images)
    return predictions, np.asarray(test.labels)


def test_values_of_all_pairs_equal_numpy(workdir):
    table = compute(workdir)
    predictions, labels = predict_all(workdir)
    for row in table.itertuples():
        a = predictions[row.round_a, row.arm, row.replicate]
        b = predictions[row.round_b, row.arm_b, row.replicate_b]
        assert row.agreement == pytest.approx(np.mean(a.argmax(1) == b.argmax(1)), abs=1e-8)
        assert row.ensemble_accuracy == pytest.approx(np.mean((a + b).argmax(1) == labels), abs=1e-8)
        mean = (np.mean(a.argmax(1) == labels) + np.mean(b.argmax(1) == labels)) / 2
        assert row.mean_accuracy == pytest.approx(mean, abs=1e-8)
    assert table["agreement"].nunique() > 3  # otherwise the comparison would say little


def test_every_pair_has_one_row(workdir):
    table = compute(workdir)
    expected = [
        (replicate, arm, a, replicate, arm, b)
        for replicate in (0, 1)
        for arm in ("imp", "reinit")
        for a, b in itertools.combinations(range(4), 2)
    ]
    for number in range(4):
        expected += [(0, arm, number, 1, arm, number) for arm in ("imp", "reinit")]
        expected += [(replicate, "imp", number, replicate, "reinit", number) for replicate in (0, 1)]
    expected += [(replicate, "imp", 1, replicate, "twin", 1) for replicate in (0, 1)]
    assert sorted(table[KEYS].itertuples(index=False, name=None)) == sorted(expected)
    assert table["agreement"].between(0, 1).all()


@pytest.mark.parametrize("mode", ["scan_vmap", "step_unroll"])
def test_batches_and_execution_modes_do_not_change_the_table(workdir, monkeypatch, mode):
    """13 test images in batches of 5: the last one is padded."""
    expected = compute(workdir)
    (workdir / "analysis" / "agreement.csv").unlink()
    monkeypatch.setattr(InMemory, "evaluation_batch_size", 5)
    experiment = get_experiment()
    spec = experiment.spec._replace(execution=EXECUTION_MODES[mode])
    pd.testing.assert_frame_equal(compute(workdir, experiment._replace(spec=spec)), expected)


def test_nothing_is_read_or_computed_if_no_row_is_missing(workdir, monkeypatch):
    expected = compute(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", lambda *_: pytest.fail("a checkpoint was read"))
        pd.testing.assert_frame_equal(compute(workdir), expected)
    expected[(expected["round_a"] != 1) | (expected["round_b"] != 1)].to_csv(
        workdir / "analysis" / "agreement.csv", index=False
    )
    read, restore = [], Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda self, n: read.append(n) or restore(self, n))
    pd.testing.assert_frame_equal(compute(workdir), expected)
    assert read == [1]  # the rows of pairs in this round were missing


def test_one_compilation_serves_all_rounds(tmp_path):
    """With `ends`, each round is compared with the previous one and round 0 before the next is trained."""
    random_runs.write_run(tmp_path, dict.fromkeys(range(5), ARMS), keep_checkpoints="ends")
    programs = agreement._compare, training.programs(get_experiment().spec.execution.unroll).apply_to_batch
    sizes = []
    for hidden in (3, 4), (1, 4), (1, 2):
        with random_runs.hidden_rounds(tmp_path, *hidden):
            compute(tmp_path)
        sizes.append([program._cache_size() for program in programs])
    assert sizes[1] == sizes[2]
    assert set(compute(tmp_path)["round_b"]) == set(range(5))


def test_with_ends_only_rounds_that_are_on_disk_together_are_compared(workdir):
    everything = compute(workdir)
    (workdir / "analysis" / "agreement.csv").unlink()
    for hidden in (2, 3), (1, 3), (1,):
        with random_runs.hidden_rounds(workdir, *hidden):
            compute(workdir, keep_checkpoints="ends")
    table = compute(workdir, keep_checkpoints="ends")
    pairs = set(table[["round_a", "round_b"]].itertuples(index=False, name=None))
    assert pairs == {*((n, n) for n in range(4)), (0, 1), (0, 2), (0, 3), (1, 2), (2, 3)}
    is_compared = (everything["round_a"] != 1) | (everything["round_b"] != 3)
    pd.testing.assert_frame_equal(table, everything[is_compared].reset_index(drop=True))


def test_a_network_of_nan_has_no_predictions(workdir):
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        networks, rows = checkpoints.restore(3), checkpoints.rows(3)
        shutil.rmtree(workdir / "checkpoints" / "3")
    index = analysis.load(workdir).members(3).index(("reinit", 1))
    trained = jax.tree.map(lambda leaf: leaf.at[index].set(np.nan), networks.trained)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(3, networks._replace(trained=trained), rows)
    table = compute(workdir)
    first = (table["arm"] == "reinit") & (table["replicate"] == 1) & (table["round_a"] == 3)
    second = (table["arm_b"] == "reinit") & (table["replicate_b"] == 1) & (table["round_b"] == 3)
    assert table[first | second][VALUES].isna().all(axis=None)
    assert table[~(first | second)][VALUES].notna().all(axis=None)
    run = analysis.load(workdir)
    assert agreement.draw_agreement(run) is not None
    assert "nan" not in agreement.describe_agreement(run)


def test_a_damaged_round_is_left_out(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints" / "1" / "networks")
    for _ in range(2):
        table = compute(workdir)
        assert set(table["round_a"]) | set(table["round_b"]) == {0, 2, 3}
        assert len(table) == 4 * 3 + 3 * 4  # pairs of rounds of each member, and pairs in each round
    assert "checkpoints/1 is damaged" in capsys.readouterr().err


def test_a_table_without_a_column_is_computed_again(workdir):
    expected = compute(workdir)
    path = workdir / "analysis" / "agreement.csv"
    expected.drop(columns="mean_accuracy").to_csv(path, index=False)
    with pytest.warns(match="has no column mean_accuracy"):
        pd.testing.assert_frame_equal(compute(workdir), expected)


def test_a_single_replicate_and_a_single_round(tmp_path):
    random_runs.write_run(tmp_path, {0: [("imp", 0), ("reinit", 0)]}, replicates=1)
    (row,) = compute(tmp_path)[KEYS].itertuples(index=False, name=None)
    assert row == (0, "imp", 0, 0, "reinit", 0)
    figure = agreement.draw_agreement(analysis.load(tmp_path))
    assert [axes.get_title() for axes in figure.axes] == ["IMP and another arm", ""]


def test_a_branch_without_imp_compares_its_own_arms(tmp_path):
    members = [(arm, replicate) for arm in ("signs", "constant") for replicate in (0, 1)]
    random_runs.write_run(tmp_path, {1: members, 2: members}, arms=("signs", "constant"))
    table = compute(tmp_path)
    assert set(zip(table["arm"], table["arm_b"], strict=True)) == {(a, a) for a in ("signs", "constant")}
    assert len(table) == 2 * (2 + 2)  # of each arm: two rounds in each replicate, replicates in each round
    sentence = agreement.describe_agreement(analysis.load(tmp_path))
    assert sentence.count("of signs") == 2  # the first arm, in the order of the config
    assert "constant" not in sentence


def test_a_network_without_a_partner_has_no_rows_and_no_figure(tmp_path):
    random_runs.write_run(tmp_path, {0: [("imp", 0)]}, replicates=1, arms=("imp",))
    assert compute(tmp_path).empty
    assert agreement.draw_agreement(analysis.load(tmp_path)) is None


def test_figure_and_sentence_show_the_means_of_the_table(workdir):
    assert agreement.draw_agreement(analysis.load(workdir)) is None  # nothing is computed yet
    assert agreement.describe_agreement(analysis.load(workdir)) == ""
    table = compute(workdir)
    run = analysis.load(workdir)
    table = table.assign(gain=100 * (table["ensemble_accuracy"] - table["mean_accuracy"]))
    panels = np.reshape(agreement.draw_agreement(run).axes, (2, 3))
    in_round = table[table["round_a"] == table["round_b"]]
    rows = {
        (0, "imp"): table.query("arm == 'imp' and round_b == round_a + 1"),
        (0, "reinit"): table.query("arm == 'reinit' and round_b == round_a + 1"),
        (1, "imp"): in_round.query("arm == 'imp' and arm_b == 'imp'"),
        (1, "reinit"): in_round.query("arm == 'reinit' and arm_b == 'reinit'"),
        (2, "reinit"): in_round.query("arm == 'imp' and arm_b == 'reinit'"),
        (2, "twin"): in_round.query("arm == 'imp' and arm_b == 'twin'"),
    }
    for (column, arm), pairs in rows.items():
        means = pairs.groupby("round_b")[["agreement", "gain"]].mean()
        label = {"imp": "IMP", "reinit": "random reinitialisation", "twin": "twin (other data order)"}[arm]
        for axes, expected in zip(panels[:, column], (100 * means["agreement"], means["gain"]), strict=True):
            (drawn,) = (container for container in axes.containers if container.get_label() == label)
            np.testing.assert_allclose(drawn.lines[0].get_ydata(orig=False), expected, atol=1e-9)
    assert len(list(itertools.chain(*(axes.containers for axes in panels[0])))) == len(rows)

    twins = rows[2, "twin"][["agreement", "gain"]].mean()
    sentence = agreement.describe_agreement(run)
    assert sentence.startswith("At 80 % density")  # the round nearest to 10 % that has twins
    text = f"{100 * twins['agreement']:.1f} % and {twins['gain']:+.2f} points for IMP and twin"
    assert text in sentence
