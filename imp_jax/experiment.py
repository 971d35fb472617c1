"""An experiment: what a config names, checked and loaded, before anything is trained."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from imp_jax import config as configs
from imp_jax import data, masking, models, optimizers, pruning, training
from imp_jax.arms import Member, members_of, with_twins
from imp_jax.errors import UserError, lookup
from imp_jax.masking import Params
from imp_jax.runtime import devices, distributed
from imp_jax.runtime.devices import DATA
from imp_jax.runtime.execution import ExecutionMode, choose_execution
from imp_jax.workdir.files import write_atomically

_CONVOLUTIONS = {  # in words; the later ones are faster on a CPU
    "flax": "the convolutions of Flax",
    "xla": "convolutions by XLA in forms for a CPU",
    "onednn": "convolutions by oneDNN",
}


class Experiment(NamedTuple):
    """Everything a round needs that no round changes."""

    config: ConfigDict
    members: tuple[Member, ...]  # of a round; twins last
    dataset: data.Dataset  # on the device, unless it is streamed
    spec: training.TrainSpec
    score: Callable[..., pruning.Scores]
    learning_rates: Float[np.ndarray, "epochs steps"]


def setup(config: ConfigDict) -> Experiment:
    """Check `config` and load what it names.

    Raises:
      UserError: see `config.validate`; an unknown name; a set that is absent or smaller than a batch; a
        rewind step beyond the training.
    """
    configs.validate(config)
    devices.require_usable()
    arms = set(map(str, config.arms))
    if not {"imp"} <= arms <= {"imp", "reinit"} or len(arms) < len(config.arms):
        raise UserError(
            f"arms is {config.arms}; it should hold imp, whose masks all arms use, and reinit or not, none "
            f"twice, written as ('imp', 'reinit'); the rounds of twins are in instability.rounds"
        )
    score = lookup(pruning.SCORES, "pruning.score", config.pruning.score)
    optimizer = optimizers.make_optimizer(config)
    lookup(optimizers.SCHEDULES, "optimizer.schedule", config.optimizer.schedule)
    models.find(config.model.name)

    dataset = data.load(
        config.dataset.name,
        config.dataset.data_dir,
        augmentation=config.dataset.augmentation,
        image_side=config.dataset.image_side,
        workers=config.dataset.workers,
    )
    if not isinstance(dataset.train, data.Streamed):
        _require_defaults(
            config,
            ("dataset.image_side", "dataset.workers", "checkpoint_every_steps"),
            f"only streamed sets read it, and {config.dataset.name} is held in memory",
        )
    examples = dataset.train.examples
    if config.batch_size > examples:
        raise UserError(
            f"batch_size is {config.batch_size}; {config.dataset.name} has {examples} training images, "
            f"so it should be at most {examples}"
        )
    learning_rates = optimizers.learning_rates(config, steps_per_epoch=examples // config.batch_size)
    if (config.rewind_step or 0) >= learning_rates.size:
        raise UserError(
            f"rewind_step is {config.rewind_step}; a training has {learning_rates.size} steps, "
            f"so it should be at most {learning_rates.size - 1}"
        )
    parts = config.accumulate_steps * config.model.norm_parts
    if config.batch_size % parts:
        near = max(config.batch_size // parts, 1) * parts
        raise UserError(
            f"batch_size is {config.batch_size}; with accumulate_steps {config.accumulate_steps} and "
            f"model.norm_parts {config.model.norm_parts} it should be a multiple of {parts}, such as {near} or "
            f"{near + parts}"
        )
    model = create_model(config, dataset.num_classes, dataset.train.image_shape)
    params = models.shapes(model, dataset.train.image_shape)["params"]
    _require_layers(config.pruning.exclude, params)
    return Experiment(
        config=config,
        members=members_of(config),
        dataset=dataset,
        spec=training.TrainSpec(
            model=model,
            optimizer=optimizer,
            normalize=data.channel_statistics(dataset) if config.dataset.normalize else data.Normalize(),
            augmentation=dataset.augmentation,
            repulsion_strength=config.repulsion.strength,
            execution=choose_execution(config, model, dataset.train.image_shape),
            accumulate_steps=config.accumulate_steps,
            norm_parts=config.model.norm_parts,
        ),
        score=score,
        learning_rates=learning_rates,
    )


def create_model(config: ConfigDict, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Create the model of `config.model`, and check it against the settings for normalization.

    Raises:
      UserError: see `models.create` and `models.check_normalization`.
    """
    fields = config.model
    model = models.create(
        fields.name,
        num_classes,
        image_shape,
        dtype=config.dtype,
        width=fields.width,
        norm_affine=fields.norm_affine,
        norm_momentum=fields.norm_momentum,
    )
    models.check_normalization(fields.name, model, image_shape, fields.norm_parts, config.analysis.batch_norm)
    return model


def put_on_mesh(experiment: Experiment, mesh: Mesh | None) -> Experiment:
    """The experiment with its data on every device of a mesh, where they are in memory, to be trained there.

    Raises:
      UserError: the devices divide a batch, and the network could not normalise by all of it.
    """
    if mesh is None:
        return experiment
    spec, dataset = spec_on_mesh(experiment.spec, mesh), experiment.dataset
    with_statistics = set(models.shapes(spec.model, dataset.train.image_shape)) != {"params"}
    if spec.data_devices > 1 and with_statistics and not hasattr(spec.model, "norm_axis"):
        raise UserError(
            f"mesh.data is {spec.data_devices}; {experiment.config.model.name} keeps statistics of its "
            f"batches and has no field norm_axis to take them over devices, so it should be 1"
        )
    train, test = (
        devices.replicate(split, mesh) if isinstance(split, data.InMemory) else split
        for split in (dataset.train, dataset.test)
    )
    return experiment._replace(spec=spec, dataset=dataset._replace(train=train, test=test))


