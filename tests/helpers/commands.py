"""The command `python -m imp_jax.main` as a user types it, in a process of its own."""

import os
import subprocess
import sys

from tests.helpers import ROOT

CONFIG = "--config=configs/mnist5k.py"
QUICK = ("rounds=1", "epochs=1", "batch_size=500", "replicates=1")
QUICK = [CONFIG, *(f"--config.{override}" for override in QUICK)]


def run(*arguments, cwd=ROOT, env=None):
    """Run the command; return its exit status, stdout and stderr."""
    command = [sys.executable, "-m", "imp_jax.main", *arguments]
    env = {**(env or os.environ), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr
