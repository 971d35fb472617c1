"""The analysis overlap, compared with counts that NumPy makes of the masks in the checkpoints."""

import contextlib
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis, masking
from imp_jax.analysis import overlap
from imp_jax.members import Member
from imp_jax.workdir.checkpoints import Checkpoints
from tests.helpers import random_runs

KEYS = ["replicate", "arm", "replicate_b", "arm_b", "round"]
ARMS = [(arm, replicate) for arm in ("imp", "reinit", "shuffled", "snip") for replicate in (0, 1)]


@pytest.fixture(autouse=True)
def only_overlap():
    """Let the tests compute no other analysis."""
    with random_runs.only_analysis("overlap"):
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the workdir of four arms in two replicates and two rounds, with a twin in round 1."""
    members = {0: ARMS, 1: [*ARMS, ("twin", 0)]}
    return random_runs.write_run(tmp_path_factory.mktemp("run") / "run", members)


@pytest.fixture
def workdir(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def compute(workdir, **config_fields):
    return random_runs.compute(workdir, None, "overlap", **config_fields)  # without a data set


def get_kernels(run, number, arm, replicate):
    """Return the masks of the kernels of a member, flat and by layer."""
    index = run.members(number).index((arm, replicate))
    return [np.asarray(leaf[index]).ravel() for leaf in masking.prunable_leaves(run.round(number).mask)]


def write_last_mask(workdir, member, mask):
    """Replace the mask of a member in round 1."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        networks, rows = checkpoints.restore(1), checkpoints.rows(1)
        shutil.rmtree(workdir / "checkpoints" / "1")
    index = analysis.load(workdir).members(1).index(member)
    mask = jax.tree.map(lambda leaf, one: leaf.at[index].set(one), networks.mask, mask)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(1, networks._replace(mask=mask), rows)


def test_values_of_all_pairs_equal_numpy(workdir):
    table, run = compute(workdir), analysis.load(workdir)
    for row in table.itertuples():
        a = get_kernels(run, row.round, row.arm, row.replicate)
        b = get_kernels(run, row.round, row.arm_b, row.replicate_b)
        shared, either = (
            np.sum(function(np.concatenate(a), np.concatenate(b)))
            for function in (np.logical_and, np.logical_or)
        )
        assert row.jaccard == pytest.approx(shared / either, rel=1e-6)
        expected = sum(x.sum() * y.sum() / x.size for x, y in zip(a, b, strict=True))
        survivors = sum(x.sum() + y.sum() for x, y in zip(a, b, strict=True))
        assert row.chance == pytest.approx(expected / (survivors - expected), rel=1e-6)
    assert (table.query("round == 0")[["jaccard", "chance"]] == 1).all(axis=None)
    assert table.query("round == 1")["jaccard"].nunique() > 5


def test_every_pair_of_masks_that_differ_has_one_row(workdir):
    expected = []
    for number in (0, 1):
        for replicate in (0, 1):
            for arm, other in (("imp", "shuffled"), ("imp", "snip"), ("shuffled", "snip")):
                expected.append((replicate, arm, replicate, other, number))
        expected += [(0, arm, 1, arm, number) for arm in ("imp", "shuffled", "snip")]
    assert sorted(compute(workdir)[KEYS].itertuples(index=False, name=None)) == sorted(expected)


def test_layers_that_are_never_pruned_do_not_count(workdir):
    everything = compute(workdir)
    (workdir / "analysis" / "overlap.csv").unlink()
    table = compute(workdir, pruning={"exclude": ("Dense_0",)})
    run = analysis.load(workdir)
    row = table.query("round == 1 and arm == 'imp' and arm_b == 'imp'")
    a, b = (np.concatenate(get_kernels(run, 1, "imp", replicate)[1:]) for replicate in (0, 1))
    assert row["jaccard"].item() == pytest.approx(np.sum(a & b) / np.sum(a | b), rel=1e-6)
    assert not np.allclose(table["jaccard"], everything["jaccard"])


def test_nothing_is_read_or_computed_if_no_row_is_missing(workdir, monkeypatch):
    expected = compute(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", lambda *_: pytest.fail("a checkpoint was read"))
        pd.testing.assert_frame_equal(compute(workdir), expected)
    expected[expected["round"] == 0].to_csv(workdir / "analysis" / "overlap.csv", index=False)
    read, restore = [], Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda self, n: read.append(n) or restore(self, n))
    pd.testing.assert_frame_equal(compute(workdir), expected)
    assert read == [1]


