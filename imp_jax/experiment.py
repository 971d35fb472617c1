"""An experiment: what a config names, checked and loaded, before anything is trained."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from imp_jax import arms, data, masking, models, optimizers, scores, training
from imp_jax import config as configs
from imp_jax.arms import Member
from imp_jax.errors import UserError, lookup, one_line
from imp_jax.runtime import devices
from imp_jax.runtime.devices import DATA
from imp_jax.runtime.execution import choose_execution


class Pruning(NamedTuple):
    """How masks shrink; static under jit."""

    score: scores.Score
    fraction: float  # of the survivors, removed after each round
    exclude: tuple[str, ...]  # patterns of layers that are never pruned
    images: int  # of the batch that `ScoreInputs.loss` is of; 0 if the score does not use it


class OptimaStore(NamedTuple):
    """How earlier optima are stored for J_r, whose strength is in `TrainSpec`."""

    memory: str  # all, or last
    dtype: str


class Experiment(NamedTuple):
    """Everything that a config names, resolved; constant during a run."""

    name: str  # such as "lenet on mnist5k"
    seed: int
    rounds: int
    arms: tuple[str, ...]  # that train in every round
    scheduled_arms: dict[str, frozenset[int]]  # that train in single rounds
    replicates: int
    dataset: data.Dataset  # on the device, unless it is streamed
    spec: training.TrainSpec
    learning_rates: Float[np.ndarray, "epochs steps"]
    rewind_step: int | None
    pruning: Pruning
    optima_store: OptimaStore
    saved_steps: frozenset[int]  # of a training, at which its state is saved
    on_divergence: str  # stop, or drop

    @property
    def members(self) -> tuple[Member, ...]:
        """The members that a run begins with, without those of single rounds."""
        return tuple(Member(arm, replicate) for arm in self.arms for replicate in range(self.replicates))


def setup(config: ConfigDict, dataset: data.Dataset | None = None, *, use_mesh: bool = True) -> Experiment:
    """Check `config` and load what it names.

    Args:
      dataset: used in the place of `config.dataset.name`, with its own augmentation unless the config names
        one.
      use_mesh: train on the devices of `config.mesh`; False is one device of this process.

    Raises:
      UserError: see `config.validate`; an unknown name; a set that is absent or smaller than a batch; a
        rewind step beyond the training; devices that do not suit.
    """
    configs.validate(config)
    devices.require_usable()
    _check_arms(config.arms)
    score = scores.find(config.pruning.score)
    optimizer = make_optimizer(config)
    lookup(optimizers.SCHEDULES, "optimizer.schedule", config.optimizer.schedule)
    models.find(config.model.name)

    if dataset is None:
        dataset = data.load(
            config.dataset.name,
            config.dataset.data_dir,
            augmentation=config.dataset.augmentation,
            image_side=config.dataset.image_side,
            workers=config.dataset.workers,
        )
    elif config.dataset.augmentation is not None:
        dataset = dataset._replace(augmentation=tuple(config.dataset.augmentation))
    _check_unused_settings(config, dataset)
    learning_rates = _make_learning_rates(config, dataset.train.examples)
    model = create_model(config, dataset.num_classes, dataset.train.image_shape)
    params = models.shapes(model, dataset.train.image_shape)["params"]
    _require_layers(config.pruning.exclude, params)
    spec = training.TrainSpec(
        model=model,
        optimizer=optimizer,
        batch_size=config.batch_size,
        normalize=data.channel_statistics(dataset) if config.dataset.normalize else data.Normalize(),
        augmentation=dataset.augmentation,
        repulsion_strength=config.repulsion.strength,
        execution=choose_execution(config.execution, config.dtype, model, dataset.train.image_shape),
        accumulate_steps=config.accumulate_steps,
        norm_parts=config.model.norm_parts,
        rng_streams=models.rng_streams(model, dataset.train.image_shape),
    )
    uses_batch = _check_score(config.pruning.score, score, spec, dataset)
    if not uses_batch and config.pruning.images != (usual := configs.default().pruning.images):
        raise UserError(
            f"pruning.images is {config.pruning.images}; the score {config.pruning.score} uses no images, so "
            f"it should be {usual}"
        )
    experiment = Experiment(
        name=f"{config.model.name} on {config.dataset.name}",
        seed=config.seed,
        rounds=config.rounds,
        arms=tuple(config.arms),
        scheduled_arms={"twin": frozenset(config.instability.rounds)},
        replicates=config.replicates,
        dataset=dataset,
        spec=spec,
        learning_rates=learning_rates,
        rewind_step=config.rewind_step,
        pruning=Pruning(
            score=score,
            fraction=config.pruning.fraction,
            exclude=tuple(config.pruning.exclude),
            images=min(config.pruning.images, dataset.train.examples) if uses_batch else 0,
        ),
        optima_store=OptimaStore(config.repulsion.memory, config.repulsion.dtype),
        saved_steps=_saved_steps(config, dataset, learning_rates),
        on_divergence=config.on_divergence,
    )
    for name in config.arms:
        if arms.ARMS[name].number >= arms.FIRST_USER_NUMBER:
            _check_arm(name, experiment)
    if not use_mesh:
        return experiment
    mesh = devices.make_mesh(
        len(experiment.members),
        config.batch_size,
        member=config.mesh.member,
        data=config.mesh.data,
        accumulate_steps=config.accumulate_steps,
        norm_parts=config.model.norm_parts,
    )
    return put_on_mesh(experiment, mesh)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Make the masked optax transform of `config.optimizer`. Raises as `optimizers.make_optimizer`."""
    return optimizers.make_optimizer(
        config.optimizer.name,
        learning_rate=config.optimizer.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
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
    """Return the experiment to be trained on a mesh, with data that are in memory on every device of it.

    Raises:
      UserError: the devices share a batch, and the network could not normalise by all of it.
    """
    if mesh is None:
        return experiment
    spec, dataset = spec_on_mesh(experiment.spec, mesh), experiment.dataset
    has_statistics = set(models.shapes(spec.model, dataset.train.image_shape)) != {"params"}
    if spec.data_devices > 1 and has_statistics and not hasattr(spec.model, "norm_axis"):
        raise UserError(
            f"mesh.data is {spec.data_devices}; {experiment.name.partition(' on ')[0]} keeps statistics of its "
            f"batches and has no field norm_axis to take them over devices, so it should be 1"
        )
    train, test = (split.put_on_mesh(mesh) for split in (dataset.train, dataset.test))
    return experiment._replace(spec=spec, dataset=dataset._replace(train=train, test=test))


def spec_on_mesh(spec: training.TrainSpec, mesh: Mesh | None) -> training.TrainSpec:
    """The spec for steps on a mesh, whose network normalises over all devices that divide a batch."""
    spec = spec._replace(mesh=mesh)
    if not hasattr(spec.model, "norm_axis"):
        return spec
    whole = spec.data_devices > 1 and spec.norm_parts == 1
    return spec._replace(model=spec.model.copy(norm_axis=DATA if whole else None))


def put_on_one_device(experiment: Experiment) -> Experiment:
    """Return the experiment of `put_on_mesh` for one device of this process; its data are those of the mesh."""
    if experiment.spec.mesh is None:
        return experiment
    spec, dataset = spec_on_mesh(experiment.spec, None), experiment.dataset
    train, test = (split.put_on_one_device() for split in (dataset.train, dataset.test))
    return experiment._replace(spec=spec, dataset=dataset._replace(train=train, test=test))


def describe_experiment(experiment: Experiment) -> str:
    """Describe the network and its data in one line."""
    members = len(experiment.members)
    trained = f"{members} member{'s' * (members > 1)}"
    for rounds in experiment.scheduled_arms.values():
        if numbers := [str(n) for n in sorted(rounds) if n < experiment.rounds]:
            more = f"with {experiment.replicates} more in round{'s' * (len(numbers) > 1)}"
            trained += f", {more} {', '.join(numbers)}"
    image_shape = experiment.dataset.train.image_shape
    params = models.shapes(experiment.spec.model, image_shape)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    weights = masking.size(params, experiment.pruning.exclude)
    return (
        f"{experiment.name} ({' × '.join(map(str, image_shape))}): "
        f"{count:,} parameters, {weights:,} of them weights to prune; {trained}"
    )


def _check_arms(names):
    known = [name for name in arms.ARMS if name not in ("imp", "twin")]
    if not {"imp"} <= set(map(str, names)) <= {"imp", *known} or len(set(names)) < len(names):
        raise UserError(
            f"arms is {names}; it should hold imp, whose masks all arms use, and any of {', '.join(known)}, "
            f"none twice, written as ('imp', 'reinit'); the rounds of twins are in instability.rounds"
        )


def _check_unused_settings(config, dataset):
    """Refuse settings of streamed sets for a set in memory."""
    given, usual = configs.flatten(config), configs.flatten(configs.default())
    for field in set(data.Streamed.settings) - set(dataset.train.settings):
        if given[field] != usual[field]:
            raise UserError(
                f"{field} is {given[field]!r}; only streamed sets read it, and {config.dataset.name} is held "
                f"in memory, so it should be {usual[field]!r}"
            )


def _make_learning_rates(config, examples):
    """Compute the learning rate of every step, once the batches are known to be possible."""
    if config.batch_size > examples:
        raise UserError(
            f"batch_size is {config.batch_size}; {config.dataset.name} has {examples} training images, "
            f"so it should be at most {examples}"
        )
    learning_rates = optimizers.learning_rates(
        config.epochs,
        examples // config.batch_size,
        learning_rate=config.optimizer.learning_rate,
        schedule=config.optimizer.schedule,
        milestones=config.optimizer.milestones,
        warmup_epochs=config.optimizer.warmup_epochs,
    )
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
    return learning_rates


def _saved_steps(config, dataset, learning_rates):
    """Return the steps of a training at which its state is saved."""
    intervals = [config.checkpoint_every_epochs * learning_rates.shape[1]]
    if "checkpoint_every_steps" in dataset.train.settings:
        intervals.append(config.checkpoint_every_steps)
    return frozenset(step for n in intervals for step in range(n, learning_rates.size, n))


def _check_score(name, score, spec, dataset):
    """Check by tracing that a score returns a tree like the parameters; return whether it uses `loss`."""
    image_shape = dataset.train.image_shape
    variables = models.shapes(spec.model, image_shape)
    calls = []

    def trace(variables, key):
        params = variables["params"]
        images, labels = jnp.zeros((1, *image_shape)), jnp.zeros(1, jnp.int32)
        inputs = scores.make_inputs(
            variables, masking.ones_like(params), key, images, labels, image_shape=image_shape, spec=spec
        )
        loss = inputs.loss
        return score(inputs._replace(loss=lambda params: calls.append(1) or loss(params)))

    result = jax.eval_shape(trace, variables, jax.random.key(0))
    try:
        masking.require_same_shapes(variables["params"], result)
    except ValueError as error:
        raise UserError(
            f"pruning.score is {name!r}, which should return a tree like the parameters: {one_line(error)}"
        ) from error
    return bool(calls)


def _check_arm(name, experiment):
    """Check by tracing that an arm returns trees like the ticket and the mask."""
    image_shape = experiment.dataset.train.image_shape
    variables = models.shapes(experiment.spec.model, image_shape)

    def trace(variables, key):
        trees = jax.tree.map(lambda leaf: leaf[None], (variables, masking.ones_like(variables["params"])))
        keys = key[None]
        return arms.start_arm(arms.ARMS[name], *trees, keys, keys, init_fn(experiment.spec.model, image_shape))

    try:
        jax.eval_shape(trace, variables, jax.random.key(0))
    except ValueError as error:
        raise UserError(
            f"arms has {name!r}, which should return trees like the ticket and the mask: {one_line(error)}"
        ) from error


def init_fn(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> Callable[[Key[Array, ""]], training.Variables]:
    """Return the initialisation of a model as a function of a key."""
    image = jnp.zeros((1, *image_shape))
    return lambda key: dict(model.init(key, image, train=False))


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
