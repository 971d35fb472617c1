"""The command line: `python -m imp_jax.main --config=configs/mnist5k.py --workdir=runs/mnist5k`.

Any field of the config can be overridden, as in `--config.optimizer.learning_rate=1e-2`.
"""

import contextlib
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Config file, such as configs/mnist5k.py; it is Python and is executed.",
    lock_config=False,
    accept_new_attributes=True,  # an unknown field is said by config.validate, wherever it comes from
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept; a run found there goes on where it stopped."
)
# of several processes that train together; srun and mpirun tell them
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many train together.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


def main(argv):
    sys.unraisablehook = _unraisable
    logging.set_verbosity(logging.FATAL)  # orbax and TFDS tell of every file, and what they raise is said below
    from imp_jax.config import UserError  # not before the flags are parsed: --help needs no JAX
    from imp_jax.interruption import Interruption, Stopped

    try:
        if argv[1:]:
            raise UserError(f"{argv[1]!r} is not a flag; flags are written --name=value")
        if _CONFIG.value is None:
            raise UserError("--config is missing; name a config file, such as --config=configs/mnist5k.py")
        if not _WORKDIR.value:
            raise UserError("--workdir is missing; say where to keep the run, such as --workdir=runs/mnist5k")
        with Interruption() as interruption:
            from imp_jax import devices, processes, records

            processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
            devices.divide_cpu()
            with processes.ends_alone(), processes.first_speaks(), records.ignore_print_errors():
                _run(interruption)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        from imp_jax import processes

        if not processes.is_disk_failure(error):
            raise
        sys.exit(f"error: cannot go on: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        from imp_jax import processes

        processes.leave(processes.PARTING)
        os._exit(128 + stopped.number)  # not to wait for analyses beside the training


def _run(interruption):
    from imp_jax import analysis, execution, imp, processes
    from imp_jax.config import UserError
    from imp_jax.divergence import DivergedError

    with contextlib.suppress(UserError):  # which imp.run says
        execution.keep_programs(_CONFIG.value)
    try:
        config_file = config_flags.get_config_filename(flags.FLAGS["config"])
        imp.run(_CONFIG.value, _WORKDIR.value, interruption, config_file)
    except DivergedError:
        with contextlib.suppress(UserError):  # what is on disk is worth a look all the same
            if processes.is_first():
                analysis.run(_WORKDIR.value)
        processes.leave()
        if not processes.is_first():  # which says it
            sys.exit(1)
        raise
    if processes.is_first():
        analysis.run(_WORKDIR.value)
    processes.leave()


def _unraisable(unraisable):
    """Drop what a write that failed, and has been said, goes on to print: Orbax has closed its event loop."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def parse_flags(argv):
    """absl's flag parser, with one sentence for whatever can go wrong in it."""
    from imp_jax.config import type_in_words, unknown_field

    try:
        rest = flags.FLAGS(argv)
        getattr(_CONFIG.value, "items", None)  # a file that could not be read says so here, on first access
        return rest
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        expected = type_in_words(match[1]) if match else ""
        message = str(error) if not str(error).startswith("flag --config") else _cannot_load(error)
        message = f"{match[1]} is {match[2]!r}; it should be {expected}" if expected else message
    except flags.UnrecognizedFlagError as error:
        hint = (
            f"; the config field is set by --config.{error.flagname}" if type_in_words(error.flagname) else ""
        )
        message = f"{error}{hint}"
    except flags.Error as error:
        message = str(error)
    except Exception as error:  # a config file is code, and may raise anything
        overridden = re.findall(r"--config\.([\w.]+)", " ".join(argv))
        unknown = [field for field in overridden if not type_in_words(field)]
        message = unknown_field(unknown[0]) if unknown else _cannot_load(error)
    sys.exit(f"error: {message}")


def _cannot_load(error):
    cause = (
        f"{type(error).__name__}: {error}".strip().splitlines()[-1].strip()
    )  # the rest is a traceback in words
    return f"cannot load the config: {cause}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
