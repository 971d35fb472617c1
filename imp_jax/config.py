"""Every config field, what it may hold, and how a wrong one is said."""

import difflib
import hashlib
import json
import os
import re
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from imp_jax.errors import UserError


def default() -> ConfigDict:
    """All fields with their meaning. A config file starts from here and states its row of table 1."""
    config = ConfigDict()
    config.seed = 0  # all random keys fold from it
    config.replicates = 3  # repetitions, trained side by side; replicate 0 does not depend on their number
    config.arms = ("imp", "reinit")  # what is trained on each round's mask; the mask always comes from imp
    config.rounds = 25  # trainings, the dense one included: densities (1 − fraction)ⁿ for n from 0
    config.epochs = 25  # of each training
    config.batch_size = 60
    # parts of a batch that are computed one after the other and added up, where it does not fit into memory;
    # each is normalised by its own statistics
    config.accumulate_steps = 1
    config.dtype = "float32"  # of the computation; parameters and optimizer state stay float32
    # how members and steps become programs: scan_vmap, scan_unroll, step_vmap, step_unroll (streams always
    # go step by step); auto suits network and device
    config.execution = "auto"
    # step of the dense training whose weights survivors are reset to: 0 is the initialisation, None no reset
    config.rewind_step = FieldReference(0, field_type=object)

    config.checkpoint_every_epochs = 5  # the state within a round is saved; each round's end is, in any case
    config.checkpoint_every_steps = 500  # the same, of a streamed set, whose epochs are long; of no other set
    config.keep_checkpoints = "all"  # of the rounds; ends: the first and the last two
    config.on_divergence = "stop"  # the run, or drop: go on without the member that diverged

    config.dataset = ConfigDict()
    config.dataset.name = "mnist5k"
    # None is TFDS's own, ~/tensorflow_datasets
    config.dataset.data_dir = FieldReference(None, field_type=object)
    config.dataset.normalize = (
        False  # to mean 0 and deviation 1 in each channel of the training set, or to [0, 1]
    )
    # of training images: any of "crop" and "flip"; None is what is usual (both for CIFAR and ImageNet)
    config.dataset.augmentation = FieldReference(None, field_type=object)
    config.dataset.image_side = 224  # pixels, of the crops of a streamed set (ImageNet); no other set reads it
    # processes that decode a streamed set: None is one a core, 0 threads of this process; no other set reads it
    config.dataset.workers = FieldReference(None, field_type=object)

    config.model = ConfigDict()
    config.model.name = "lenet"  # lenet, conv4, resnet20 and its family by depth, resnet50
    config.model.width = 1.0  # factor of the number of channels, or of hidden units, for quick runs
    config.model.norm_affine = False  # learnable scale and bias in the normalisation of ResNets
    config.model.norm_momentum = 0.9  # how much of the running statistics of ResNets a step keeps
    # parts of a batch that are normalised each by its own statistics, as each GPU's is in most code; 1 is by
    # those of the whole batch, over all devices
    config.model.norm_parts = 1

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # adam, momentum or sgd
    config.optimizer.learning_rate = 12e-4
    # heavy-ball momentum of the optimizers momentum and sgd; None is the optimizer's own, 0.9 and 0
    config.optimizer.momentum = FieldReference(None, field_type=object)
    config.optimizer.weight_decay = 0.0  # L2, added to the gradient of all parameters
    config.optimizer.schedule = "constant"  # constant, step or cosine
    config.optimizer.milestones = ()  # epochs, less than `epochs`, after which the step schedule divides by 10
    config.optimizer.warmup_epochs = 0.0  # the rate rises linearly from 0 over these, under any schedule

    config.mesh = ConfigDict()  # of devices; it changes results by rounding only
    config.mesh.member = -1  # over how many the members are spread; -1 fills, with as many as make it faster
    config.mesh.data = 1  # over how many each batch is divided; -1 takes those that members leave

    config.pruning = ConfigDict()
    config.pruning.score = "magnitude"  # or random; the lowest scores go
    config.pruning.images = 256  # training images of the batch that scores with gradients are computed on
    config.pruning.fraction = 0.2  # of the survivors, removed after each round; one-shot to 30 %: rounds=2, 0.7
    config.pruning.exclude = ()  # layers never pruned, by name, such as ("projection_*",) of ResNet-50

    config.repulsion = ConfigDict()
    config.repulsion.strength = 0.0  # λ_r of J_r over earlier optima: 2 repels, −1 attracts, 0 is without
    config.repulsion.memory = "all"  # which of them: all, or the last alone
    config.repulsion.dtype = "float32"  # of their stored values; bfloat16 takes half the memory

    config.instability = ConfigDict()
    # rounds in which the ticket is trained once more, the arm twin, with other data order and augmentation
    config.instability.rounds = (5, 10, 15)

    config.analysis = ConfigDict()
    config.analysis.path_points = 20  # of a linear path, ends included
    config.analysis.batch_norm = (
        "interpolate"  # statistics on a path: interpolate, or reestimate on training data
    )
    config.analysis.baseline = "mean"  # what a barrier is measured from: mean, linear or max of a path's ends
    return config


