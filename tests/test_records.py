import json
import os
import signal
import socket
import struct
import subprocess
import sys

import pandas as pd
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from imp_jax import config as configs
from imp_jax import records
from imp_jax.config import UserError


def rows(number):
    return [
        {
            "replicate": 0,
            "arm": arm,
            "round": number,
            "density": 0.8**number,
            "threshold": 0.01,
            "train_loss": 0.5,
        }
        | {"train_accuracy": 1.0, "test_loss": 0.25, "test_accuracy": 0.929, "seconds": 1.5}
        for arm in ("imp", "reinit")
    ]


def test_results_are_appended_as_they_come(tmp_path):
    results = records.Results(tmp_path, [])
    assert (tmp_path / "results.csv").read_text() == ",".join(records.FIELDS) + "\n"
    for number in range(3):
        results.append(rows(number))
        table = pd.read_csv(tmp_path / "results.csv")
        assert len(table) == 2 * (number + 1)
    pd.testing.assert_frame_equal(table, results.table(), rtol=1e-8, check_dtype=False)
    assert ",0.929," in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize("cut", [0, 5, 95, 200])
def test_a_torn_file_is_mended_from_the_rows_of_the_checkpoints(tmp_path, cut):
    whole = rows(0) + rows(1)
    records.Results(tmp_path, whole)
    path = tmp_path / "results.csv"
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    records.Results(tmp_path, whole)
    assert path.read_bytes() == content


def test_a_byte_that_is_no_text_is_mended_too(tmp_path):
    records.Results(tmp_path, rows(0))
    path = tmp_path / "results.csv"
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" + content[101:])
    records.Results(tmp_path, rows(0))
    assert path.read_bytes() == content


def test_rows_of_a_round_that_is_not_on_disk_are_dropped(tmp_path):
    records.Results(tmp_path, rows(0) + rows(1))
    records.Results(tmp_path, rows(0))
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    records.write_atomically(path, "old")
    with pytest.raises(TypeError):
        records.write_atomically(path, None)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def open_and_leave(path, config):
    with records.open_workdir(path, config) as workdir:
        return workdir


def test_a_workdir_keeps_its_config(tmp_path):
    config = configs.default()
    workdir = open_and_leave(tmp_path / "a" / "b", config)
    assert json.loads((workdir / "config.json").read_text())["pruning"] == {
        "score": "magnitude",
        "fraction": 0.2,
        "exclude": [],
    }
    open_and_leave(workdir, config)
    config.rounds = 3
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds a run of another config: rounds is 25 there and 3 here"):
        open_and_leave(workdir, config)
    assert (workdir / "config.json").read_bytes() == before


def test_a_workdir_that_cannot_be_one(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "run"):
        with pytest.raises(UserError, match="cannot write to workdir"):
            open_and_leave(path, configs.default())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.csv").touch()
    with pytest.raises(UserError, match=r"holds results but no config.json"):
        open_and_leave(tmp_path / "foreign", configs.default())
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["results.csv"]
    for content in ("{", "[]"):
        (tmp_path / "torn").mkdir(exist_ok=True)
        (tmp_path / "torn" / "config.json").write_text(content)
        with pytest.raises(UserError, match="cannot read"):
            open_and_leave(tmp_path / "torn", configs.default())


def test_a_workdir_has_one_writer(tmp_path):
    with (
        records.open_workdir(tmp_path, configs.default()),
        pytest.raises(UserError) as error,
    ):
        open_and_leave(tmp_path, configs.default())
    assert str(error.value).startswith(f"process {os.getpid()} on {socket.gethostname()} is writing to")
    open_and_leave(tmp_path, configs.default())  # free again


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    hold = (
        "import os, signal; from imp_jax import config, records\n"
        f"with records.open_workdir({str(tmp_path)!r}, config.default()):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", hold], check=False)
    assert died.returncode == -signal.SIGKILL
    assert (tmp_path / ".holder").exists()
    open_and_leave(tmp_path, configs.default())
    assert not (tmp_path / ".holder").exists()


def test_one_plain_line_a_round_without_a_terminal(capsys):
    with records.Display(rounds=2, steps=10, first_step=0) as display:
        for number in range(2):
            for step in (5, 10):
                display.chunk(number, step, images=500, seconds=0.5, compile_seconds=1.6 - number - step / 10)
            display.round(number, rows(number), images=3000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(
        "round 1/1  density 80.00%  test accuracy imp 92.90% reinit 92.90%  2,000 images/s  1.5 s"
    )
    assert lines[0].endswith(" left  compiled in 1.7 s")  # 1.1 and 0.6
    assert lines[1].endswith(" left")


def test_summary_has_a_row_a_density(capsys):
    records.print_summary(pd.DataFrame(rows(0) + rows(10)))
    out = capsys.readouterr().out
    assert out.startswith("Test accuracy in %\n")
    assert "10.74%" in out
    assert out.count(" 92.90 ") == 4


def test_summary_of_replicates_is_their_mean_and_range(capsys):
    one, other = pd.DataFrame(rows(0)), pd.DataFrame(rows(0)).assign(replicate=1, test_accuracy=0.949)
    records.print_summary(pd.concat([one, other]))
    out = capsys.readouterr().out
    assert "mean (min to max) of 2 replicates" in out
    assert out.count("93.90 (92.90 to 94.90)") == 2


def events_of(folder):
    """Every event of a folder's files, read record by record: length, two checksums, an `Event`."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_event_files_hold_the_scalars_of_each_member(tmp_path):
    events = records.Events(tmp_path, first_epoch=3)
    members = [("imp", 0), ("reinit", 0), ("twin", 0)]
    events.write(3, members, {"test_accuracy": [0.5, 0.75, 0.0], "loss": [1.0, 2.0, 3.0]})
    events.close()
    assert {path.name for path in (tmp_path / "events").iterdir()} == {"imp-0", "reinit-0"}
    version, start, scalars = events_of(tmp_path / "events" / "reinit-0")
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (3, SessionLog.START)
    assert scalars.step == 3
    assert {v.tag: v.simple_value for v in scalars.summary.value} == {"test_accuracy": 0.75, "loss": 2.0}


def test_event_files_of_one_second_do_not_meet(tmp_path):
    for _ in range(2):
        events = records.Events(tmp_path, first_epoch=0)
        events.write(0, [("imp", 0)], {"loss": [1.0]})
        events.close()
    assert len(list((tmp_path / "events" / "imp-0").iterdir())) == 2
