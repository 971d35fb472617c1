"""Train the runs of a pack in one program: `python -m experiments.sweeps.pack --root=ROOT RUN RUN …`.

Started by `launchers.train_locally`. A RUN is JSON, such as {"base": "mnist5k", "overrides": {"seed": 1}}.
"""

import argparse
import copy
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from experiments.sweeps.runs import REPOSITORY, Run, make_run
from experiments.sweeps.sweep import Sweep
from imp_jax import analysis, cli, packing
from imp_jax.config_files import as_tuples
from imp_jax.errors import UserError
from imp_jax.runtime import compilation, devices
from imp_jax.runtime.signals import GracefulStop, Stopped


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.sweeps.pack", description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=parse_run)
    arguments = parser.parse_args()
    cli.replace_unprintable()
    logging.set_verbosity(logging.FATAL)
    try:
        with GracefulStop() as stop:
            devices.use_one_device_per_cpu_core()
            devices.require_usable()
            compilation.enable_compilation_cache()
            errors = train_runs(arguments.runs, Sweep(arguments.root), arguments.data_dir, stop)
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(report_errors(arguments.runs, errors))


def parse_run(text: str) -> Run:
    """Return the run that JSON describes."""
    described = json.loads(text)
    overrides = {name: as_tuples(value) for name, value in described["overrides"].items()}
    return make_run(described["base"], overrides)


def train_runs(
    runs: Sequence[Run], sweep: Sweep, data_dir: str | None, stop: GracefulStop
) -> list[BaseException | None]:
    """Train runs in one program and analyse those that are finished; return the exception that ended each.

    As in `Run.command`, a network that diverges does not end its run.
    """
    errors = packing.run_together(
        [_make_config(run, data_dir) for run in runs],
        [sweep.workdir(run) for run in runs],
        stop,
        [str(REPOSITORY / "configs" / f"{run.base}.py") for run in runs],
        analyses=analysis,
    )
    for i, run in enumerate(runs):
        if stop.requested:  # the same command computes the analyses
            errors[i] = errors[i] or stop.stopped("before its analyses")
        elif errors[i] is None:
            try:
                analysis.run(sweep.workdir(run))
            except Exception as error:  # the other runs are analysed
                errors[i] = error
    return errors


def _make_config(run: Run, data_dir: str | None) -> ConfigDict:
    config = copy.deepcopy(run.config)
    config.on_divergence = "drop"
    if data_dir:
        config.dataset.data_dir = data_dir
    return config


def report_errors(runs: Sequence[Run], errors: Sequence[BaseException | None]) -> int:
    """Print why each run ended that is not finished; return the exit status. After a signal, exit at once."""
    for run, error in zip(runs, errors, strict=True):
        if isinstance(error, Stopped):
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, UserError | OSError):
            print(f"error: {run.name}: {error}", file=sys.stderr, flush=True)
        elif error is not None:
            traceback.print_exception(error)
    if stopped := [error for error in errors if isinstance(error, Stopped)]:
        os._exit(128 + stopped[0].number)  # does not wait for analyses on other threads
    return int(any(errors))


if __name__ == "__main__":
    main()
