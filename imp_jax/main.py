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
    "Folder of the run. A run that was stopped in this folder is continued. Default: runs/NAME, where NAME is "
    "the name of the config and the overridden fields.",
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")
# for several processes that train together; under srun and mpirun JAX finds these values itself
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if several train together.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes that train together.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Index of this process, from 0.", lower_bound=0)


def main(argv):
    if argv[1:]:
        sys.exit(f"error: {argv[1]!r} is not a flag; flags are written --name=value")
    if _CONFIG.value is None:
        sys.exit("error: --config is missing; name a config file, such as --config=configs/mnist5k.py")
    # Orbax and TFDS log every file, and Matplotlib its import; their exceptions are reported all the same
    logging.set_verbosity(logging.FATAL)
    from imp_jax import command  # imported after flags are parsed: --help needs no JAX

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