# fields that may change while a run is stopped: no training depends on them
_MAY_CHANGE_ON_RESUME = (
    "analysis.",
    "checkpoint_every_",
    "keep_checkpoints",
    "on_divergence",
    "dataset.data_dir",
    "dataset.workers",
    "mesh.",
)
# what a field of more than one type may hold
_UNIONS = {
    "rewind_step": (int, type(None)),
    "dataset.data_dir": (str, type(None)),
    "dataset.augmentation": (tuple, type(None)),
    "dataset.workers": (int, type(None)),
    "optimizer.momentum": (float, int, type(None)),
}
_NUMBER = (int, float)
_LONGEST_NAME = 200  # bytes of a folder's name, of which file systems allow 255
# what format 1 knew without streams and without normalisation
_IN_MEMORY_THEN = ("mnist5k", "mnist", "fashion_mnist", "cifar10", "cifar100")
_WITHOUT_NORMALIZATION_THEN = ("lenet", "conv4")
FORMAT = 2  # of config.json; 1 had no number, and a momentum that only the optimizer momentum used
_CONSTRAINTS = {
    "seed": (lambda v: 0 <= v < 2**32, "from 0 to 2³² − 1"),
    "replicates": (lambda v: v >= 1, "at least 1"),
    "rounds": (lambda v: v >= 1, "at least 1"),
    "epochs": (lambda v: v >= 1, "at least 1"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "accumulate_steps": (lambda v: v >= 1, "at least 1"),
    "model.norm_parts": (lambda v: v >= 1, "at least 1"),
    "mesh.member": (lambda v: v >= 1 or v == -1, "at least 1, or -1 to fill"),
    "mesh.data": (lambda v: v >= 1 or v == -1, "at least 1, or -1 to fill"),
    "checkpoint_every_epochs": (lambda v: v >= 1, "at least 1"),
    "checkpoint_every_steps": (lambda v: v >= 1, "at least 1"),
    "keep_checkpoints": (lambda v: v in ("all", "ends"), "all or ends"),
    "on_divergence": (lambda v: v in ("stop", "drop"), "stop or drop"),
    "dtype": (lambda v: v in ("float32", "bfloat16"), "float32 or bfloat16"),
    "rewind_step": (lambda v: v is None or v >= 0, "a step of the dense training from 0, or None"),
    "optimizer.learning_rate": (lambda v: 0 < v < float("inf"), "above 0 and finite"),
    "optimizer.momentum": (lambda v: v is None or 0 <= v < 1, "in [0, 1), or None"),
    "optimizer.weight_decay": (lambda v: 0 <= v < float("inf"), "at least 0 and finite"),
    "optimizer.warmup_epochs": (lambda v: 0 <= v < float("inf"), "at least 0 and finite"),
    "optimizer.milestones": (
        lambda v: all(isinstance(e, _NUMBER) and e > 0 for e in v) and list(v) == sorted(set(v)),
        "rising epochs above 0",
    ),
    "dataset.data_dir": (lambda v: v != "", "the path of a folder, or None for ~/tensorflow_datasets"),
    "dataset.image_side": (lambda v: v >= 1, "at least 1"),
    "dataset.workers": (lambda v: v is None or v >= 0, "at least 0, or None"),
    "repulsion.strength": (lambda v: abs(v) < float("inf"), "finite"),
    "repulsion.memory": (lambda v: v in ("all", "last"), "all or last"),
    "repulsion.dtype": (lambda v: v in ("float32", "bfloat16"), "float32 or bfloat16"),
    "instability.rounds": (
        lambda v: all(type(n) is int and n >= 0 for n in v),
        "rounds from 0, written as (5, 10); those the run does not reach count for nothing",
    ),
    "analysis.path_points": (lambda v: v >= 2, "at least 2, the ends"),
    "analysis.batch_norm": (lambda v: v in ("interpolate", "reestimate"), "interpolate or reestimate"),
    "analysis.baseline": (lambda v: v in ("mean", "linear", "max"), "mean, linear or max"),
    "model.norm_momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "model.width": (lambda v: 0 < v < float("inf"), "above 0 and finite"),
    "pruning.images": (lambda v: v >= 1, "at least 1"),
    "pruning.fraction": (lambda v: 0 < v < 1, "between 0 and 1, both excluded"),
    "pruning.exclude": (lambda v: all(isinstance(n, str) for n in v), "names of layers, such as ('Dense_2',)"),
}


def validate(config: ConfigDict) -> None:
    """Check names, types and ranges of all fields.

    Raises:
      UserError: an unknown or missing field, a wrong type, a value out of range, a value that would do nothing
        beside another. Names of models, data sets, augmentations, optimizers, schedules, scores and arms are
        checked by `lookup`, where each is looked up.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() returned {type(config).__name__}; it should return an ml_collections.ConfigDict"
        )
    known, given = flatten(default()), flatten(config)
    for field in given:
        if field not in known:
            raise UserError(unknown_field(field))
    for field, example in known.items():
        if field not in given:
            raise UserError(
                f"the config lacks the field {field}; imp_jax.config.default() has it as {example!r}"
            )
        value = given[field]
        if not _has_type(value, field, example):
            raise UserError(f"{field} is {value!r}; it should be {describe_type(field)}")
        within, words = _CONSTRAINTS.get(field, (lambda _: True, ""))
        if not within(value):
            raise UserError(f"{field} is {value!r}; it should be {words}")
    _refuse_unused_values(given)


def _refuse_unused_values(fields):
    """Refuse values that would do nothing beside the values of other fields."""
    schedule, milestones = fields["optimizer.schedule"], fields["optimizer.milestones"]
    epochs, warmup_epochs = fields["epochs"], fields["optimizer.warmup_epochs"]
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
    if not fields["repulsion.strength"]:
        for field in ("repulsion.memory", "repulsion.dtype"):
            if fields[field] != (usual := flatten(default())[field]):
                raise UserError(
                    f"{field} is {fields[field]!r}; without repulsion, as repulsion.strength is 0, it should "
                    f"be {usual!r}"
                )


def unknown_field(field: str) -> str:
    """The sentence for a field that does not exist: what it may have meant, or what its group holds."""
    known = flatten(default())
    close = difflib.get_close_matches(field, known, n=1, cutoff=0.8)
    group = field.rpartition(".")[0]
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group]
    if close:
        hint = f" (did you mean {close[0]}?)"
    else:
        hint = f"; {group or 'the config'} has {', '.join(siblings)}" if siblings else ""
    return f"there is no config field {field}{hint}"


def describe_type(field: str) -> str:
    """What a field should hold, for a message: "of type int, like 60". Empty where there is no such field."""
    known = flatten(default())
    if field not in known:
        is_group = any(name.startswith(f"{field}.") for name in known)
        return "a group of fields, set one by one" if is_group else ""
    if field in _UNIONS:
        return " or ".join("None" if t is type(None) else f"of type {t.__name__}" for t in _UNIONS[field])
    return f"of type {type(known[field]).__name__}, like {known[field]!r}"


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """All fields of a config, or of a config.json's content, by name, such as `optimizer.name`."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def describe_for_processes(config: ConfigDict) -> str:
    """Return the fields that have to be equal on all processes that train together."""
    may_differ = ("dataset.data_dir", "dataset.workers")
    return str({name: value for name, value in flatten(config).items() if name not in may_differ})


def run_name(name: str, base: ConfigDict, config: ConfigDict) -> str:
    """The name of a run's folder: `name`, and each field in which `config` differs from `base`.

    Such as `resnet20,batch_size=1024`. Fields that no training depends on are left out, but for the folder of
    the data set `folder`.
    """
    before, after = flatten(base), flatten(config)
    parts = [name]
    for field, value in sorted(after.items()):
        if field == "dataset.data_dir" and after["dataset.name"] == "folder" and value:
            value = _folder_name(value)
        elif field.startswith(_MAY_CHANGE_ON_RESUME):
            continue
        if value != before.get(field):
            parts.append(f"{field}={as_name(value)}")
    whole = ",".join(parts)
    if len(whole.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
        whole = whole.encode()[: _LONGEST_NAME - 9].decode(errors="ignore") + f"-{digest}"
    return whole


def _folder_name(path):
    return os.path.basename(os.path.abspath(os.path.expanduser(path or "")))


def as_name(value: Any) -> str:
    """A value as part of a file name."""
    if isinstance(value, tuple):
        return "-".join(map(as_name, value)) or "none"
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "-", text)


def to_json(config: ConfigDict) -> str:
    """The config as it is kept in a workdir's config.json, with the number of this format."""
    return json.dumps({**config.to_dict(), "format": FORMAT}, indent=2) + "\n"


def from_json(stored: dict) -> ConfigDict:
    """The config of a config.json's content; a field that it lacks has the value that was the behaviour then.

    Raises:
      UserError: as `validate`; a field or a format of a later version.
    """
    fields = _stored_fields(stored)
    config = default()
    for field in fields:
        if field not in flatten(config):
            raise UserError(unknown_field(field))
    config.update_from_flattened_dict(fields)
    validate(config)
    return config


def differences(config: ConfigDict, stored: dict) -> list[str]:
    """Where `config` and a config.json's content ask for other results, a phrase for each field.

    A larger number of rounds is no difference: the run goes on from those it has.

    Raises:
      UserError: `stored` has a format of a later version.
    """
    here, there = flatten(config), {**flatten(default()), **_stored_fields(stored)}
    for fields in (here, there):
        if fields.get("optimizer.name") == "momentum" and fields.get("optimizer.momentum") is None:
            fields["optimizer.momentum"] = 0.9  # what None stands for
    absent = object()
    phrases = []
    for field in sorted(here | there):
        one, other = there.get(field, absent), here.get(field, absent)
        same = one == other or (field == "rounds" and one < other)
        if field == "dataset.data_dir" and here.get("dataset.name") == "folder":
            same = _folder_name(one) == _folder_name(other)  # it may have moved
        elif field.startswith(_MAY_CHANGE_ON_RESUME):
            same = True
        if not same:
            one, other = ("absent" if value is absent else repr(value) for value in (one, other))
            phrases.append(f"{field} is {one} there and {other} here")
    return phrases


def _stored_fields(stored):
    """The fields of a config.json's content by name, as this version understands them."""
    number = stored.get("format", 1)
    if number > FORMAT:
        raise UserError(
            f"the config has format {number}, of a later version; this one reads formats 1 to {FORMAT}"
        )
    flat = flatten({name: value for name, value in stored.items() if name != "format"})
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in flat.items()}
    return _upgrade(fields) if number == 1 else fields


