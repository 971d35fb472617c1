"""Time whole runs of configs/mnist5k.py."""

import contextlib
import io
import time

from ml_collections import ConfigDict

from experiments.sweeps.runs import load_config
from imp_jax import runs


def make_mnist5k_config(rounds: int, epochs: int | None) -> ConfigDict:
    """Return configs/mnist5k.py without twins: rounds with twins have another shape and compile once more."""
    config = load_config("mnist5k")
    config.rounds, config.epochs, config.instability.rounds = rounds, epochs or config.epochs, ()
    return config


def time_run(config: ConfigDict, workdir: str) -> float:
    """Train all rounds of a config and return the seconds that they took."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        runs.run(config, workdir)
    return time.perf_counter() - start
