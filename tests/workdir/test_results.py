"""results.csv: appending, repairing, and columns of other versions."""

import warnings

import pandas as pd
import pytest

from imp_jax.workdir.results import FIELDS, Results, read_results, recorded_rounds
from tests.helpers.results import make_rows


def test_results_are_appended_round_by_round(tmp_path):
    results = Results(tmp_path, [])
    assert (tmp_path / "results.csv").read_text() == ",".join(FIELDS) + "\n"
    for number in range(3):
        results.append(make_rows(number))
        table = pd.read_csv(tmp_path / "results.csv")
        assert len(table) == 2 * (number + 1)
    pd.testing.assert_frame_equal(table, results.table(), rtol=1e-8, check_dtype=False)
    assert ",0.929," in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize("size", [0, 5, 95, 200])
def test_a_truncated_file_is_rewritten_from_the_rows_of_the_checkpoints(tmp_path, size):
    all_rows = make_rows(0) + make_rows(1)
    Results(tmp_path, all_rows)
    path = tmp_path / "results.csv"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    Results(tmp_path, all_rows)
    assert path.read_bytes() == content


def test_a_file_with_an_invalid_byte_is_rewritten(tmp_path):
    Results(tmp_path, make_rows(0))
    path = tmp_path / "results.csv"
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" + content[101:])
    Results(tmp_path, make_rows(0))
    assert path.read_bytes() == content


def test_rows_of_a_round_without_a_checkpoint_are_dropped(tmp_path):
    Results(tmp_path, make_rows(0) + make_rows(1))
    Results(tmp_path, make_rows(0))
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2


def test_columns_that_earlier_versions_did_not_write_are_nan_without_a_warning(tmp_path):
    Results(tmp_path, make_rows(0))
    path = tmp_path / "results.csv"
    newer = ["epochs", "retraining_barrier", "pruning_barrier", "validation_loss", "validation_accuracy"]
    pd.read_csv(path).drop(columns=newer).to_csv(path, index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = read_results(tmp_path)
    assert table.columns.tolist() == list(FIELDS)
    assert table[newer].isna().all(axis=None)
    assert table["test_loss"].tolist() == [0.25, 0.25]


def test_columns_of_other_versions_are_kept(tmp_path):
    """A missing column is NaN, with a warning; an unknown column is kept when the file is rewritten."""
    newer_rows = [{**row, "note": "mine"} for row in make_rows(0)]  # as in a checkpoint of a later version
    Results(tmp_path, newer_rows)
    path = tmp_path / "results.csv"
    table = pd.read_csv(path)
    assert table["note"].tolist() == ["mine", "mine"]
    table.drop(columns="cosine").to_csv(path, index=False)
    with pytest.warns(UserWarning, match=r"results\.csv has no column cosine; filled with NaN"):
        table = read_results(tmp_path)
    assert table["cosine"].isna().all()
    assert table.columns.tolist() == [*FIELDS, "note"]
    results = Results(tmp_path, make_rows(0))  # as in a checkpoint of this version, without the column
    results.append(make_rows(1))
    table = read_results(tmp_path)
    assert table["note"].tolist()[:2] == ["mine", "mine"]
    assert table["note"].isna().tolist() == [False, False, True, True]
    assert table["round"].tolist() == [0, 0, 1, 1]
    assert recorded_rounds(tmp_path) == {0, 1}