def test_rows_of_deleted_rounds_are_kept(workdir):
    expected = compute(workdir)
    with random_runs.hidden_rounds(workdir, 0):
        pd.testing.assert_frame_equal(compute(workdir), expected)


def test_a_damaged_round_is_left_out(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints" / "0" / "networks")
    assert set(compute(workdir)["round"]) == {1}
    assert "checkpoints/0 is damaged" in capsys.readouterr().err


def test_empty_masks_are_nan_and_not_drawn(workdir):
    for replicate in (0, 1):
        mask = jax.tree.map(np.zeros_like, random_runs.draw_network("imp", replicate, 1).mask)
        write_last_mask(workdir, Member("imp", replicate), mask)
    table = compute(workdir).query("round == 1 and arm == 'imp'").set_index("arm_b")
    assert table.loc[["imp"], ["jaccard", "chance"]].isna().all(axis=None)
    assert (table.loc[["snip", "shuffled"], ["jaccard", "chance"]] == 0).all(axis=None)
    run = analysis.load(workdir)
    assert overlap.draw_overlap(run) is not None
    assert "nan" not in overlap.describe_overlap(run)


def test_a_single_replicate_without_other_masks_has_no_pair(tmp_path):
    random_runs.write_run(tmp_path, {0: [("imp", 0), ("reinit", 0)]}, replicates=1)
    assert compute(tmp_path).empty
    run = analysis.load(tmp_path)
    assert overlap.draw_overlap(run) is None
    assert overlap.describe_overlap(run) == ""


def test_a_branch_without_imp_compares_its_own_arms(tmp_path):
    members = [(arm, replicate) for arm in ("snip", "signs", "shuffled") for replicate in (0, 1)]
    random_runs.write_run(tmp_path, {1: members}, arms=("snip", "signs", "shuffled"))
    keys = {("shuffled", "shuffled"), ("shuffled", "snip"), ("snip", "snip")}
    table = compute(tmp_path)
    assert set(zip(table["arm"], table["arm_b"], strict=True)) == keys
    run = analysis.load(tmp_path)
    assert len(overlap.draw_overlap(run).axes) == 2  # replicates only
    assert "for replicates of snip" in overlap.describe_overlap(run)


def test_an_arm_of_a_user_that_is_not_registered_is_compared(tmp_path):
    random_runs.write_run(tmp_path, {1: [("imp", 0), ("mine", 0)]}, arms=("imp", "mine"), replicates=1)
    assert compute(tmp_path)[KEYS].to_numpy().tolist() == [[0, "imp", 0, "mine", 1]]


def test_figure_and_sentence_show_the_means_of_the_table(workdir):
    table = compute(workdir)
    run = analysis.load(workdir)
    panels = np.reshape(overlap.draw_overlap(run).axes, (2, 2))
    pairs = {
        (0, "imp", "IMP"): "arm == 'imp' and arm_b == 'imp'",
        (0, "snip", "snip"): "arm == 'snip' and arm_b == 'snip'",
        (1, "shuffled", "shuffled"): "arm == 'imp' and arm_b == 'shuffled'",
    }
    for (row, _, label), query in pairs.items():
        means = table.query(query).assign(ratio=lambda rows: rows["jaccard"] / rows["chance"])
        means = means.groupby("round")[["jaccard", "ratio", "chance"]].mean()
        for axes, column in zip(panels[row], ("jaccard", "ratio"), strict=True):
            (drawn,) = (container for container in axes.containers if container.get_label() == label)
            np.testing.assert_allclose(drawn.lines[0].get_ydata(orig=False), means[column])
        chances = [line.get_ydata(orig=False) for line in panels[row, 0].lines if line.get_linestyle() == ":"]
        assert any(np.allclose(np.sort(y), np.sort(means["chance"])) for y in chances)
    imp = table.query("round == 1 and arm == 'imp' and arm_b == 'imp'").iloc[0]
    sentence = overlap.describe_overlap(run)
    assert sentence.startswith("At 80 % density")
    assert f"{imp['jaccard']:.3f} for replicates of IMP (chance: {imp['chance']:.3f})" in sentence
    assert "reinit" not in sentence
