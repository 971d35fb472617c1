"""The command line: `python -m imp_jax.main --config=configs/mnist5k.py`.

Any field of the config can be overridden, as in `--config.optimizer.learning_rate=1e-2`.
"""

import sys

from absl import app, flags, logging

from imp_jax import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run is kept; a run found there goes on where it stopped. By default runs/ and the config's name "
    "with the fields that were overridden.",
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")
# of several processes that train together; srun and mpirun set these
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many train together.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


def main(argv):
    if argv[1:]:
        sys.exit(f"error: {argv[1]!r} is not a flag; flags are written --name=value")
    if _CONFIG.value is None:
        sys.exit("error: --config is missing; name a config file, such as --config=configs/mnist5k.py")
    # Orbax and TFDS log every file, and Matplotlib when it is imported; what they raise is reported
    logging.set_verbosity(logging.FATAL)
    from imp_jax import command  # not before the flags are parsed: --help needs no JAX

    command.train_and_analyse(
        _CONFIG.value,
        _WORKDIR.value,
        flags.FLAGS["config"],
        coordinator=_COORDINATOR.value,
        processes=_PROCESSES.value,
        process=_PROCESS.value,
        debug=_DEBUG.value,
    )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
