"""What the commands of this package share: reading flags, wording their errors, printing anywhere."""

import copy
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from imp_jax import errors


def replace_unprintable() -> None:
    """Let stdout and stderr print `?` for a character that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def define_config(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Define the flag --config, which names a config file, and --config.FIELD, which override its fields."""
    try:
        holder = config_flags.DEFINE_config_file(
            "config",
            help_string="Config file, such as configs/mnist5k.py; it is Python and is executed.",
            flag_values=flag_values,
            lock_config=False,
            accept_new_attributes=True,  # config.validate reports an unknown field, wherever it comes from
        )
    except flags.Error as error:  # it reads the command line now, and any --flagfile in it
        sys.exit(f"error: {_one_line(error)}")
    flag = flag_values["config"]
    execute = flag.parser.parse

    def execute_and_keep(path):
        config = execute(path)
        if isinstance(config, ConfigDict):
            flag.config_of_file = copy.deepcopy(config)  # without the fields overridden, for `find_workdir`
        return config

    flag.parser.parse = execute_and_keep
    return holder


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags of `imp_jax.main`; exit with one sentence for whatever can go wrong in it."""
    from imp_jax.config import describe_type, unknown_field

    replace_unprintable()
    try:
        rest = flags.FLAGS(argv)
        getattr(flags.FLAGS.config, "items", None)  # a file that could not be read raises on first access
        return rest
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        expected = describe_type(match[1]) if match else ""
        message = str(error) if not str(error).startswith("flag --config") else _cannot_load(error)
        message = f"{match[1]} is {match[2]!r}; it should be {expected}" if expected else message
    except flags.UnrecognizedFlagError as error:
        hint = (
            f"; the config field is set by --config.{error.flagname}" if describe_type(error.flagname) else ""
        )
        message = f"{error}{hint}"
    except flags.Error as error:
        message = _one_line(error)
    except Exception as error:  # a config file is code, and may raise anything
        if "--debug" in argv:
            raise
        overridden = re.findall(r"--config\.([\w.]+)", " ".join(argv))
        unknown = [field for field in overridden if not describe_type(field)]
        message = unknown_field(unknown[0]) if unknown else _cannot_load(error)
    sys.exit(f"error: {' '.join(message.split())}")


def _one_line(error):
    return " ".join(str(error).removeprefix("ERROR:: ").split())


def find_workdir(workdir: str | None, config: Any, flag: flags.Flag) -> Path:
    """Return the folder of a run: `workdir`, or runs/ and the name of its config with the fields overridden.

    Args:
      workdir: what the flag --workdir says; None without it.
      config: of the run.
      flag: the flag --config of `define_config`.
    """
    from imp_jax import config as configs

    if workdir is not None:
        return errors.user_path(workdir, "--workdir")
    configs.validate(config)
    path, _, argument = flag.config_filename.partition(":")
    name = f"{Path(path).stem}-{configs.as_name(argument)}" if argument else Path(path).stem
    return Path("runs") / configs.run_name(name, flag.config_of_file, config)


def _cannot_load(error):
    # ml_collections puts a whole traceback into the message: its last line is the cause
    cause = f"{type(error).__name__}: {error}".strip().splitlines()[-1].strip()
    return f"cannot load the config: {cause}"