def spec_on_mesh(spec: training.TrainSpec, mesh: Mesh | None) -> training.TrainSpec:
    """The spec for steps on a mesh, whose network normalises over all devices that divide a batch."""
    spec = spec._replace(mesh=mesh)
    if not hasattr(spec.model, "norm_axis"):
        return spec
    whole = spec.data_devices > 1 and spec.norm_parts == 1
    return spec._replace(model=spec.model.copy(norm_axis=DATA if whole else None))


def put_on_one_device(experiment: Experiment) -> Experiment:
    """The experiment of `put_on_mesh` for one device of this process; its data are those of the mesh."""
    if experiment.spec.mesh is None:
        return experiment
    spec, dataset = spec_on_mesh(experiment.spec, None), experiment.dataset
    train, test = (
        devices.unreplicate(split) if isinstance(split, data.InMemory) else split
        for split in (dataset.train, dataset.test)
    )
    return experiment._replace(spec=spec, dataset=dataset._replace(train=train, test=test))


def in_round(experiment: Experiment, number: int) -> Experiment:
    """The experiment with the members of round `number`: those that it has, and twins if there are any then."""
    return experiment._replace(members=with_twins(experiment.members, experiment.config, number))


def describe_experiment(experiment: Experiment, params: Params) -> str:
    """The network and its data, for the terminal."""
    config, members = experiment.config, len(experiment.members)
    twins = [str(n) for n in sorted(set(config.instability.rounds)) if n < config.rounds]
    trained = f"{members} member{'s' * (members > 1)}"
    if twins:
        trained += f", with {config.replicates} more in round{'s' * (len(twins) > 1)} {', '.join(twins)}"
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) // members
    weights = masking.size(params, config.pruning.exclude) // members
    height, width, channels = experiment.dataset.train.image_shape
    return (
        f"{config.model.name} on {config.dataset.name} ({height} × {width} × {channels}): "
        f"{count:,} parameters, {weights:,} of them weights to prune; {trained}"
    )


def restore_execution(experiment: Experiment, workdir: str | os.PathLike) -> Experiment:
    """Return the experiment with the execution that a workdir was begun with, if this machine has it.

    Else, and in a new workdir, with the one that `setup` has chosen; a change is reported on stderr.
    """
    chosen = experiment.spec.execution
    try:
        stored = ExecutionMode(**json.loads(_execution_file(workdir).read_text()))
    except (OSError, ValueError, TypeError):  # a new workdir, or one of an earlier version
        stored = chosen
    possible = ("xla", "onednn") if chosen.convolutions == "onednn" else (chosen.convolutions,)
    if stored.convolutions not in possible:
        if distributed.is_primary():
            before = _CONVOLUTIONS.get(stored.convolutions, stored.convolutions)
            why = "are slow" if stored.convolutions == "flax" else "cannot be used"
            print(
                f"{workdir} was begun with {before}, which {why} here: it goes on with "
                f"{_CONVOLUTIONS[chosen.convolutions]}, and results differ by rounding",
                file=sys.stderr,
            )
        stored = chosen
    return _with_execution(experiment, stored)


def agree_on_execution(experiment: Experiment) -> Experiment:
    """Return the experiment with convolutions that all processes have; all of them have to call this."""
    execution, order = experiment.spec.execution, list(_CONVOLUTIONS)
    common = order[-distributed.global_max(-order.index(execution.convolutions))]
    return _with_execution(experiment, execution._replace(convolutions=common))


def _with_execution(experiment, execution):
    return experiment._replace(spec=experiment.spec._replace(execution=execution))


def store_execution(experiment: Experiment, workdir: str | os.PathLike) -> None:
    """Keep the execution in a workdir, beside config.json, for `restore_execution`."""
    content = json.dumps(experiment.spec.execution._asdict(), indent=2) + "\n"
    write_atomically(_execution_file(workdir), content)


def _execution_file(workdir):
    return Path(workdir) / "execution.json"


def describe_execution(execution: ExecutionMode) -> str:
    """The convolutions and the mode of a run, for the terminal; empty where Flax computes all of them."""
    if execution.convolutions == "flax":
        return ""
    return f"{_CONVOLUTIONS[execution.convolutions]}; execution {execution.mode}"


def _require_defaults(config, fields, why):
    """Refuse fields that would do nothing."""
    given, usual = configs.flatten(config), configs.flatten(configs.default())
    for field in fields:
        if given[field] != usual[field]:
            raise UserError(f"{field} is {given[field]!r}; {why}, so it should be {usual[field]!r}")


def _require_layers(patterns, params):
    """Refuse a pattern of `pruning.exclude` that names no layer with weights, or patterns that name all."""
    prunable = [masking.prunable(params, exclude) for exclude in ((), patterns, *([p] for p in patterns))]
    for pattern, rest in zip(patterns, prunable[2:], strict=True):
        if rest == prunable[0]:
            raise UserError(
                f"pruning.exclude has {pattern!r}, which names no layer to prune; there are {', '.join(params)}"
            )
    if not any(jax.tree.leaves(prunable[0])):
        raise UserError(
            f"the network has no weights to prune: none of {', '.join(params)} has a leaf called kernel"
        )
    if not any(jax.tree.leaves(prunable[1])):
        raise UserError(f"pruning.exclude is {patterns}; it should leave some of {', '.join(params)} to prune")
