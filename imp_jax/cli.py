"""Functions that the commands share: parse flags, phrase error messages, and print safely."""

import copy
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from imp_jax import errors, methods


def replace_unprintable() -> None:
    """Make stdout and stderr print `?` for characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def define_config(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Define the flag --config, which names a config file, and --config.FIELD, which override its fields."""
    try:
        holder = config_flags.DEFINE_config_file(
            "config",
            help_string="Config file, such as configs/mnist5k.py; it is Python and is executed. A method may "
            f"follow a colon, as in configs/mnist5k.py:lrr: {', '.join(methods.METHODS)}.",
            flag_values=flag_values,
            lock_config=False,
            accept_new_attributes=True,  # config.validate reports unknown fields
        )
    except flags.Error as error:  # ml_collections already reads the command line in this call
        sys.exit(f"error: {_flag_error_message(error)}")
    flag = flag_values["config"]
    parse = flag.parser.parse

    def parse_and_copy(path):
        config = parse(path)
        if isinstance(config, ConfigDict):
            flag.config_of_file = copy.deepcopy(config)  # as in the file, without overrides; for `find_workdir`
        return config

    flag.parser.parse = parse_and_copy
    return holder


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags of `imp_jax.main` and return the other arguments; exit with one sentence on any error."""
    from imp_jax.config import describe_type, unknown_field

    replace_unprintable()
    try:
        other_arguments = flags.FLAGS(argv)
        getattr(flags.FLAGS.config, "items", None)  # raises if the config file could not be read
        return other_arguments
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        expected = describe_type(match[1]) if match else ""
        is_config_error = str(error).startswith("flag --config")
        message = _load_error_message(error) if is_config_error else str(error)
        message = f"{match[1]} is {match[2]!r}; it should be {expected}" if expected else message
    except flags.UnrecognizedFlagError as error:
        hint = (
            f"; the config field is set by --config.{error.flagname}" if describe_type(error.flagname) else ""
        )
        message = f"{error}{hint}"
    except flags.Error as error:
        message = _flag_error_message(error)
    except Exception as error:  # a config file is Python and may raise anything
        if "--debug" in argv:
            raise
        overridden_fields = re.findall(r"--config\.([\w.]+)", " ".join(argv))
        unknown = [field for field in overridden_fields if not describe_type(field)]
        message = unknown_field(unknown[0]) if unknown else _load_error_message(error)
    sys.exit(f"error: {' '.join(message.split())}")


def parse_overrides(arguments: Sequence[str], config: ConfigDict) -> dict[str, Any]:
    """Return the fields that arguments of the form --config.FIELD=VALUE set, with the types of `config`.

    Raises:
      UserError: another argument, an unknown field, or a value of a wrong type.
    """
    from imp_jax import config as configs

    known = configs.flatten(config)
    for argument in arguments:
        match = re.fullmatch(r"--config\.([\w.]+)(=.*)?", argument, re.DOTALL)
        if not match or not match[2]:
            raise errors.UserError(f"{argument!r} is not a flag; fields are set by --config.FIELD=VALUE")
        if match[1] not in known:
            raise errors.UserError(configs.unknown_field(match[1]))
    values = flags.FlagValues()
    copied = configs.default()  # unlike a copy of `config`, knows which fields may be None
    copied.update_from_flattened_dict(known)
    holder = config_flags.DEFINE_config_dict(
        "config", copied, flag_values=values, lock_config=False, sys_argv=list(arguments)
    )
    try:
        values(["imp_jax", *arguments])
    except flags.Error as error:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        expected = configs.describe_type(match[1]) if match else ""
        message = f"{match[1]} is {match[2]!r}; it should be {expected}" if expected else str(error)
        raise errors.UserError(message) from error
    new = configs.flatten(holder.value)
    names = [argument.removeprefix("--config.").partition("=")[0] for argument in arguments]
    return {name: new[name] for name in names}


def _flag_error_message(error):
    return " ".join(str(error).removeprefix("ERROR:: ").split())


def find_workdir(workdir: str | None, config: Any, flag: flags.Flag) -> Path:
    """Return the folder of a run: `workdir`, or by default runs/NAME, with the name of `config_files.run_name`.

    Args:
      workdir: the value of the flag --workdir, or None.
      config: the config of the run.
      flag: the flag --config of `define_config`.

    Raises:
      UserError: see `errors.user_path` and `config.validate`.
    """
    from imp_jax import config as configs
    from imp_jax import config_files

    if workdir is not None:
        return errors.user_path(workdir, "--workdir")
    configs.validate(config)
    path, _, argument = flag.config_filename.partition(":")
    name = f"{Path(path).stem}-{config_files.as_name(argument)}" if argument else Path(path).stem
    return Path("runs") / config_files.run_name(name, flag.config_of_file, config)


def _load_error_message(error):
    # ml_collections puts a whole traceback into the message; the last line is the cause
    cause = f"{type(error).__name__}: {error}".strip().splitlines()[-1].strip()
    cause = re.sub(r"^(imp_jax\.errors\.)?(UserError|UnknownNameError): ", "", cause)
    return f"cannot load the config: {cause}"
