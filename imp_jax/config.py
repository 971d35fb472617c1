"""Configs: their defaults, and checks of their fields with error messages; `config_fields` lists all fields."""

import difflib
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from imp_jax.config_fields import FIELDS
from imp_jax.config_rules import refuse_unused_values
from imp_jax.errors import UserError


def default() -> ConfigDict:
    """Return a config with the defaults of `FIELDS`. Config files start from it and change fields."""
    config = ConfigDict()
    for name, field in FIELDS.items():
        group_name, _, short_name = name.rpartition(".")
        if group_name and group_name not in config:
            config[group_name] = ConfigDict()
        group = config[group_name] if group_name else config
        group[short_name] = FieldReference(field.default, field_type=object) if field.types else field.default
    return config


def validate(config: ConfigDict) -> None:
    """Check names, types and values of all fields.

    Does not check the names of models, data sets, augmentations, optimizers, schedules, scores and arms:
    `experiment.setup` does.

    Raises:
      UserError: an unknown or missing field; a value that has a wrong type, is not allowed, or has no effect
        with the values of other fields.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() returned {type(config).__name__}; it should return an ml_collections.ConfigDict"
        )
    values = flatten(config)
    for name in values:
        if name not in FIELDS:
            raise UserError(unknown_field(name))
    for name in flatten(default()):
        field = FIELDS[name]
        if name not in values:
            raise UserError(
                f"the config lacks the field {name}; imp_jax.config.default() has it as {field.default!r}"
            )
        if not field.has_type(values[name]):
            raise UserError(f"{name} is {values[name]!r}; it should be {field.describe_type()}")
        if not field.check(values[name]):
            raise UserError(f"{name} is {values[name]!r}; it should be {field.words}")
    refuse_unused_values(values, {name: field.default for name, field in FIELDS.items()})


def unknown_field(name: str) -> str:
    """Return the message for an unknown field, with a similar name or the fields of its group."""
    known_names = list(flatten(default()))
    close = difflib.get_close_matches(name, known_names, n=1, cutoff=0.8)
    group = name.rpartition(".")[0]
    siblings = [known.rpartition(".")[2] for known in known_names if known.rpartition(".")[0] == group]
    if close:
        hint = f" (did you mean {close[0]}?)"
    else:
        hint = f"; {group or 'the config'} has {', '.join(siblings)}" if siblings else ""
    return f"there is no config field {name}{hint}"


def describe_type(name: str) -> str:
    """Describe the type of a field for a message, as "of type int, like 60"; empty for an unknown field."""
    if name in FIELDS:
        return FIELDS[name].describe_type()
    is_group = any(field_name.startswith(f"{name}.") for field_name in FIELDS)
    return "a group of fields, set one by one" if is_group else ""


def may_change_on_resume(name: str) -> bool:
    """Return whether a field may change when a run is resumed, because no training depends on it.

    A field that only another version has is treated like the other fields of its group, if these agree.
    """
    if name in FIELDS:
        return FIELDS[name].may_change_on_resume
    group, _, _ = name.rpartition(".")
    siblings = [field for known, field in FIELDS.items() if group and known.rpartition(".")[0] == group]
    return bool(siblings) and all(field.may_change_on_resume for field in siblings)


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Return all fields of a config, or of the content of a config.json, by name, such as `optimizer.name`."""
    values = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            values |= flatten(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def describe_for_processes(config: ConfigDict) -> str:
    """Return the fields that must be equal on all processes that train together."""
    may_differ = ("dataset.data_dir", "dataset.workers")
    return str({name: value for name, value in flatten(config).items() if name not in may_differ})
