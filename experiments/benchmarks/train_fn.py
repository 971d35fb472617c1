"""Make a function that trains the networks of a config on random images, to be timed."""

import functools
import itertools
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from experiments.sweeps.datasets import DATASET_SIZES
from imp_jax import config as configs
from imp_jax import data, experiment, masking, models, optimizers, pruning, repulsion, training
from imp_jax.runtime import devices, execution


def make_train_fn(
    config: ConfigDict, members: int, steps: int, earlier_rounds: int = 0
) -> tuple[Callable[[], None], str]:
    """Return a function that trains `members` networks of a config by `steps`, and its execution mode.

    The images are random, in the shape of the config's data set. ImageNet's are one batch, as from a stream;
    those of the other data sets lie in memory.

    Args:
      earlier_rounds: number of random earlier optima, pruned as the config says, that repulsion uses.
    """
    configs.validate(config)
    batch_size = config.batch_size
    streamed = config.dataset.name == "imagenet2012"
    _, image_shape, num_classes = DATASET_SIZES[config.dataset.name]

    model = models.create(config, num_classes, image_shape)
    spec = training.TrainSpec(
        model,
        optimizers.make_optimizer(config),
        normalize=data.Normalize((0.5,), (0.25,)),
        augmentation=data.DEFAULT_AUGMENTATION.get(config.dataset.name, ()) if not streamed else (),
        repulsion_strength=config.repulsion.strength,
        execution=execution.choose_execution(config, model, image_shape),
    )
    key = jax.random.key(0)
    keys = jax.random.split(key, members)
    image = jax.numpy.zeros((1, *image_shape))
    initialize = jax.jit(jax.vmap(lambda key: dict(model.init(key, image, train=False))))
    variables = initialize(keys)
    masks, optima = masking.ones_like(variables["params"]), None
    for number in range(earlier_rounds):
        optimum = initialize(jax.random.split(jax.random.fold_in(key, number), members))["params"]
        optimum = masking.apply(optimum, masks)
        prune = functools.partial(pruning.prune_by_magnitude, fraction=config.pruning.fraction)
        masks, _ = jax.vmap(prune)(optimum, masks)
        optima = repulsion.add_optimum(optima, optimum, masks, max_optima=config.rounds - 1)
    states = training.init_states(variables, masks, optimizer=spec.optimizer)
    mesh = devices.make_mesh(config, members)
    spec = experiment.spec_on_mesh(spec, mesh)
    states, masks, keys, optima = devices.shard_members((states, masks, keys, optima), mesh)
    rates = optimizers.learning_rates(config, steps)[0]
    leading = (members, batch_size) if streamed else (steps * batch_size,)
    images = jax.random.bits(key, (*leading, *image_shape), "uint8")
    labels = jax.random.randint(key, leading, 0, num_classes)
    if mesh is not None:
        partition = P(devices.MEMBER, devices.DATA) if streamed else P()
        images, labels = jax.device_put((images, labels), NamedSharding(mesh, partition))

    def train():
        nonlocal states
        if streamed:
            batches = itertools.repeat((images, labels))
            states, _ = training.train_steps_on_stream(states, masks, batches, rates, optima, spec=spec)
        else:
            split = data.InMemory(images, labels)
            options = {"batch_size": batch_size, "spec": spec}
            states, _ = training.train_steps_in_memory(
                states, masks, split, keys, 0, 0, rates, optima, **options
            )
        jax.block_until_ready(states)

    used_execution = spec.execution._replace(scan=spec.execution.scan and not streamed)
    return train, used_execution.mode
