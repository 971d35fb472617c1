"""Write, read and compare the config.json of a workdir, and name the folder of a run."""

import hashlib
import json
import os
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from imp_jax.config import FIELDS, default, flatten, may_change_on_resume, unknown_field, validate
from imp_jax.errors import UserError, one_line

# The format of config.json. Format 1 had no number, and its momentum was used by the optimizer momentum only.
FORMAT = 2
# data sets and models that format 1 knew, and for which some fields had no effect
_IN_MEMORY_IN_FORMAT_1 = ("mnist5k", "mnist", "fashion_mnist", "cifar10", "cifar100")
_WITHOUT_NORMALIZATION_IN_FORMAT_1 = ("lenet", "conv4")
_LONGEST_NAME_BYTES = 200  # of a folder's name; file systems allow 255


def to_json(config: ConfigDict) -> str:
    """Return the content of config.json for a config, with the number of its format."""
    return json.dumps({**config.to_dict(), "format": FORMAT}, indent=2) + "\n"


def from_json(stored: dict) -> ConfigDict:
    """Return the config of a parsed config.json. A missing field gets the value that keeps the old behaviour.

    Raises:
      UserError: see `validate`; a field or a format of a later version.
    """
    values = _upgraded_values(stored)
    for name in values:
        if name not in FIELDS:
            raise UserError(unknown_field(name))
    config = default()
    config.update_from_flattened_dict(values)
    validate(config)
    return config


def differences(config: ConfigDict, stored: dict) -> list[str]:
    """Describe the fields that differ between `config` and a parsed config.json, one phrase per field.

    Leaves out fields that do not change results, and a larger number of rounds, which continues the stored run.

    Raises:
      UserError: `stored` has a format of a later version.
    """
    new_values, old_values = flatten(config), {**flatten(default()), **_upgraded_values(stored)}
    for values in (new_values, old_values):
        if values.get("optimizer.name") == "momentum" and values.get("optimizer.momentum") is None:
            values["optimizer.momentum"] = 0.9  # the meaning of None
    absent = object()
    phrases = []
    for name in sorted(new_values | old_values):
        old, new = old_values.get(name, absent), new_values.get(name, absent)
        same = old == new or (name == "rounds" and old < new)
        if name == "branch.mask_from" and old and new:
            same = _folder_name(old) == _folder_name(new)  # the folder may have been moved
        elif name == "dataset.data_dir" and new_values.get("dataset.name") == "folder":
            same = _folder_name(old) == _folder_name(new)
        elif may_change_on_resume(name):
            same = True
        if not same:
            old, new = ("absent" if value is absent else repr(value) for value in (old, new))
            phrases.append(f"{name} is {old} there and {new} here")
    return phrases


def _upgraded_values(stored):
    """Return the fields of a parsed config.json by name, with their meaning in this version."""
    number = stored.get("format", 1)
    if number > FORMAT:
        raise UserError(
            f"the config has format {number}, of a later version; this version reads formats 1 to {FORMAT}"
        )
    values = flatten({name: value for name, value in stored.items() if name != "format"})
    values = {name: as_tuples(value) for name, value in values.items()}
    return _upgrade_from_format_1(values) if number == 1 else values


def as_tuples(value: Any) -> Any:
    """Return a value of parsed JSON with tuples instead of lists, as fields have them."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _upgrade_from_format_1(values):
    """Return the fields of format 1 in this format, which refuses values that had no effect in format 1."""
    values = {**flatten(default()), **values}
    if values["optimizer.name"] != "momentum":
        values["optimizer.momentum"] = None
    milestones = [epoch for epoch in values["optimizer.milestones"] if epoch < values["epochs"]]
    if values["optimizer.schedule"] == "step" and not milestones:
        values["optimizer.schedule"] = "constant"
    values["optimizer.milestones"] = tuple(milestones) if values["optimizer.schedule"] == "step" else ()
    unused = [] if values["repulsion.strength"] else ["repulsion.memory", "repulsion.dtype"]
    if values["dataset.name"] in _IN_MEMORY_IN_FORMAT_1:
        unused += ["dataset.image_side", "dataset.workers", "checkpoint_every_steps"]
    if values["model.name"] in _WITHOUT_NORMALIZATION_IN_FORMAT_1:
        unused += ["model.norm_momentum", "analysis.batch_norm"]
    if (warmup_epochs := values["optimizer.warmup_epochs"]) > values["epochs"]:
        # the training ended within its warm-up; this keeps the learning rate of every step
        values["optimizer.learning_rate"] *= values["epochs"] / warmup_epochs
        values["optimizer.warmup_epochs"] = float(values["epochs"])
    return values | {name: FIELDS[name].default for name in unused}


def execute(config_file: str) -> None:
    """Execute a config file, which may register models, data sets, arms and analyses.

    Raises:
      UserError: the file cannot be read, or raises an exception.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False)
    try:
        values(["imp_jax", f"--config={config_file}"])
        getattr(values.config, "items", None)  # a file that could not be read raises here
    except Exception as error:  # the file is code and may raise any exception
        raise UserError(
            f"cannot execute the config file {config_file}: {one_line(error)}; fix it, or give another --config"
        ) from error


def run_name(name: str, base: ConfigDict, config: ConfigDict) -> str:
    """Return the name of a run's folder: `name`, and each field in which `config` differs from `base`.

    An example is `resnet20,batch_size=1024`. Leaves out fields on which no training depends, but includes the
    name of the image folder for the data set `folder`.
    """
    base_values, values = flatten(base), flatten(config)
    parts = {}
    for field, value in sorted(values.items()):
        if field == "dataset.data_dir" and values["dataset.name"] == "folder" and value:
            value = _folder_name(value)
        elif may_change_on_resume(field):
            continue
        if value != base_values.get(field):
            parts[field] = value
    return join_name(name, parts)


def join_name(name: str, fields: dict[str, Any]) -> str:
    """Return the name of a folder: `name` and the values of fields, shortened to what file systems allow."""
    full_name = ",".join([name, *(f"{field}={as_name(value)}" for field, value in fields.items())])
    if len(full_name.encode()) > _LONGEST_NAME_BYTES:
        digest = hashlib.sha256(full_name.encode()).hexdigest()[:8]
        full_name = full_name.encode()[: _LONGEST_NAME_BYTES - 9].decode(errors="ignore") + f"-{digest}"
    return full_name


def _folder_name(path: str | os.PathLike | None) -> str:
    """Return the last part of the absolute path of a folder."""
    return os.path.basename(os.path.abspath(os.path.expanduser(path or "")))


def as_name(value: Any) -> str:
    """Return the value of a field as part of a file name."""
    if isinstance(value, tuple):
        return "-".join(map(as_name, value)) or "none"
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "-", text)
