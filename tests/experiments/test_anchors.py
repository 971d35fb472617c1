"""The published numbers: their runs, the verdicts on made-up tables, and the command at scale smoke."""

import re
import sys

import pytest

from experiments import anchors as command
from experiments.literature import anchors
from experiments.literature.anchors import AGREES, DIFFERS, NOT_COMPARABLE, NOT_RUN
from tests.helpers.tables import tables

FULL, SMOKE = anchors.SCALES["full"], anchors.SCALES["smoke"]


def test_the_runs_have_the_published_recipe():
    imp, rewind, lrr, oneshot = (run.config for run in anchors.list_runs(FULL))
    for config in (imp, rewind, lrr, oneshot):
        assert (config.model.name, config.dataset.name, config.epochs, config.batch_size) == (
            *("resnet20", "cifar10", 182, 128),
        )
        assert config.optimizer.name == "momentum"
        assert (config.optimizer.learning_rate, config.optimizer.momentum) == (0.1, 0.9)
        assert config.optimizer.milestones == (91, 136)
        assert config.optimizer.weight_decay == 2e-4
        assert config.model.norm_affine
        assert config.pruning.fraction == 0.2
        assert config.replicates == 3
    assert [config.rewind_step for config in (imp, rewind, lrr, oneshot)] == [0, 4701, None, 0]
    assert oneshot.pruning.network == "dense"
    assert oneshot.arms == ("imp", "reinit")


def test_the_densities_are_those_of_the_rounds():
    for number, density in enumerate(anchors.DENSITIES_PCT, start=1):
        assert 100 * 0.8**number == pytest.approx(density, abs=0.05)
    assert {len(anchor.accuracies) for anchor in anchors.ANCHORS} == {len(anchors.DENSITIES_PCT)}


def test_medians_within_half_a_point_agree():
    (run, *_) = anchors.list_runs(FULL)
    published = [anchors.DENSE, *anchors.ANCHORS[0].accuracies]

    def accuracy(arm, replicate, number):
        if replicate == 2:
            return 0.1  # has no influence on the median of 3, unlike on their mean
        return (published[number] + (0.49 if number % 2 else 0.51) + replicate) / 100

    rows = anchors.compare(FULL, {run: tables(run, accuracy=accuracy)})
    assert [row.theirs for row in rows[:11]] == published
    for number, row in enumerate(rows[:11]):
        assert row.ours == pytest.approx(published[number] + (0.49 if number % 2 else 0.51))
        assert row.verdict == (AGREES if number % 2 else DIFFERS)
        assert row.density == pytest.approx(100 * 0.8**number)
    assert {row.verdict for row in rows[11:]} == {NOT_RUN}
    lines = anchors.format_rows(rows).splitlines()
    assert lines[2] == "| dense | 100.0 | 92.22 | 91.71 | +0.51 | differs |"
    assert lines[13] == "| weight rewinding, step 4,701 | 80.0 | – | 91.76 | – | not run |"


def run_command(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["anchors", *arguments])
        command.main()


def test_the_full_scale_prints_its_cost_and_needs_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit, match="error: --scale=full needs a GPU, and there is none here"):
        run_command(f"--root={tmp_path / 'anchors'}")
    out = capsys.readouterr().out
    # 5 arms × 11 rounds × 3 replicates, of 182 epochs of 390 steps of 128 images
    images = f"{5 * 11 * 3 * 182 * 390 * 128 / 1e9:.2g} billion images"
    assert out.startswith(f"4 runs, 165 trainings, {images}; estimated time on one H100: not measured")
    assert not (tmp_path / "anchors").exists()


def test_a_scale_of_another_name_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="error: --scale is 'mini'; it should be one of full, smoke"):
        run_command("--scale=mini", f"--root={tmp_path}")


def test_the_smoke_scale_trains_all_methods(tmp_path, data_dir, capsys):
    run_command("--scale=smoke", f"--root={tmp_path}", f"--data_dir={data_dir}")
    out = capsys.readouterr().out
    table = (tmp_path / "anchors.md").read_text()
    assert table in out
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 1 + 5 * 2
    assert {row[-1].removesuffix(" |") for row in rows} == {NOT_COMPARABLE}
    for row in rows:
        assert re.fullmatch(r"\d+\.\d\d", row[2])
        assert float(row[4]) == pytest.approx(float(row[2]) - float(row[3]), abs=0.011)
