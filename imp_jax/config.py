"""All config fields: their defaults, meanings, allowed values and error messages."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from imp_jax.errors import UserError

_NUMBER = (int, float)


@dataclass(frozen=True)
class Field:
    """A config field.

    Attributes:
      default: its value unless a config sets it. Values should have the same type, unless `types` is given;
        where the default is a float, an int will do.
      meaning: what it is, in words.
      check: returns whether a value of the right type is allowed.
      words: the allowed values in words; it completes the sentence "it should be …".
      types: the types of values, of a field that has more than one.
      may_change_on_resume: whether it may be changed while a run is stopped, because no training depends on it.
    """

    default: Any
    meaning: str
    check: Callable[[Any], bool] = lambda value: True
    words: str = ""
    types: tuple[type, ...] = ()
    may_change_on_resume: bool = False

    def has_type(self, value: Any) -> bool:
        """Return whether a value has a type that the field may have."""
        types = self.types or (_NUMBER if isinstance(self.default, float) else (type(self.default),))
        if isinstance(value, bool):  # a bool is an int in Python, but not in a config
            return bool in types
        return isinstance(value, types)

    def describe_type(self) -> str:
        """Return what types the field may have, for a message, such as "of type int, like 60"."""
        if self.types:
            return " or ".join("None" if t is type(None) else f"of type {t.__name__}" for t in self.types)
        return f"of type {type(self.default).__name__}, like {self.default!r}"


def _one_of(*names):
    words = f"{', '.join(names[:-1])} or {names[-1]}"
    return {"check": lambda value: value in names, "words": words}


_AT_LEAST_1 = {"check": lambda value: value >= 1, "words": "at least 1"}
_DEVICES = {"check": lambda value: value >= 1 or value == -1, "words": "at least 1, or -1 to fill"}
_AT_LEAST_0_AND_FINITE = {"check": lambda value: 0 <= value < float("inf"), "words": "at least 0 and finite"}
_ABOVE_0_AND_FINITE = {"check": lambda value: 0 < value < float("inf"), "words": "above 0 and finite"}
_RESUME = {"may_change_on_resume": True}

FIELDS = {
    "seed": Field(
        0, "all random keys fold from it", check=lambda value: 0 <= value < 2**32, words="from 0 to 2³² − 1"
    ),
    "replicates": Field(
        3,
        "repetitions, trained side by side; results of replicate 0 do not depend on their number",
        **_AT_LEAST_1,
    ),
    "arms": Field(
        ("imp", "reinit"), "what is trained on the mask of each round; the mask always comes from imp"
    ),
    "rounds": Field(
        25,
        "trainings, the dense one included; round n from 0 has density (1 − pruning.fraction)ⁿ",
        **_AT_LEAST_1,
    ),
    "epochs": Field(25, "epochs of each training", **_AT_LEAST_1),
    "batch_size": Field(60, "training images per step", **_AT_LEAST_1),
    "accumulate_steps": Field(
        1,
        "number of equal parts of a batch whose gradients are computed one after the other and added, to save "
        "memory; each part is normalised by its own statistics",
        **_AT_LEAST_1,
    ),
    "dtype": Field(
        "float32",
        "type of the computation; parameters and optimizer state are always float32",
        **_one_of("float32", "bfloat16"),
    ),
    "execution": Field(
        "auto",
        "how steps and members are compiled: scan_vmap, scan_unroll, step_vmap or step_unroll (streamed sets "
        "always run step by step); auto chooses by network and device",
    ),
    "rewind_step": Field(
        0,
        "step of the dense training to whose weights the surviving weights are reset in each round; 0 is the "
        "initialisation, None does not reset them",
        check=lambda value: value is None or value >= 0,
        words="a step of the dense training from 0, or None",
        types=(int, type(None)),
    ),
    "checkpoint_every_epochs": Field(
        5, "epochs between checkpoints within a round; there is always one at its end", **_AT_LEAST_1, **_RESUME
    ),
    "checkpoint_every_steps": Field(
        500, "steps between checkpoints within a round, of streamed sets only", **_AT_LEAST_1, **_RESUME
    ),
    "keep_checkpoints": Field(
        "all",
        "rounds whose checkpoints are kept; ends: the first, the last two",
        **_one_of("all", "ends"),
        **_RESUME,
    ),
    "on_divergence": Field(
        "stop",
        "what to do when a member diverges: stop the run, or drop the member and continue without it",
        **_one_of("stop", "drop"),
        **_RESUME,
    ),
    "dataset.name": Field(
        "mnist5k",
        "a registered set, such as mnist5k, cifar10 or folder (of images by class); another "
        "image-classification set of TFDS; or a dotted path such as their_package.sets:mine",
    ),
    "dataset.data_dir": Field(
        None,
        "folder of the data; None is that of TFDS, ~/tensorflow_datasets",
        check=lambda value: value != "",
        words="the path of a folder, or None for ~/tensorflow_datasets",
        types=(str, type(None)),
        **_RESUME,
    ),
    "dataset.normalize": Field(
        False,
        "whether each channel is scaled to mean 0 and standard deviation 1 over the training set; otherwise, "
        "pixels are scaled to [0, 1]",
    ),
    "dataset.augmentation": Field(
        None,
        "names of augmentations of the training images, such as crop and flip; None is what is usual for the "
        "set (both for CIFAR and ImageNet)",
        types=(tuple, type(None)),
    ),
    "dataset.image_side": Field(
        224, "height and width in pixels of the crops of a streamed set; no other set uses it", **_AT_LEAST_1
    ),
    "dataset.workers": Field(
        None,
        "processes that decode a streamed set: None is one per core, 0 decodes in threads of the training "
        "process; no other set uses it",
        check=lambda value: value is None or value >= 0,
        words="at least 0, or None",
        types=(int, type(None)),
        **_RESUME,
    ),
    "model.name": Field("lenet", "lenet, conv4, resnet20 and its family by depth, or resnet50"),
    "model.width": Field(
        1.0,
        "factor by which the numbers of channels or hidden units are multiplied, for quick runs",
        **_ABOVE_0_AND_FINITE,
    ),
    "model.norm_affine": Field(False, "whether the normalisation of ResNets has a learnable scale and bias"),
    "model.norm_momentum": Field(
        0.9,
        "factor by which a step multiplies the running statistics of ResNets before it adds those of the batch",
        check=lambda value: 0 <= value < 1,
        words="in [0, 1)",
    ),
    "model.norm_parts": Field(
        1,
        "number of equal parts of a batch with separate BatchNorm statistics (the per-GPU BatchNorm of most "
        "code bases); 1 uses the statistics of the whole batch, over all devices",
        **_AT_LEAST_1,
    ),
    "optimizer.name": Field("adam", "adam, momentum or sgd"),
    "optimizer.learning_rate": Field(12e-4, "learning rate before the schedule", **_ABOVE_0_AND_FINITE),
    "optimizer.momentum": Field(
        None,
        "heavy-ball momentum of the optimizers momentum and sgd; None is the optimizer's own, 0.9 and 0",
        check=lambda value: value is None or 0 <= value < 1,
        words="in [0, 1), or None",
        types=(float, int, type(None)),
    ),
    "optimizer.weight_decay": Field(
        0.0, "factor of the L2 penalty, added to the gradient of all parameters", **_AT_LEAST_0_AND_FINITE
    ),
    "optimizer.schedule": Field("constant", "constant, step or cosine"),
    "optimizer.milestones": Field(
        (),
        "epochs, below `epochs`, after which the step schedule divides the learning rate by 10",
        check=lambda value: (
            all(isinstance(e, _NUMBER) and e > 0 for e in value) and list(value) == sorted(set(value))
        ),
        words="rising epochs above 0",
    ),
    "optimizer.warmup_epochs": Field(
        0.0,
        "epochs over which the learning rate rises linearly from 0, under any schedule",
        **_AT_LEAST_0_AND_FINITE,
    ),
    "mesh.member": Field(
        -1, "devices along the member axis; -1 is as many as reduce the time of a round", **_DEVICES, **_RESUME
    ),
    "mesh.data": Field(
        1,
        "devices that share each batch (data parallelism); -1 is all that the member axis leaves over",
        **_DEVICES,
        **_RESUME,
    ),
    "pruning.score": Field("magnitude", "magnitude or random; the weights with the lowest scores are pruned"),
    "pruning.images": Field(
        256,
        "training images of the batch on which scores with gradients compute the loss; no other score uses it",
        **_AT_LEAST_1,
    ),
    "pruning.fraction": Field(
        0.2,
        "fraction of the surviving weights that is pruned after each round; for one-shot pruning to 30 %, set "
        "rounds to 2 and the fraction to 0.7",
        check=lambda value: 0 < value < 1,
        words="between 0 and 1, both excluded",
    ),
    "pruning.exclude": Field(
        (),
        'name patterns of layers that are never pruned, such as ("projection_*",) of ResNet-50',
        check=lambda value: all(isinstance(name, str) for name in value),
        words="names of layers, such as ('Dense_2',)",
    ),
    "repulsion.strength": Field(
        0.0,
        "factor λ_r of the loss J_r over earlier optima: 2 repels, −1 attracts, 0 is without repulsion",
        check=lambda value: abs(value) < float("inf"),
        words="finite",
    ),
    "repulsion.memory": Field(
        "all", "which earlier optima J_r covers: all, or the last only", **_one_of("all", "last")
    ),
    "repulsion.dtype": Field(
        "float32",
        "type in which earlier optima are stored; bfloat16 takes half the memory",
        **_one_of("float32", "bfloat16"),
    ),
    "instability.rounds": Field(
        (5, 10, 15),
        "rounds in which the ticket is trained a second time, as the arm twin, with other data order and "
        "augmentation",
        check=lambda value: all(type(number) is int and number >= 0 for number in value),
        words="rounds from 0, written as (5, 10); those the run does not reach count for nothing",
    ),
    "analysis.path_points": Field(
        20,
        "number of points on a linear path, including its ends",
        check=lambda value: value >= 2,
        words="at least 2, the ends",
        **_RESUME,
    ),
    "analysis.batch_norm": Field(
        "interpolate",
        "BatchNorm statistics on a path: interpolate those of its ends, or reestimate them on training data",
        **_one_of("interpolate", "reestimate"),
        **_RESUME,
    ),
    "analysis.baseline": Field(
        "mean",
        "error from which a barrier is measured: mean or max of a path's ends, or linear interpolation of them",
        **_one_of("mean", "linear", "max"),
        **_RESUME,
    ),
}


def default() -> ConfigDict:
    """Return a config with the defaults of `FIELDS`. A config file starts from it and changes fields."""
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

    The names of models, data sets, augmentations, optimizers, schedules, scores and arms are not checked here,
    but where they are looked up.

    Raises:
      UserError: an unknown or missing field; a value of a wrong type, or one that is not allowed; a value that
        has no effect with the values of other fields.
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
    _refuse_unused_values(values)


def _refuse_unused_values(values):
    """Refuse values that have no effect with the values of other fields."""
    schedule, milestones = values["optimizer.schedule"], values["optimizer.milestones"]
    epochs, warmup_epochs = values["epochs"], values["optimizer.warmup_epochs"]
    if schedule == "step" and not milestones:
        raise UserError(
            f"optimizer.milestones is (); the schedule step divides the rate at these epochs, so it should "
            f"name one at least, such as ({epochs / 2:g},)"
        )
    if schedule != "step" and milestones:
        raise UserError(
            f"optimizer.milestones is {milestones}; only the schedule step has milestones, and "
            f"optimizer.schedule is {schedule!r}, so it should be ()"
        )
    if milestones and milestones[-1] >= epochs:
        raise UserError(
            f"optimizer.milestones is {milestones}; a training has {epochs} epochs, so they should lie below "
            f"{epochs}"
        )
    if warmup_epochs > epochs:
        raise UserError(
            f"optimizer.warmup_epochs is {warmup_epochs}; a training has {epochs} epochs, so it should be at "
            f"most {epochs}"
        )
    if not values["repulsion.strength"]:
        for field in ("repulsion.memory", "repulsion.dtype"):
            if values[field] != FIELDS[field].default:
                raise UserError(
                    f"{field} is {values[field]!r}; without repulsion, as repulsion.strength is 0, it should "
                    f"be {FIELDS[field].default!r}"
                )


def unknown_field(name: str) -> str:
    """Return the message for a field that does not exist, with a similar name or the fields of its group."""
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
    """Return the type of a field, for a message: "of type int, like 60"; empty for an unknown field."""
    if name in FIELDS:
        return FIELDS[name].describe_type()
    is_group = any(field_name.startswith(f"{name}.") for field_name in FIELDS)
    return "a group of fields, set one by one" if is_group else ""


def may_change_on_resume(name: str) -> bool:
    """Return whether no training depends on a field, so that it may be changed while a run is stopped.

    A field of another version counts as the fields of its group, if they agree.
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
