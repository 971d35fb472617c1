"""The command `imp_jax.main` after its flags are parsed: train, analyse, and exit with a status."""

import contextlib
import os
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from imp_jax import analysis, cli, runs
from imp_jax import config as configs
from imp_jax.divergence import DivergedError
from imp_jax.errors import UserError
from imp_jax.runtime import compilation, devices, distributed
from imp_jax.runtime.signals import GracefulStop, Stopped
from imp_jax.workdir.progress import ignore_print_errors


def train_and_analyse(
    config: ConfigDict,
    workdir: str | None,
    config_flag: flags.Flag,
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    debug: bool = False,
) -> None:
    """Train `config`, record the run in `workdir` and analyse it. Print one sentence and exit on a `UserError`.

    Args:
      workdir: the value of the flag --workdir; None uses the folder of `cli.find_workdir`.
      config_flag: the flag --config, from which `config` comes.
      coordinator, processes, process: see `distributed.initialize`.
      debug: raise a `UserError` with its traceback instead.
    """
    sys.unraisablehook = _report_unraisable
    try:
        with GracefulStop() as stop:
            distributed.initialize(coordinator, processes, process)
            devices.use_one_device_per_cpu_core()
            devices.require_usable()
            with (
                distributed.exit_on_failure(debug),
                distributed.silence_other_processes(),
                ignore_print_errors(),
            ):
                compilation.enable_compilation_cache()
                path = cli.find_workdir(workdir, config, config_flag)
                _train_and_analyse(config, path, config_flags.get_config_filename(config_flag), stop)
    except UserError as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
    except OSError as error:
        if not distributed.is_disk_failure(error):
            raise
        sys.exit(f"error: cannot continue: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        distributed.shutdown(distributed.ABORT_TIMEOUT_S)
        os._exit(128 + stopped.number)  # does not wait for analyses on other threads


def _train_and_analyse(config, workdir, config_file, stop):
    with distributed.raise_on_all_processes():
        configs.validate(config)
        analysis.check_requests(config.analysis.also)
    try:
        runs.run(config, workdir, stop, config_file, analyses=analysis)
    except DivergedError:
        with contextlib.suppress(UserError):  # the divergence is the error to report
            if distributed.is_primary():
                analysis.run(workdir)
        distributed.shutdown()
        if not distributed.is_primary():  # the primary process reports the error
            sys.exit(1)
        raise
    if distributed.is_primary():
        analysis.run(workdir)
    distributed.shutdown()


def _report_unraisable(unraisable):
    """Hide an error of Orbax about its closed event loop, which follows a failed write that was reported."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)
