"""Several processes on this machine that train together."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from tests.helpers import ROOT


class Processes:
    """Runs `python *arguments` in `count` processes that train together; kills them on exit of the context."""

    def __init__(self, count: int, arguments: Sequence[object]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        coordination = [f"--coordinator=localhost:{port}", f"--processes={count}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.all = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments), *coordination, f"--process={number}"],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                **pipes,
            )
            for number in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.communicate()

    def wait_for_line(self, predicate: Callable[[str], bool]) -> str:
        """Return the first line on the stdout of process 0 for which `predicate` is true."""
        return next(line for line in self.all[0].stdout if predicate(line))

    def ended(self, seconds: float = 120) -> list[tuple[int, str, str]]:
        """Wait for all processes to end; return the exit status, stdout and stderr of each."""
        outputs = [process.communicate(timeout=seconds) for process in self.all]
        return [(process.returncode, *output) for process, output in zip(self.all, outputs, strict=True)]
