"""The command line of `imp_jax.data`: `python -m imp_jax.data prepare NAME [--data_dir=DIR]`."""

import argparse
import sys

from absl import logging

from imp_jax import cli


def main() -> None:
    """Run the command; if it fails with a `UserError`, print its message and exit."""
    cli.replace_unprintable()
    parser = argparse.ArgumentParser(prog="python -m imp_jax.data", description="Prepare data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="download a TFDS set and write it as ArrayRecord files")
    command.add_argument("name", help="cifar10, or any other image-classification set of TFDS")
    command.add_argument("--data_dir", help="folder of the prepared sets (default: ~/tensorflow_datasets)")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)

    from imp_jax import data
    from imp_jax.errors import UserError
    from imp_jax.runtime.signals import GracefulStop
    from imp_jax.workdir.progress import ignore_print_errors

    try:
        with GracefulStop(), ignore_print_errors():
            print(f"{arguments.name} is in {data.prepare(arguments.name, arguments.data_dir)}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
