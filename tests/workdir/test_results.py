import pandas as pd
import pytest

from imp_jax.workdir.results import FIELDS, Results, read_results, recorded_rounds
from tests.helpers.results import rows


def test_results_are_appended_as_they_come(tmp_path):
    results = Results(tmp_path, [])
    assert (tmp_path / "results.csv").read_text() == ",".join(FIELDS) + "\n"
    for number in range(3):
        results.append(rows(number))
        table = pd.read_csv(tmp_path / "results.csv")
        assert len(table) == 2 * (number + 1)
    pd.testing.assert_frame_equal(table, results.table(), rtol=1e-8, check_dtype=False)
    assert ",0.929," in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize("cut", [0, 5, 95, 200])
def test_a_torn_file_is_mended_from_the_rows_of_the_checkpoints(tmp_path, cut):
    whole = rows(0) + rows(1)
    Results(tmp_path, whole)
    path = tmp_path / "results.csv"
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    Results(tmp_path, whole)
    assert path.read_bytes() == content


def test_a_byte_that_is_no_text_is_mended_too(tmp_path):
    Results(tmp_path, rows(0))
    path = tmp_path / "results.csv"
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" + content[101:])
    Results(tmp_path, rows(0))
    assert path.read_bytes() == content


def test_rows_of_a_round_that_is_not_on_disk_are_dropped(tmp_path):
    Results(tmp_path, rows(0) + rows(1))
    Results(tmp_path, rows(0))
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2


def test_columns_of_other_versions_are_kept(tmp_path):
    """One that results.csv lacks is NaN, with a warning; one that only it has stays when written again."""
    Results(tmp_path, [{**row, "note": "mine"} for row in rows(0)])  # as of a later version's checkpoint
    path = tmp_path / "results.csv"
    table = pd.read_csv(path)
    assert table["note"].tolist() == ["mine", "mine"]
    assert table.drop(columns="cosine").to_csv(path, index=False) is None
    with pytest.warns(UserWarning, match=r"results\.csv has no column cosine; NaN stands there"):
        found = read_results(tmp_path)
    assert found["cosine"].isna().all()
    assert found.columns.tolist() == [*FIELDS, "note"]
    results = Results(tmp_path, rows(0))  # of an earlier version
    results.append(rows(1))
    table = read_results(tmp_path)
    assert table["note"].tolist()[:2] == ["mine", "mine"]
    assert table["note"].isna().tolist() == [False, False, True, True]
    assert table["round"].tolist() == [0, 0, 1, 1]
    assert recorded_rounds(tmp_path) == {0, 1}
