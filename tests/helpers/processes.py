"""Processes that train together, on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from tests.helpers import ROOT


class Processes:
    """The command `python *arguments`, as several processes that find each other; ended with the context."""

    def __init__(self, count: int, arguments: Sequence[object]):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        joined = [f"--coordinator=localhost:{port}", f"--processes={count}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.all = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments), *joined, f"--process={number}"],
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

    def wait_for_line(self, of_interest: Callable[[str], bool]) -> str:
        """The first line of process 0 that is of interest."""
        return next(line for line in self.all[0].stdout if of_interest(line))

    def ended(self, seconds: float = 120) -> list[tuple[int, str, str]]:
        """Exit status, stdout and stderr of each, once all have ended."""
        said = [process.communicate(timeout=seconds) for process in self.all]
        return [(process.returncode, *of) for process, of in zip(self.all, said, strict=True)]
