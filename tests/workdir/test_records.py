import contextlib
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import threading

import pandas as pd
import pytest
from filelock import FileLock
from tensorboardX.proto.event_pb2 import Event, SessionLog

from imp_jax import config as configs
from imp_jax.errors import UserError
from imp_jax.workdir.files import write_atomically
from imp_jax.workdir.lock import open_workdir
from imp_jax.workdir.progress import ProgressDisplay, ignore_print_errors, print_summary
from imp_jax.workdir.results import FIELDS, Results, read_results, recorded_rounds
from imp_jax.workdir.tensorboard import TensorBoardWriter


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


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, None)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def open_and_leave(path, config):
    with open_workdir(path, config) as workdir:
        return workdir


def test_a_workdir_keeps_its_config(tmp_path):
    config = configs.default()
    workdir = open_and_leave(tmp_path / "a" / "b", config)
    assert json.loads((workdir / "config.json").read_text())["pruning"] == {
        "score": "magnitude",
        "fraction": 0.2,
        "exclude": [],
        "images": 256,
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
        open_workdir(tmp_path, configs.default()),
        pytest.raises(UserError) as error,
    ):
        open_and_leave(tmp_path, configs.default())
    assert str(error.value).startswith(f"process {os.getpid()} on {socket.gethostname()} is writing to")
    open_and_leave(tmp_path, configs.default())  # free again


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    hold = (
        "import os, signal; from imp_jax import config; from imp_jax.workdir.lock import open_workdir\n"
        f"with open_workdir({str(tmp_path)!r}, config.default()):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", hold], check=False)
    assert died.returncode == -signal.SIGKILL
    assert (tmp_path / ".holder").exists()
    open_and_leave(tmp_path, configs.default())
    assert not (tmp_path / ".holder").exists()


def test_a_lock_that_is_tried_for_an_instant_does_not_stop_a_run(tmp_path):
    """As `experiments.run status` does, of a run that starts just then."""
    lock = FileLock(tmp_path / ".lock", thread_local=False)
    lock.acquire()
    release = threading.Timer(0.3, lock.release)
    release.start()
    open_and_leave(tmp_path, configs.default())
    release.join()


def test_a_workdir_that_could_not_be_read_back_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"with \[ in it, which Orbax cannot read back"):
        open_and_leave(tmp_path / "try[1]", configs.default())
    assert not any(tmp_path.iterdir())


def test_columns_of_other_versions_are_kept(tmp_path):
    """One that results.csv lacks is NaN, with a warning; one that only it has stays when written again."""
    Results(tmp_path, [{**row, "note": "mine"} for row in rows(0)])  # as of a later version's checkpoint
    path = tmp_path / "results.csv"
    table = pd.read_csv(path)
    assert table["note"].tolist() == ["mine", "mine"]
    assert table.drop(columns="cosine").to_csv(path, index=False) is None
    with pytest.warns(UserWarning, match=r"results\.csv has no column cosine; filled with NaN"):
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


@pytest.fixture
def terminal(monkeypatch):
    """A function that runs another with a terminal as stdout, and returns what that is sent."""

    def run(function):
        ours, theirs = pty.openpty()
        sent = []

        def read():
            with contextlib.suppress(OSError):  # the end, on Linux
                while content := os.read(ours, 4096):
                    sent.append(content)

        reader = threading.Thread(target=read)
        reader.start()
        with open(theirs, "w") as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            patch.setenv("TERM", "xterm")
            patch.setenv("COLUMNS", "200")
            function()
        reader.join()
        os.close(ours)
        return b"".join(sent).decode()

    return run


def show_two_rounds():
    with ProgressDisplay(rounds=2, steps=10, first_step=0) as display:
        for number in range(2):
            display.chunk(number, 10, images=1000, seconds=0.5)
            display.round(number, rows(number), images=3000)


def test_lines_of_rounds_stay_above_the_bar_of_a_terminal(terminal):
    sent = terminal(show_two_rounds)
    assert "━" in sent  # the bar
    screen = []
    for line in re.sub(r"\x1b\[\?25[lh]", "", sent).split("\n"):
        for part in re.split(r"(\x1b\[1A)", line):
            if part == "\x1b[1A":  # up, to be cleared and written again
                screen.pop()
            elif "\x1b[2K" in part:
                screen.append(part.rpartition("\x1b[2K")[2])
            else:
                screen.append(part)
    screen = [re.sub(r"\x1b\[[\d;]*m|\r", "", line) for line in screen]
    shown = [line.split("  ")[0] for line in screen if "test accuracy" in line]
    assert shown == ["round 0/1", "round 1/1"]


@pytest.mark.parametrize("how", ["pipe", "FORCE_COLOR", "notebook"])
def test_lines_are_plain_and_come_once_elsewhere(capsys, monkeypatch, how):
    if how == "FORCE_COLOR":
        monkeypatch.setenv("FORCE_COLOR", "1")
    if how == "notebook":
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    show_two_rounds()
    print_summary(pd.DataFrame(rows(0)))
    out = capsys.readouterr().out
    assert [line[:9] for line in out.splitlines()[:3]] == ["round 0/1", "round 1/1", "Test accu"]
    assert "\x1b" not in out


@pytest.mark.parametrize("how", ["closed", "full", "closed, without help"])
def test_what_cannot_be_printed_is_dropped(capsys, monkeypatch, how):
    """As after `| head -1`, also where rich prints; nothing is left to be printed at the end of the process."""
    if how == "full":
        stdout = open("/dev/full", "w")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stdout = open(writer, "w")  # noqa: SIM115
    with stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        if "without help" in how:
            show_two_rounds()
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        else:
            with ignore_print_errors():
                for _ in range(2):
                    print("a line", flush=True)
                    show_two_rounds()
                    print_summary(pd.DataFrame(rows(0)))
            print("the last")
    said = capsys.readouterr().err
    full = "stdout cannot be written: [Errno 28] No space left on device; the run continues without it\n"
    assert said == (full if how == "full" else "")


def test_one_plain_line_a_round_without_a_terminal(capsys):
    with ProgressDisplay(rounds=2, steps=10, first_step=0) as display:
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
    print_summary(pd.DataFrame(rows(0) + rows(10)))
    out = capsys.readouterr().out
    assert out.startswith("Test accuracy in %\n")
    assert "10.74%" in out
    assert out.count(" 92.90 ") == 4


def test_summary_of_replicates_is_their_mean_and_range(capsys):
    one, other = pd.DataFrame(rows(0)), pd.DataFrame(rows(0)).assign(replicate=1, test_accuracy=0.949)
    print_summary(pd.concat([one, other]))
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
    events = TensorBoardWriter(tmp_path, first_epoch=3)
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
        events = TensorBoardWriter(tmp_path, first_epoch=0)
        events.write(0, [("imp", 0)], {"loss": [1.0]})
        events.close()
    assert len(list((tmp_path / "events" / "imp-0").iterdir())) == 2
