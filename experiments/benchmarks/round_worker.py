"""Train and analyse rounds of a config in this process: `round_worker.py CONFIG ROUNDS EPOCHS`.

`experiments.benchmarks.midi` starts it with the package `imp_jax` of another version, so it imports no other
package of this repository. It prints the seconds per round of training and recording, and of all analyses, and
the peak memory of the process, as a line of JSON.
"""

import contextlib
import io
import json
import resource
import runpy
import shutil
import sys
import tempfile
import time
from pathlib import Path

from imp_jax import analysis, runs
from imp_jax.runtime import devices


def time_rounds(config_path: str, rounds: int, epochs: int) -> dict[str, float]:
    """Train and analyse 1 + `rounds` rounds, and return the seconds per round and the peak memory in GiB.

    The training of round 0 and the first analyses, which compile, are left out. So are twins, because rounds
    with them have another shape.

    Args:
      config_path: a config file.
      rounds: number of timed rounds.
      epochs: of each training, at a constant learning rate; 0 for those of the config.
    """
    config = runpy.run_path(config_path)["get_config"]()
    config.rounds, config.instability.rounds, config.epochs = 1 + rounds, (), epochs or config.epochs
    if epochs:
        config.optimizer.schedule, config.optimizer.milestones = "constant", ()
    ends = []
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        runs.run(config, workdir, on_round=[lambda end: ends.append(time.perf_counter())])
        analysis.run(workdir)
        shutil.rmtree(Path(workdir) / "analysis")
        start = time.perf_counter()
        analysis.run(workdir)
        analyses = time.perf_counter() - start
    peak_bytes = (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "round": (ends[-1] - ends[0]) / rounds,
        "analyses": analyses / (1 + rounds),
        "peak_gib": peak_bytes / 2**30,
    }


if __name__ == "__main__":
    devices.use_one_device_per_cpu_core()
    print(json.dumps(time_rounds(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
