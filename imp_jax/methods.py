"""Methods by name: presets of config fields, such as `--config=configs/resnet20.py:lrr`."""

from typing import Any

from ml_collections import ConfigDict

from imp_jax.config import flatten
from imp_jax.errors import UserError, lookup

_AT_INITIALIZATION = {"rewind_step": 0, "pruning.network": "initial"}

# fields that a method sets; all others are those of the config file
METHODS: dict[str, dict[str, Any]] = {
    # train, prune by magnitude, reset to the initialisation (section 2.1)
    "imp": {"rewind_step": 0, "pruning.network": "trained"},
    # reset to an early step of the dense training (Frankle et al. 2020); the config gives the step
    "rewind": {"pruning.network": "trained"},
    # learning-rate rewinding: keep the weights, restart optimizer and schedule (Renda et al. 2020)
    "lrr": {"rewind_step": None, "pruning.network": "trained"},
    # keep the weights, and train at the last learning rate of the schedule (Han et al. 2015)
    "finetune": {"rewind_step": None, "pruning.network": "trained", "optimizer.finetune": True},
    # prune the dense network once, to the density of each round
    "oneshot": {"rewind_step": 0, "pruning.network": "dense"},
    # prune the initialisation once, to the density of each round: no training before the mask
    "snip": {**_AT_INITIALIZATION, "pruning.score": "taylor"},
    "grasp": {**_AT_INITIALIZATION, "pruning.score": "grasp"},
    "synflow": {**_AT_INITIALIZATION, "pruning.score": "synflow", "pruning.steps": 100},
    "random": {**_AT_INITIALIZATION, "pruning.score": "random"},
    "erk": {**_AT_INITIALIZATION, "pruning.score": "random", "pruning.scope": "erk"},
}


def apply(config: ConfigDict, method: str = "imp", *, rewind_step: int | None = None) -> ConfigDict:
    """Set the fields of a method, and return the config.

    Args:
      method: a key of `METHODS`; what stands behind the colon in `--config=configs/resnet20.py:lrr`.
      rewind_step: the step of the method `rewind` for the network of the config.

    Raises:
      UserError: an unknown name, or `rewind` without a step.
    """
    fields = dict(lookup(METHODS, "the method", method))
    if method == "rewind":
        if not rewind_step:
            raise UserError(
                "the method is 'rewind', and the config gives no rewind_step; it should be a step above 0"
            )
        fields["rewind_step"] = rewind_step
    config.update_from_flattened_dict(fields)
    return config


def name_of(config: ConfigDict) -> str:
    """Return the name of the method whose fields a config has; "" if it is none of them."""
    values = flatten(config)
    defaults = {
        "pruning.score": "magnitude",
        "pruning.scope": "global",
        "pruning.steps": 1,
        "optimizer.finetune": False,
    }
    for name, fields in METHODS.items():
        expected = {**defaults, **fields}
        if name == "rewind" and not values["rewind_step"]:
            continue
        if all(values[field] == value for field, value in expected.items()):
            return name
    return ""