def _upgrade(fields):
    """The fields of format 1 without the values that did nothing then and are refused now."""
    fields = {**flatten(default()), **fields}
    if fields["optimizer.name"] != "momentum":
        fields["optimizer.momentum"] = None
    milestones = [epoch for epoch in fields["optimizer.milestones"] if epoch < fields["epochs"]]
    if fields["optimizer.schedule"] == "step" and not milestones:
        fields["optimizer.schedule"] = "constant"
    fields["optimizer.milestones"] = tuple(milestones) if fields["optimizer.schedule"] == "step" else ()
    unused = [] if fields["repulsion.strength"] else ["repulsion.memory", "repulsion.dtype"]
    if fields["dataset.name"] in _IN_MEMORY_THEN:
        unused += ["dataset.image_side", "dataset.workers", "checkpoint_every_steps"]
    if fields["model.name"] in _WITHOUT_NORMALIZATION_THEN:
        unused += ["model.norm_momentum", "analysis.batch_norm"]
    if (warmup_epochs := fields["optimizer.warmup_epochs"]) > fields["epochs"]:
        # the same line, as far as the training went on it
        fields["optimizer.learning_rate"] *= fields["epochs"] / warmup_epochs
        fields["optimizer.warmup_epochs"] = float(fields["epochs"])
    return fields | {field: value for field, value in flatten(default()).items() if field in unused}


def _has_type(value, field, example) -> bool:
    types = _UNIONS.get(field, _NUMBER if isinstance(example, float) else (type(example),))
    if isinstance(value, bool):  # a bool is an int to Python, never to a config
        return bool in types
    return isinstance(value, types)
