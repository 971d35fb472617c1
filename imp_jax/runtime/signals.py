"""Signals: the first stops a training where it can be resumed, a second one exits the process at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Ctrl-C; Slurm's preemption; Slurm's early warning on request (--signal=USR1@60; submitit uses USR2)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_DEBOUNCE_S = 0.2  # `timeout` and `srun` send a signal to the process and to its group; count it once

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
    """Raised when signal `number` has stopped a run; the message says where it can be resumed."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class GracefulStop:
    """Handles SIGINT, SIGTERM, SIGUSR1 and SIGUSR2; a context manager for the main thread.

    The first signal exits the process. Inside `defer_signals()` it only sets `requested`, and a second signal
    exits the process.
    """

    def __init__(self):
        self.requested: int = 0  # the number of the received signal; 0 if none
        self._deferred = False
        self._lock = threading.Lock()

    def __enter__(self):
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        caught = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # nohup and `&` ignore signals
        # a pipe, as handlers run in the main thread, which may be compiling for minutes
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous_handlers = {number: signal.signal(number, lambda *_: None) for number in caught}
        threading.Thread(target=self._watch, args=[reader], daemon=True).start()
        return self

    def __exit__(self, *_):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self._writer)

    def signal_on_any_process(self, global_max: Callable[[int], int]) -> int:
        """Return the number of a signal that any of the processes received; 0 if none.

        Args:
          global_max: computes the maximum of a number over all processes.
        """
        received = global_max(self.requested)
        self.requested = self.requested or received
        return received

    @contextlib.contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Defer the first signal: the caller polls `requested`; on exit, raise `Stopped` if it is set."""
        self._deferred = True
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False
        if self.requested:
            raise self.stopped("between two rounds")

    def stopped(self, where: str) -> Stopped:
        """Return the exception for a run whose state has been saved; `where` is put into its message."""
        name = signal.Signals(self.requested).name
        return Stopped(self.requested, f"stopped by {name} {where}; the same command continues from there")

    def _watch(self, reader):
        last_time = 0.0
        with open(reader, "rb", buffering=0) as signals:
            while received := signals.read(1):
                number, time_s = received[0], time.monotonic()
                is_repeated = number == self.requested and time_s - last_time < _DEBOUNCE_S
                if number not in self._previous_handlers or is_repeated:
                    continue
                name = signal.Signals(number).name
                with self._lock:
                    if self.requested or not self._deferred:
                        for function in reversed(_cleanups):
                            with contextlib.suppress(Exception):
                                function()
                        message = f"stopped at once by {name}; the same command continues from what is on disk"
                        print(message, file=sys.stderr, flush=True)
                        os._exit(128 + number)  # safe: files get their names when complete
                    self.requested, last_time = number, time_s
                message = f"{name}: stopping where the run can be resumed; a second signal stops it at once"
                print(message, file=sys.stderr, flush=True)
