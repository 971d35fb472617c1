import os
import signal
import subprocess
import sys
import time

import pytest

from imp_jax.interruption import SIGNALS, Interruption, Stopped


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_at_once_what_can_be_done_again(number):
    def wait_for_it():
        os.kill(os.getpid(), number)
        time.sleep(5)

    with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped, Interruption():
        wait_for_it()
    assert stopped.value.number == number


def test_a_training_is_asked_to_stop():
    def train(interruption):
        with interruption.deferred():
            assert not interruption.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)  # the same one once more, as `timeout` sends it
            time.sleep(0.05)

    with pytest.raises(Stopped, match="between two rounds"), Interruption() as interruption:
        train(interruption)


def test_without_a_signal_nothing_happens_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption() as interruption, interruption.deferred():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_is_ignored_stays_ignored():
    """As in a background job of a shell, or under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_the_process_even_while_python_waits():
    """In a call that does not come back to the interpreter, as a compilation does not."""
    code = (
        "import hashlib\n"
        "from imp_jax.interruption import Interruption\n"
        "with Interruption() as interruption, interruption.deferred():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha512', b'', b'', 10**9)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopping where the run can be taken up again" in process.stderr.readline()
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert time.monotonic() - start < 1
