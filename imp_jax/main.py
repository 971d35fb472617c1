"""The command line: `python -m imp_jax.main --config=configs/mnist5k.py`.

Any field of the config can be overridden, as in `--config.optimizer.learning_rate=1e-2`.
"""

import contextlib
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from imp_jax import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run is kept; a run found there goes on where it stopped. By default runs/ and the config's name "
    "with the fields that were overridden.",
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")
# of several processes that train together; srun and mpirun tell them
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many train together.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


def main(argv):
    sys.unraisablehook = _unraisable
    logging.set_verbosity(logging.FATAL)  # Orbax and TFDS log every file; what they raise is reported below
    from imp_jax.errors import UserError
    from imp_jax.runtime.signals import GracefulStop, Stopped

    try:
        if argv[1:]:
            raise UserError(f"{argv[1]!r} is not a flag; flags are written --name=value")
        if _CONFIG.value is None:
            raise UserError("--config is missing; name a config file, such as --config=configs/mnist5k.py")
        with GracefulStop() as interruption:
            from imp_jax.runtime import devices, distributed
            from imp_jax.workdir.progress import ignore_print_errors

            distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
            devices.use_one_device_per_cpu_core()
            devices.require_usable()
            with (
                distributed.exit_on_failure(_DEBUG.value),
                distributed.silence_other_processes(),
                ignore_print_errors(),
            ):
                _run(interruption)
    except UserError as error:
        if _DEBUG.value:
            raise
        sys.exit(f"error: {error}")
    except OSError as error:
        from imp_jax.runtime import distributed

        if not distributed.is_disk_failure(error):
            raise
        sys.exit(f"error: cannot go on: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        from imp_jax.runtime import distributed

        distributed.shutdown(distributed.ABORT_TIMEOUT_S)
        os._exit(128 + stopped.number)  # not to wait for analyses beside the training


def _run(interruption):
    from imp_jax import analysis, runs
    from imp_jax.divergence import DivergedError
    from imp_jax.errors import UserError
    from imp_jax.runtime import compilation, distributed

    workdir = cli.find_workdir(_WORKDIR.value, _CONFIG.value, flags.FLAGS["config"])
    compilation.enable_compilation_cache()
    try:
        config_file = config_flags.get_config_filename(flags.FLAGS["config"])
        runs.run(_CONFIG.value, workdir, interruption, config_file, analyses=analysis)
    except DivergedError:
        with contextlib.suppress(UserError):  # what is on disk is worth a look all the same
            if distributed.is_primary():
                analysis.run(workdir)
        distributed.shutdown()
        if not distributed.is_primary():  # which says it
            sys.exit(1)
        raise
    if distributed.is_primary():
        analysis.run(workdir)
    distributed.shutdown()


def _unraisable(unraisable):
    """Hide what Orbax prints after a write that failed and was reported: it has closed its event loop."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
