"""`GracefulStop`: the first and the second signal, inside and outside of `defer_signals`."""

import os
import signal
import subprocess
import sys
import time

import pytest

from imp_jax.runtime.signals import SIGNALS, GracefulStop, Stopped

READY = "print('ready', flush=True)\n"
WAIT = "hashlib.pbkdf2_hmac('sha512', b'', b'', 10**9)"  # does not return to the interpreter


def start_process(code):
    """Start a process that executes `code`, and return it once it has printed its first line."""
    imports = "import hashlib\nfrom imp_jax.runtime.signals import GracefulStop\n"
    process = subprocess.Popen(
        [sys.executable, "-c", imports + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_defer_signals_ends_the_process_at_once(number):
    process = start_process(f"with GracefulStop():\n    {READY}    {WAIT}")
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    stderr = process.stderr.read()
    assert stderr == f"stopped at once by {number.name}; the same command continues from what is on disk\n"


def test_a_deferred_signal_requests_a_stop():
    def train(stop):
        with stop.defer_signals():
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop.requested:
                time.sleep(0.001)
            assert stop.requested == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)  # the same signal again, as `timeout` sends it
            time.sleep(0.05)

    with pytest.raises(Stopped, match="between two rounds"), GracefulStop() as stop:
        train(stop)


def test_handlers_are_restored_after_the_context():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with GracefulStop() as stop, stop.defer_signals():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_an_ignored_signal_stays_ignored():
    """As in a background job of a shell, or under nohup."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_second_signal_ends_the_process_while_python_is_blocked():
    """For example in a compilation, which does not return to the interpreter until it ends."""
    process = start_process(f"with GracefulStop() as stop, stop.defer_signals():\n    {READY}    {WAIT}")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopping where the run can be resumed" in process.stderr.readline()
    time.sleep(0.3)
    sent_at = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert time.monotonic() - sent_at < 1
