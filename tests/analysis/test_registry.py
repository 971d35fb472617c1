"""Tables of users: which rounds are paired, and that no row is lost."""

import contextlib
import shutil

import pandas as pd
import pytest

from imp_jax import analysis, runs
from imp_jax.analysis import registry
from imp_jax.errors import UserError
from imp_jax.workdir.checkpoints import Checkpoints
from imp_jax.workdir.results import read_results
from tests.conftest import quick_config


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Four rounds of a narrow LeNet, without analyses."""
    workdir = tmp_path_factory.mktemp("run")
    runs.run(quick_config(data_dir, rounds=4, **{"model.width": 0.1}), workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path, monkeypatch):
    """A copy of the run, and an empty registry."""
    for name in list(registry.ANALYSES):
        monkeypatch.delitem(registry.ANALYSES, name)
    (copy := tmp_path / "run").mkdir()
    shutil.copytree(trained, copy, dirs_exist_ok=True)
    (copy / "analysis").mkdir(exist_ok=True)
    return copy


def compute(workdir):
    def no_experiment():
        raise AssertionError("the data set is not needed")

    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        config = analysis.load(workdir).config
        analysis.compute(checkpoints, config, no_experiment, workdir, read_results(workdir))


def test_only_adjacent_rounds_are_successive(workdir):
    analysis.register("pairs", lambda i: [(i.other.round,)], columns=("before",), needs="successive")
    shutil.rmtree(workdir / "checkpoints" / "1")
    compute(workdir)
    table = pd.read_csv(workdir / "analysis" / "pairs.csv")
    assert table[["round", "before"]].to_numpy().tolist() == [[3, 2]]


def test_a_column_added_by_hand_and_rows_of_deleted_rounds_stay(workdir):
    calls = []
    analysis.register("numbers", lambda i: calls.append(i) or [(i.threshold,)], columns=("threshold",))
    compute(workdir)
    path = workdir / "analysis" / "numbers.csv"
    pd.read_csv(path).assign(note="mine").to_csv(path, index=False)
    before = pd.read_csv(path)
    shutil.rmtree(workdir / "checkpoints" / "1")
    calls.clear()
    compute(workdir)
    assert not calls
    pd.testing.assert_frame_equal(pd.read_csv(path), before)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "replicate,arm,round,threshold\n0,imp,0,0.1"])
def test_a_table_that_cannot_be_used_is_moved_and_computed_again(workdir, capsys, content):
    analysis.register("numbers", lambda i: [(i.threshold,)], columns=("threshold",))
    path = workdir / "analysis" / "numbers.csv"
    path.write_text(content)
    compute(workdir)
    assert "numbers.csv cannot be read; it is moved to" in capsys.readouterr().err
    assert (workdir / "set-aside" / "analysis-numbers.csv").read_text() == content
    assert len(pd.read_csv(path)) == 2 * 4  # imp and reinit, in four rounds


def test_nothing_is_read_where_nothing_is_missing(workdir, monkeypatch):
    analysis.register("pairs", lambda i: [(i.other.round,)], columns=("before",), needs="successive")
    compute(workdir)
    monkeypatch.setattr(Checkpoints, "restore", lambda *_: pytest.fail("a checkpoint was read"))
    compute(workdir)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("norms", {"columns": ("a",), "needs": "rounds"}, "needs 'rounds'; it should need one of round"),
        ("norms", {"columns": ("round",)}, "none twice and none of replicate, arm, round"),
        ("a/b", {"columns": ("a",)}, "should have a name of letters"),
        ("weights", {"columns": ("a",)}, "should have a name of letters, .* none of distances"),
    ],
)
def test_a_bad_registration_is_one_sentence(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        analysis.register(name, lambda i: [], **options)
