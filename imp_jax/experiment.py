"""Experiments: everything that a config names, checked and loaded before any training."""

from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from imp_jax import config as configs
from imp_jax import data, masking, models, optimizers, scores, setup_checks, training
from imp_jax.errors import UserError, lookup
from imp_jax.members import Member
from imp_jax.runtime import devices
from imp_jax.runtime.devices import DATA
from imp_jax.runtime.execution import choose_execution


class Pruning(NamedTuple):
    """The settings of pruning; a static argument of jit."""

    score: scores.Score
    fraction: float  # of the surviving weights, removed after each round
    exclude: tuple[str, ...]  # patterns of layers that are never pruned
    images: int  # in the batch of `ScoreInputs.loss`; 0 if neither the score nor an arm uses it
    score_uses_images: bool
    scope: str  # global or layer, see `pruning.prune_by_score`
    layer_factors: tuple[tuple[str, float], ...]
    network: str  # whose scores give the next mask: trained (in the round), dense (in round 0) or initial
    steps: int  # in which a mask at initialisation is found
    policy: str = "fixed"  # or evidence, which chooses one of `fractions`
    fractions: tuple[float, ...] = ()
    barrier: float = 0.0  # allowed on the path to the projected network


class Retraining(NamedTuple):
    """The settings of the rounds after round 0."""

    policy: str  # full, short or evidence
    learning_rates: Float[np.ndarray, "epochs steps"] | None  # of a short round; None if there are none
    barrier: float  # up to which two solutions are connected


class OptimaStore(NamedTuple):
    """How earlier optima are stored for J_r; its strength is in `TrainSpec`."""

    memory: str  # "all" or "last"
    dtype: str


class Experiment(NamedTuple):
    """All parts of a run that its config specifies; constant during the run."""

    name: str  # such as "lenet on mnist5k"
    seed: int
    rounds: int
    arms: tuple[str, ...]  # that train in every round
    scheduled_arms: dict[str, frozenset[int]]  # that train in these rounds only
    arms_with_images: frozenset[str]  # whose masks depend on the loss of an untrained network
    replicates: int
    dataset: data.Dataset  # in device memory, unless it is streamed
    spec: training.TrainSpec
    learning_rates: Float[np.ndarray, "epochs steps"]  # of a full training, see `learning_rates_in`
    finetunes: bool  # whether later rounds train at the last of these rates
    retraining: Retraining
    evidence_images: int  # training images on which the policies evidence compute errors
    rewind_step: int | None
    pruning: Pruning
    optima_store: OptimaStore
    saved_steps: frozenset[int]  # steps of a training at which its state is saved
    on_divergence: str  # stop, or drop
    evaluate_epochs: bool  # whether members are evaluated after every epoch

    @property
    def members(self) -> tuple[Member, ...]:
        """The members at the start of a run, without those of `scheduled_arms`."""
        return tuple(Member(arm, replicate) for arm in self.arms for replicate in range(self.replicates))

    def learning_rates_in(self, number: int, short: bool = False) -> Float[np.ndarray, "epochs steps"]:
        """Return the learning rate of every step of a training in round `number`, full or short."""
        learning_rates = self.retraining.learning_rates if short else self.learning_rates
        if self.finetunes and number > 0:
            return np.full_like(learning_rates, self.learning_rates[-1, -1])
        return learning_rates


