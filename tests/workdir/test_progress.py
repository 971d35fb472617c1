"""What a run prints: lines of rounds, the progress bar, and the summary."""

import contextlib
import os
import pty
import re
import sys
import threading

import pandas as pd
import pytest

from imp_jax.workdir.progress import ProgressDisplay, ignore_print_errors, print_summary
from tests.helpers.results import make_rows


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that calls another with a terminal as stdout, and returns the output."""

    def capture(function):
        controller_fd, terminal_fd = pty.openpty()
        chunks = []

        def read():
            with contextlib.suppress(OSError):  # on Linux, the end of the output
                while content := os.read(controller_fd, 4096):
                    chunks.append(content)

        reader = threading.Thread(target=read)
        reader.start()
        with open(terminal_fd, "w") as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            patch.setenv("TERM", "xterm")
            patch.setenv("COLUMNS", "200")
            function()
        reader.join()
        os.close(controller_fd)
        return b"".join(chunks).decode()

    return capture


def show_two_rounds():
    with ProgressDisplay(rounds=2, steps=10, first_step=0) as display:
        for number in range(2):
            display.chunk(number, 10, images=1000, seconds=0.5)
            display.round(number, make_rows(number), images=3000)


def test_lines_of_rounds_stay_above_the_progress_bar(terminal):
    output = terminal(show_two_rounds)
    assert "━" in output  # the bar
    screen = []
    for line in re.sub(r"\x1b\[\?25[lh]", "", output).split("\n"):
        for part in re.split(r"(\x1b\[1A)", line):
            if part == "\x1b[1A":  # cursor up: the previous line is cleared and rewritten
                screen.pop()
            elif "\x1b[2K" in part:
                screen.append(part.rpartition("\x1b[2K")[2])
            else:
                screen.append(part)
    screen = [re.sub(r"\x1b\[[\d;]*m|\r", "", line) for line in screen]
    shown = [line.split("  ")[0] for line in screen if "test accuracy" in line]
    assert shown == ["round 0/1", "round 1/1"]


@pytest.mark.parametrize("output", ["pipe", "FORCE_COLOR", "notebook"])
def test_lines_are_plain_and_printed_once_without_a_terminal(capsys, monkeypatch, output):
    if output == "FORCE_COLOR":
        monkeypatch.setenv("FORCE_COLOR", "1")
    if output == "notebook":
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    show_two_rounds()
    print_summary(pd.DataFrame(make_rows(0)))
    out = capsys.readouterr().out
    assert [line[:9] for line in out.splitlines()[:3]] == ["round 0/1", "round 1/1", "Test accu"]
    assert "\x1b" not in out


@pytest.mark.parametrize("state", ["closed", "full", "closed, display only"])
def test_output_to_a_closed_or_full_stdout_is_dropped(capsys, monkeypatch, state):
    """As after `| head -1`. This includes what rich prints and what is still buffered at the end."""
    if state == "full":
        stdout = open("/dev/full", "w")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stdout = open(writer, "w")  # noqa: SIM115
    with stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        if "display only" in state:
            show_two_rounds()
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        else:
            with ignore_print_errors():
                for _ in range(2):
                    print("a line", flush=True)
                    show_two_rounds()
                    print_summary(pd.DataFrame(make_rows(0)))
            print("the last")
    stderr = capsys.readouterr().err
    message = "stdout cannot be written: [Errno 28] No space left on device; the run continues without it\n"
    assert stderr == (message if state == "full" else "")


def test_one_line_per_round_without_a_terminal(capsys):
    with ProgressDisplay(rounds=2, steps=10, first_step=0) as display:
        for number in range(2):
            for step in (5, 10):
                display.chunk(number, step, images=500, seconds=0.5, compile_seconds=1.6 - number - step / 10)
            display.round(number, make_rows(number), images=3000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(
        "round 1/1  density 80.00%  test accuracy imp 92.90% reinit 92.90%  2,000 images/s  1.5 s"
    )
    assert lines[0].endswith(" left  compiled in 1.7 s")  # 1.1 and 0.6
    assert lines[1].endswith(" left")


def test_summary_has_one_row_per_density(capsys):
    print_summary(pd.DataFrame(make_rows(0) + make_rows(10)))
    out = capsys.readouterr().out
    assert out.startswith("Test accuracy in %\n")
    assert "10.74%" in out
    assert out.count(" 92.90 ") == 4


def test_summary_shows_mean_and_range_of_the_replicates(capsys):
    first = pd.DataFrame(make_rows(0))
    second = first.assign(replicate=1, test_accuracy=0.949)
    print_summary(pd.concat([first, second]))
    out = capsys.readouterr().out
    assert "mean (min to max) of 2 replicates" in out
    assert out.count("93.90 (92.90 to 94.90)") == 2
