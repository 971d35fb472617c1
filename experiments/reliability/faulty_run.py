"""Run `imp_jax.main` in a process that kills itself: `python -m … write|prune COUNT FLAG…`.

With `write`, it is killed before its COUNT-th file operation in the workdir; with `prune`, after its COUNT-th
pruning.
"""

import os
import runpy
import signal
import sys

CHANGING_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def run_and_kill(kind: str, count: int, arguments: list[str]) -> None:
    """Run the command, and kill this process with SIGKILL at its `count`-th write or pruning."""
    workdir = next(a.partition("=")[2] for a in arguments if a.startswith("--workdir="))

    def count_down():
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, details):
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGING_EVENTS or writes) and str(details[0]).startswith(workdir):
            count_down()

    if kind == "write":
        sys.addaudithook(audit)
    else:
        from imp_jax import imp

        choose_masks = imp.choose_masks

        def choose_and_count(*args):
            chosen = choose_masks(*args)
            count_down()
            return chosen

        imp.choose_masks = choose_and_count
    sys.argv = ["imp_jax.main", *arguments]
    runpy.run_module("imp_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_and_kill(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