def setup(config: ConfigDict, dataset: data.Dataset | None = None, *, use_mesh: bool = True) -> Experiment:
    """Check `config`, and load or build what it names.

    Args:
      dataset: used instead of `config.dataset.name`, with its own augmentation unless the config names one.
      use_mesh: train on the devices of `config.mesh`; False uses one device of this process.

    Raises:
      UserError: see `config.validate`; an unknown name; a set that is absent or smaller than a batch; a batch
        that cannot be divided; a rewind step or milestone beyond the training; an invalid score, arm or
        `pruning.exclude`; a mesh that does not fit the devices.
    """
    configs.validate(config)
    devices.require_usable()
    setup_checks.check_arms(config.arms, config.repulsion.strength, bool(config.branch.name))
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
    variations = {name: config.dataset[name] for name in ("labels", "subset", "validation", "blur")}
    dataset = data.vary(dataset, **variations)
    setup_checks.check_unused_settings(config, dataset)
    learning_rates, short_learning_rates = _make_learning_rates(config, dataset.train.examples)
    setup_checks.check_instability_steps(config.instability.steps, learning_rates.size)
    model = create_model(config, dataset.num_classes, dataset.train.image_shape)
    params = models.shapes(model, dataset.train.image_shape)["params"]
    setup_checks.require_layers(config.pruning.exclude, params)
    setup_checks.check_layer_factors(config, params)
    setup_checks.check_aligned_arms(config, model)
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
        matmul_precision=config.matmul_precision,
    )
    score_uses_images = setup_checks.check_score(config.pruning.score, score, spec, dataset)
    arms_with_images = frozenset(
        name
        for name in config.arms
        if setup_checks.check_arm(name, spec, dataset, tuple(config.pruning.exclude))
    )
    uses_images = score_uses_images or bool(arms_with_images)
    # a branch has the setting of its run, in which other arms may have used images
    if (
        not uses_images
        and not config.branch.name
        and config.pruning.images != (default := configs.default().pruning.images)
    ):
        raise UserError(
            f"pruning.images is {config.pruning.images}; the score {config.pruning.score} uses no images, so "
            f"it should be {default}"
        )
    experiment = Experiment(
        name=f"{config.model.name} on {config.dataset.name}",
        seed=config.seed,
        rounds=config.rounds,
        arms=tuple(config.arms),
        scheduled_arms={"twin": frozenset(config.instability.rounds)},
        arms_with_images=arms_with_images,
        replicates=config.replicates,
        dataset=dataset,
        spec=spec,
        learning_rates=learning_rates,
        finetunes=config.optimizer.finetune,
        retraining=Retraining(config.retraining.policy, short_learning_rates, config.retraining.barrier),
        evidence_images=min(config.evidence.images, dataset.train.examples),
        rewind_step=config.rewind_step,
        pruning=Pruning(
            score=score,
            fraction=config.pruning.fraction,
            exclude=tuple(config.pruning.exclude),
            images=min(config.pruning.images, dataset.train.examples) if uses_images else 0,
            score_uses_images=score_uses_images,
            scope=config.pruning.scope,
            layer_factors=tuple(config.pruning.layer_factors),
            network=config.pruning.network,
            steps=config.pruning.steps,
            policy=config.pruning.policy,
            fractions=tuple(config.pruning.fractions),
            barrier=config.pruning.barrier,
        ),
        optima_store=OptimaStore(config.repulsion.memory, config.repulsion.dtype),
        saved_steps=_saved_steps(config, dataset, learning_rates),
        on_divergence=config.on_divergence,
        evaluate_epochs=config.evaluate_epochs,
    )
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
    """Make the masked optax transform of `config.optimizer`. Raises: see `optimizers.make_optimizer`."""
    return optimizers.make_optimizer(
        config.optimizer.name,
        learning_rate=config.optimizer.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        weight_decay_until=config.optimizer.weight_decay_until,
        exclude=tuple(config.pruning.exclude),
    )


