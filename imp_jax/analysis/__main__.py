"""The command line of `imp_jax.analysis`: `python -m imp_jax.analysis --workdir=runs/mnist5k`."""

import argparse
import sys

from absl import logging

from imp_jax import analysis, cli, errors
from imp_jax.errors import UserError
from imp_jax.runtime.signals import GracefulStop
from imp_jax.workdir.lock import stored_config_file
from imp_jax.workdir.progress import ignore_print_errors


def main():
    cli.replace_unprintable()
    parser = argparse.ArgumentParser(
        prog="python -m imp_jax.analysis", description=analysis.__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--workdir", required=True, help="the workdir of a run of imp_jax.main, finished or not"
    )
    parser.add_argument("--data_dir", help="the folder of the data set, if it differs from that of the config")
    parser.add_argument("--config", help="the config file to execute, if that of the run was moved")
    parser.add_argument(
        "--also", default="", help="analyses on request, separated by commas, such as sharpness,noise"
    )
    arguments = parser.parse_args()
    also = tuple(name for name in arguments.also.split(",") if name)
    logging.set_verbosity(logging.FATAL)
    try:
        workdir = errors.user_path(arguments.workdir, "--workdir")
        config_file = arguments.config or stored_config_file(workdir, existing=True)
        with GracefulStop(), ignore_print_errors():
            analysis.run(workdir, arguments.data_dir, config_file, also)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
