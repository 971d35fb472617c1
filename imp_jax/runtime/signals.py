"""Signals: the first stops a training where it can be resumed, a second one exits the process at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Ctrl-C; what Slurm sends at preemption, and what it is told to send ahead (--signal=USR1@60; submitit: USR2)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_DEBOUNCE_S = 0.2  # `timeout` and `srun` send a signal to the process and to its group: it counts once


_cleanups: list[Callable[[], None]] = []


@contextlib.contextmanager
def run_on_exit(function: Callable[[], None]) -> Iterator[None]:
    """Call `function` when the context ends, and also when a signal ends the process inside it."""
    _cleanups.append(function)
    try:
        yield
    finally:
        _cleanups.remove(function)
        function()


class Stopped(KeyboardInterrupt):
    """A run was stopped by signal `number`; the message says where it can be resumed."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class GracefulStop:
    """Handles SIGINT, SIGTERM, SIGUSR1 and SIGUSR2; a context manager of the main thread.

    The first signal ends the process. Inside `defer_signals()` it only sets `requested`, and a second one ends
    the process.
    """

    def __init__(self):
        self.requested: int = 0  # the number of the signal
        self._deferred = False
        self._lock = threading.Lock()

    def __enter__(self):
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        caught = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # as set by nohup and `&`
        # handlers wait for the main thread, which may be compiling for minutes; this pipe does not
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in caught}
        threading.Thread(target=self._watch, args=[reader], daemon=True).start()
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)

    def signal_on_any_process(self, global_max: Callable[[int], int]) -> int:
        """Return the number of a signal that this process, or another that trains with it, received; 0 if none.

        Args:
          global_max: returns the largest number of all processes.
        """
        received = global_max(self.requested)
        self.requested = self.requested or received
        return received

    @contextlib.contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Let a training poll `requested` and stop where it can; otherwise raise `Stopped` at the end."""
        self._deferred = True
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False
        if self.requested:
            raise self.stopped("between two rounds")

    def stopped(self, where: str) -> Stopped:
        """Return the exception that ends a run whose state is saved up to `where`."""
        name = signal.Signals(self.requested).name
        return Stopped(self.requested, f"stopped by {name} {where}; the same command goes on from there")

    def _watch(self, reader):
        since = 0.0
        with open(reader, "rb", buffering=0) as signals:
            while received := signals.read(1):
                number, now = received[0], time.monotonic()
                if number not in self._before or (number == self.requested and now - since < _DEBOUNCE_S):
                    continue
                name = signal.Signals(number).name
                with self._lock:
                    if self.requested or not self._deferred:
                        for function in reversed(_cleanups):
                            with contextlib.suppress(Exception):
                                function()
                        say = f"stopped at once by {name}; the same command goes on after what is on disk"
                        print(say, file=sys.stderr, flush=True)
                        os._exit(128 + number)  # nothing on disk is ever half-written under its own name
                    self.requested, since = number, now
                say = f"{name}: stopping where the run can be taken up again; a second signal ends it at once"
                print(say, file=sys.stderr, flush=True)