def create_model(config: ConfigDict, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Create the model of `config.model`, and check the settings for normalisation.

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
    """Return the experiment for training on a mesh, with data sets in memory replicated on all its devices.

    Raises:
      UserError: devices share a batch, and the network has statistics that it cannot average over devices.
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
    splits = {name: split.put_on_mesh(mesh) for name, split in dataset.splits().items()}
    return experiment._replace(spec=spec, dataset=dataset._replace(**splits))


def spec_on_mesh(spec: training.TrainSpec, mesh: Mesh | None) -> training.TrainSpec:
    """Return the spec for training on a mesh.

    If devices share each batch and `norm_parts` is 1, the network normalises by the whole batch, over devices.
    """
    spec = spec._replace(mesh=mesh)
    if not hasattr(spec.model, "norm_axis"):
        return spec
    normalizes_over_devices = spec.data_devices > 1 and spec.norm_parts == 1
    return spec._replace(model=spec.model.copy(norm_axis=DATA if normalizes_over_devices else None))


def put_on_one_device(experiment: Experiment) -> Experiment:
    """Return an experiment from `put_on_mesh` for one device of this process; its data are not copied."""
    if experiment.spec.mesh is None:
        return experiment
    spec, dataset = spec_on_mesh(experiment.spec, None), experiment.dataset
    splits = {name: split.put_on_one_device() for name, split in dataset.splits().items()}
    return experiment._replace(spec=spec, dataset=dataset._replace(**splits))


def describe_experiment(experiment: Experiment) -> str:
    """Describe the network, its data and the number of members in one line."""
    members = len(experiment.members)
    trained = f"{members} member{'s' * (members > 1)}"
    for rounds in experiment.scheduled_arms.values():
        if numbers := [str(n) for n in sorted(rounds) if n < experiment.rounds]:
            extra = f"with {experiment.replicates} more in round{'s' * (len(numbers) > 1)}"
            trained += f", {extra} {', '.join(numbers)}"
    image_shape = experiment.dataset.train.image_shape
    params = models.shapes(experiment.spec.model, image_shape)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    weights = masking.size(params, experiment.pruning.exclude)
    return (
        f"{experiment.name} ({' × '.join(map(str, image_shape))}): "
        f"{count:,} parameters, {weights:,} of them weights to prune; {trained}"
    )


def _make_learning_rates(config, examples):
    """Compute the rates of full and short trainings; check the batch size and the rewind step."""
    if config.batch_size > examples:
        raise UserError(
            f"batch_size is {config.batch_size}; {config.dataset.name} has {examples} training images, "
            f"so it should be at most {examples}"
        )

    def compute_rates(epochs):
        """Compute the rates of a training of `epochs`, over which the schedule is compressed."""
        scale = epochs / config.epochs
        return optimizers.learning_rates(
            epochs,
            examples // config.batch_size,
            learning_rate=config.optimizer.learning_rate,
            schedule=config.optimizer.schedule,
            milestones=tuple(scale * epoch for epoch in config.optimizer.milestones),
            warmup_epochs=scale * config.optimizer.warmup_epochs,
        )

    learning_rates, short_learning_rates = compute_rates(config.epochs), None
    if config.retraining.epochs:
        short_learning_rates = compute_rates(config.retraining.epochs)
    shortest = short_learning_rates if config.retraining.policy == "short" else learning_rates
    if (config.rewind_step or 0) >= shortest.size:
        raise UserError(
            f"rewind_step is {config.rewind_step}; a training has {shortest.size} steps, "
            f"so it should be at most {shortest.size - 1}"
        )
    parts = config.accumulate_steps * config.model.norm_parts
    if config.batch_size % parts:
        near = max(config.batch_size // parts, 1) * parts
        raise UserError(
            f"batch_size is {config.batch_size}; with accumulate_steps {config.accumulate_steps} and "
            f"model.norm_parts {config.model.norm_parts} it should be a multiple of {parts}, such as {near} or "
            f"{near + parts}"
        )
    return learning_rates, short_learning_rates


def _saved_steps(config, dataset, learning_rates):
    """Return the steps of a training at which its state is saved."""
    intervals = [config.checkpoint_every_epochs * learning_rates.shape[1]]
    if "checkpoint_every_steps" in dataset.train.settings:
        intervals.append(config.checkpoint_every_steps)
    return frozenset(step for n in intervals for step in range(n, learning_rates.size, n))
