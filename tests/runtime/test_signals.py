import os
import signal
import subprocess
import sys
import time

import pytest

from imp_jax.runtime.signals import SIGNALS, GracefulStop, Stopped

READY = "print('ready', flush=True)\n"
WAIT = "hashlib.pbkdf2_hmac('sha512', b'', b'', 10**9)"  # it does not come back to the interpreter


def start(code):
    """A process with an `Interruption`, once it is ready."""
    head = "import hashlib\nfrom imp_jax.runtime.signals import GracefulStop\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_at_once_what_can_be_done_again(number):
    process = start(f"with GracefulStop():\n    {READY}    {WAIT}")
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    said = process.stderr.read()
    assert said == f"stopped at once by {number.name}; the same command continues from what is on disk\n"


def test_a_training_is_asked_to_stop():
    def train(interruption):
        with interruption.defer_signals():
            assert not interruption.requested
            os.kill(os.getpid(), signal.SIGTERM)
            while not interruption.requested:
                time.sleep(0.001)
            assert interruption.requested == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)  # the same one once more, as `timeout` sends it
            time.sleep(0.05)

    with pytest.raises(Stopped, match="between two rounds"), GracefulStop() as interruption:
        train(interruption)


def test_without_a_signal_nothing_happens_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with GracefulStop() as interruption, interruption.defer_signals():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_is_ignored_stays_ignored():
    """As in a background job of a shell, or under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with GracefulStop() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_the_process_even_while_python_waits():
    """In a call that does not come back to the interpreter, as a compilation does not."""
    process = start(f"with GracefulStop() as i, i.defer_signals():\n    {READY}    {WAIT}")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopping where the run can be resumed" in process.stderr.readline()
    time.sleep(0.3)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert time.monotonic() - sent < 1
