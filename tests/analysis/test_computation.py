"""Analyses and figures of users: what they are given, and which rows are kept or computed."""

import contextlib
import gc
import shutil
import weakref

import jax
import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis, figures, masking, runs
from imp_jax.analysis import registry
from imp_jax.members import Member
from imp_jax.workdir.checkpoints import Checkpoints
from imp_jax.workdir.results import read_results
from tests.conftest import quick_config


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Return the workdir of four rounds of a narrow LeNet, with a twin in round 2 and without analyses."""
    workdir = tmp_path_factory.mktemp("run")
    config = quick_config(data_dir, rounds=4, **{"model.width": 0.1})
    config.instability.rounds = (2,)
    runs.run(config, workdir)
    return workdir


@pytest.fixture
def copy(trained, tmp_path):
    """Return a copy of the workdir; restore the registries after the test."""
    saved = [(registered, dict(registered)) for registered in (registry.ANALYSES, registry.FIGURES)]
    yield shutil.copytree(trained, tmp_path / "run")
    for registered, entries in saved:
        registered.clear()
        registered.update(entries)


@pytest.fixture
def workdir(copy):
    """Return a copy of the workdir; unregister the analyses and figures of the paper for this test."""
    registry.ANALYSES.clear()
    registry.FIGURES.clear()
    (copy / "analysis").mkdir(exist_ok=True)
    return copy


def compute(workdir):
    def no_experiment():
        raise AssertionError("the data set is not needed")

    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        config = analysis.load(workdir).config
        analysis.compute(checkpoints, config, no_experiment, workdir, read_results(workdir))


def test_only_adjacent_rounds_are_successive(workdir):
    analysis.register(
        "pairs", lambda inputs: [(inputs.other.round,)], columns=("previous",), needs="successive"
    )
    shutil.rmtree(workdir / "checkpoints" / "1")
    compute(workdir)
    table = pd.read_csv(workdir / "analysis" / "pairs.csv")
    assert table[["round", "previous"]].to_numpy().tolist() == [[3, 2]]


def test_columns_added_by_hand_and_rows_of_deleted_rounds_are_kept(workdir):
    calls = []
    analysis.register(
        "numbers", lambda inputs: calls.append(inputs) or [(inputs.threshold,)], columns=("threshold",)
    )
    compute(workdir)
    path = workdir / "analysis" / "numbers.csv"
    pd.read_csv(path).assign(note="mine").to_csv(path, index=False)
    table = pd.read_csv(path)
    shutil.rmtree(workdir / "checkpoints" / "1")
    calls.clear()
    compute(workdir)
    assert not calls
    pd.testing.assert_frame_equal(pd.read_csv(path), table)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "replicate,arm,round,threshold\n0,imp,0,0.1"])
def test_a_table_that_cannot_be_used_is_moved_and_computed_again(workdir, capsys, content):
    analysis.register("numbers", lambda inputs: [(inputs.threshold,)], columns=("threshold",))
    path = workdir / "analysis" / "numbers.csv"
    path.write_text(content)
    compute(workdir)
    assert "numbers.csv cannot be read; it is moved to" in capsys.readouterr().err
    assert (workdir / "set-aside" / "analysis-numbers.csv").read_text() == content
    assert len(pd.read_csv(path)) == 2 * 4  # imp and reinit, in four rounds


def test_no_checkpoint_is_read_if_no_row_is_missing(workdir, monkeypatch):
    analysis.register(
        "pairs", lambda inputs: [(inputs.other.round,)], columns=("previous",), needs="successive"
    )
    compute(workdir)
    monkeypatch.setattr(Checkpoints, "restore", lambda *_: pytest.fail("a checkpoint was read"))
    compute(workdir)


def test_an_analysis_of_pairs_is_given_both_kinds(workdir):
    @analysis.register("ends", columns=("other_round", "other_arm"), needs="pair")
    def ends(inputs):
        yield inputs.other.round, inputs.other.arm

    compute(workdir)
    table = pd.read_csv(workdir / "analysis" / "ends.csv")
    assert list(table) == ["replicate", "kind", "round", "other_round", "other_arm"]
    rows = table.drop(columns="replicate").to_numpy().tolist()
    successive = [["successive", n, n - 1, "imp"] for n in (1, 2, 3)]
    assert sorted(rows) == [["instability", 2, 2, "twin"], *successive]
    assert ends is analysis.ANALYSES["ends"].function


def test_an_analysis_of_the_run_is_given_all_networks_and_tables(workdir):
    """It computes the share of the weights of round 0 that survive in each round, from the masks."""

    def compute_share(inputs):
        first = inputs.networks[0][Member("imp", 0)].mask
        for number, networks in inputs.networks.items():
            shared = jax.tree.map(np.logical_and, first, networks[Member("imp", 0)].mask)
            yield number, float(masking.density(shared)), len(inputs.tables["kept"])

    analysis.register("kept", compute_share, columns=("round", "share", "known"), needs="run")
    compute(workdir)
    compute(workdir)
    table = pd.read_csv(workdir / "analysis" / "kept.csv")
    density = read_results(workdir).groupby("round")["density"].first()
    np.testing.assert_allclose(table["share"], density, rtol=1e-6)
    assert set(table["known"]) == {4}  # in the second call, its own rows of the first


def test_an_analysis_is_given_all_networks_of_the_round(workdir):
    seen = {}
    analysis.register(
        "seen", lambda inputs: seen.setdefault(inputs.round, set(inputs.networks)) and [(1,)], columns=("one",)
    )
    compute(workdir)
    imp, reinit, twin = (Member(arm, 0) for arm in ("imp", "reinit", "twin"))
    assert seen == {0: {imp, reinit}, 1: {imp, reinit}, 2: {imp, reinit, twin}, 3: {imp, reinit}}


def test_rows_that_are_not_current_are_replaced_if_their_round_is_on_disk(workdir):
    def register(value):
        analysis.register(
            "values",
            lambda inputs: [(value,)],
            columns=("value",),
            is_current=lambda table, _: table["value"] == value,
        )

    register(1)
    compute(workdir)
    shutil.rmtree(workdir / "checkpoints" / "1")
    register(2)
    compute(workdir)
    table = pd.read_csv(workdir / "analysis" / "values.csv").groupby("round")["value"].unique()
    assert {number: values.tolist() for number, values in table.items()} == {0: [2], 1: [1], 2: [2], 3: [2]}


def test_a_new_definition_computes_the_table_again_and_keeps_the_old_file(workdir, capsys):
    for definition in (1, 2, 2):
        analysis.register("values", lambda _, d=definition: [(d,)], columns=("value",), definition=definition)
        compute(workdir)
        assert set(pd.read_csv(workdir / "analysis" / "values.csv")["value"]) == {definition}
    assert capsys.readouterr().err.count("was computed by an earlier version") == 1
    assert set(pd.read_csv(workdir / "set-aside" / "analysis-values.csv")["value"]) == {1}
    del registry.ANALYSES["values"]
    compute(workdir)
    analysis.register("values", lambda inputs: [(2,)], columns=("value",), definition=2)
    compute(workdir)  # the definition is remembered while the analysis is not registered
    assert "earlier version" not in capsys.readouterr().err


def test_long_computations_are_saved_at_intervals(workdir, monkeypatch):
    def fail_in_round_2(inputs):
        if inputs.round == 2:
            raise RuntimeError("killed")
        return [(1,)]

    monkeypatch.setattr("imp_jax.analysis.computation._SAVE_EVERY_S", 0)
    analysis.register("slow", fail_in_round_2, columns=("value",))
    with pytest.raises(RuntimeError, match="killed"):
        compute(workdir)
    assert set(pd.read_csv(workdir / "analysis" / "slow.csv")["round"]) == {0, 1}


def test_a_registered_figure_is_drawn_and_in_the_report(copy):
    registry.FIGURES.clear()

    def draw(run):
        figure = figures.Figure()
        figure.subplots().plot(run.norms["round"], run.norms["norm"])
        return figure

    analysis.register(
        "norms",
        lambda inputs: [(inputs.threshold,)],
        columns=("norm",),
        figure=draw,
        caption="Norm over <rounds>.",
    )
    analysis.register(
        "others", lambda inputs: [(inputs.threshold,)], columns=("value",), description="A threshold."
    )
    analysis.register_figure("nothing", lambda run: None)
    analysis.run(copy)
    assert {"norms.pdf", "norms.png"} <= {path.name for path in (copy / "figures").iterdir()}
    report = (copy / "report.html").read_text()
    assert "Norm over &lt;rounds&gt;." in report
    assert "<p>A threshold.</p>" in report
    assert report.count("<img") == 1
    with pytest.raises(AttributeError, match="a run has no table 'norm'; it has distances, paths"):
        analysis.load(copy).norm  # noqa: B018


def test_networks_are_freed_without_garbage_collection(workdir):
    """They refer to each other, and a round may take gigabytes."""
    inputs = []
    analysis.register("one", lambda i: inputs.append(weakref.ref(i)) or [(1,)], columns=("value",))
    gc.disable()
    try:
        compute(workdir)
        assert len(inputs) == 2 * 4
        assert not any(ref() for ref in inputs)
    finally:
        gc.enable()


@pytest.mark.parametrize(("kept_bytes", "reads"), [(2**30, 1), (0, 2)])
def test_small_rounds_are_read_once_for_all_analyses(workdir, monkeypatch, kept_bytes, reads):
    seen, restore = [], Checkpoints.restore

    def count(self, number):
        seen.append(number)
        return restore(self, number)

    monkeypatch.setattr(Checkpoints, "restore", count)
    monkeypatch.setattr("imp_jax.analysis.computation._KEPT_BYTES", kept_bytes)
    analysis.register("each", lambda inputs: [(inputs.round,)], columns=("value",))
    analysis.register("all", lambda inputs: [(len(inputs.networks),)], columns=("rounds",), needs="run")
    compute(workdir)
    # the last two rounds stay in memory, because analyses of pairs need two at a time
    assert [seen.count(number) for number in range(4)] == [reads, reads, 1, 1]
