"""Training steps of a config on random images, as a function to be timed."""

import itertools
from collections.abc import Callable

from ml_collections import ConfigDict

from experiments.sweeps.datasets import DATASET_SIZES, STREAMED_DATASETS
from imp_jax.runtime.execution import ExecutionMode


def make_train_fn(
    config: ConfigDict,
    members: int,
    steps: int,
    earlier_rounds: int = 0,
    execution: ExecutionMode | None = None,
) -> tuple[Callable[[], None], str]:
    """Make a function that trains `members` networks of a config for `steps` steps on random images.

    A data set that is streamed is replaced by one batch of decoded images, on which every step trains.

    Args:
      config: modified in place; all members become replicates of imp.
      earlier_rounds: rounds whose optima repulsion avoids, each pruned as the config says.
      execution: how steps and members are compiled; None: as the config says.

    Returns: the function, and the name of its execution mode.
    """
    import jax
    import numpy as np

    from imp_jax import data, imp, masking, pruning, training
    from imp_jax.data.streaming import StreamedBatch
    from imp_jax.experiment import setup
    from imp_jax.round_state import add_optimum
    from imp_jax.runtime import devices
    from imp_jax.workdir.checkpoints import RoundNetworks

    streamed = config.dataset.name in STREAMED_DATASETS
    _, image_shape, num_classes = DATASET_SIZES[config.dataset.name]
    config.arms, config.replicates, config.instability.rounds = ("imp",), members, ()
    rng = np.random.default_rng(0)
    count = config.batch_size * (1 if streamed else steps)
    images = rng.integers(0, 256, (count, *image_shape), np.uint8)
    labels = rng.integers(0, num_classes, count)
    augmentation = () if streamed else data.DEFAULT_AUGMENTATION.get(config.dataset.name, ())
    dataset = data.from_arrays(
        *(images, labels, images[:2], labels[:2]), num_classes=num_classes, augmentation=augmentation
    )
    experiment = setup(config, dataset)
    if execution is not None:
        experiment = experiment._replace(spec=experiment.spec._replace(execution=execution))
    state = imp.init_state(experiment)
    key = jax.random.key(0)
    for number in range(earlier_rounds):
        optimum = imp.init_state(experiment._replace(seed=1 + number)).tickets["params"]
        optimum = masking.apply(optimum, state.masks)
        masks, _ = jax.vmap(lambda p, m: pruning.prune_by_magnitude(p, m, config.pruning.fraction))(
            optimum, state.masks
        )
        trained, masks = devices.gather_members(({"params": optimum}, masks), members)
        optima = add_optimum(experiment, state.optima, RoundNetworks(trained, trained, masks), masks)
        state = state._replace(masks=devices.shard_members(masks, experiment.spec.mesh), optima=optima)
    states = imp.begin_training(experiment, state).states
    keys, optima = devices.shard_members((jax.random.split(key, members), state.optima), experiment.spec.mesh)
    rates = np.resize(experiment.learning_rates[0], steps)
    split = experiment.dataset.train

    class RepeatedBatch:
        scannable = False

        def __init__(self):
            examples = devices.gather_members((split.images, split.labels), None)
            stacked = (np.stack([leaf] * members) for leaf in examples)
            sharding = devices.batch_sharding(experiment.spec.mesh)
            self._batch = StreamedBatch(*(jax.device_put(leaf, sharding) for leaf in stacked))

        def one_by_one(self):
            return itertools.repeat(self._batch)

    batches = RepeatedBatch() if streamed else None

    def train():
        nonlocal states
        epoch = batches or split.training_epochs(keys, 1, config.batch_size).epoch(0)
        states, _ = training.train_steps(states, state.masks, epoch, 0, rates, optima, spec=experiment.spec)
        jax.block_until_ready(states)

    scan = experiment.spec.execution.scan and not streamed
    return train, experiment.spec.execution._replace(scan=scan).mode
