"""Compute the results for test_devices.py on four devices: python -m tests.helpers.on_devices FILE."""

import contextlib
import functools
import os
import pickle
import re
import sys
import tempfile
from unittest import mock

if __name__ == "__main__":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imp_jax import connectivity, data, imp, masking, models, packing, runs, training
from imp_jax.data import dataset
from imp_jax.models.resnet import make_layers
from imp_jax.runtime import devices
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset, make_tiny_experiment

MESHES = ((1, 1), (4, 1), (2, 2), (1, 4))
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def lenet(mesh=(1, 1), **overrides):
    """Set up four members with all features of a round: two twins in round 1, repulsion and rewinding."""
    fields = {
        "rounds": 3,
        "rewind_step": 5,
        "instability.rounds": (1,),
        "repulsion.strength": 2.0,
        "optimizer.weight_decay": 1e-3,
    }
    return make_tiny_experiment(**fields, **mesh_fields(mesh), **overrides)


class ResidualBlock(nn.Module):
    """A block of a ResNet with strided convolution and shortcut, which compiles faster than a ResNet-8."""

    num_classes: int = 10
    norm_affine: bool = False
    norm_momentum: float = 0.9
    norm_axis: str | None = None
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        conv, norm = make_layers(self, train)
        x = norm()(conv(4, (3, 3))(images))
        x = norm()(conv(8, (3, 3), 2)(x))
        x = norm()(conv(8, (3, 3))(x), x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


models.register("residual_block", ResidualBlock)


def resnet(mesh=(1, 1), **overrides):
    """Set up a residual block on 8 × 8 images, with crop and flip augmentation."""
    fields = {
        "batch_size": 16,
        "replicates": 1,
        "rounds": 2,
        "epochs": 1,
        "model.name": "residual_block",
        "optimizer.name": "momentum",
        "optimizer.learning_rate": 0.02,
        "execution": "scan_vmap",
    }
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (38, 8, 8, 3), np.uint8)
    labels = np.arange(38, dtype=np.int32) % 3
    arrays = (images, labels, images[::-1], labels[::-1])
    dataset = data.from_arrays(*arrays, augmentation=("crop", "flip"))
    experiment = make_tiny_experiment(dataset, **fields | mesh_fields(mesh) | overrides)
    execution = experiment.spec.execution._replace(convolutions="xla")
    return experiment._replace(spec=experiment.spec._replace(execution=execution))


def mesh_fields(mesh):
    """Return the config fields of a mesh (member, data)."""
    return {"mesh.member": mesh[0], "mesh.data": mesh[1]}


def run(experiment):
    """Run all rounds; return the networks, the rows of results.csv and the training history of each."""
    histories = []
    ends = imp.rounds(experiment, on_epoch=[lambda end: histories.append((end.round, end.progress.history))])
    return [
        (end.networks, [row | {"seconds": 0} for row in end.rows], dict(histories)[end.round]) for end in ends
    ]


class KilledError(Exception):
    """Raised by a callback, in place of the death of the process."""


def run_with_kills(kills):
    """Run a workdir with 6 members on 4 devices in round 1; return the networks of all rounds.

    Args:
      kills: whether to stop after the first of the two epochs of each round, which is saved, and resume.
    """
    stopped = []

    def kill(end):
        if kills and end.round not in stopped:
            stopped.append(end.round)
            raise KilledError

    config = make_tiny_config(
        rounds=2, checkpoint_every_epochs=1, **{"instability.rounds": (1,), **mesh_fields((4, 1))}
    )
    with tempfile.TemporaryDirectory() as workdir:
        for _ in range(3):
            try:
                runs.run(config, workdir, dataset=make_tiny_dataset(), on_epoch=[kill])
                break
            except KilledError:
                pass
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            return [jax.tree.map(np.asarray, checkpoints.restore(number)) for number in checkpoints.rounds()]


def run_two_seeds(together):
    """Run workdirs of two seeds, which have an empty slot in round 1; return the networks of all rounds."""
    fields = {"replicates": 1, "rounds": 2, "instability.rounds": (1,), **mesh_fields((2, 1))}
    configs = [make_tiny_config(seed=seed, **fields) for seed in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        workdirs = [f"{folder}/{config.seed}" for config in configs]
        if together:
            assert packing.run_together(configs, workdirs, dataset=make_tiny_dataset()) == [None, None]
        else:
            for config, workdir in zip(configs, workdirs, strict=True):
                runs.run(config, workdir, dataset=make_tiny_dataset())
        networks = []
        for workdir in workdirs:
            with contextlib.closing(Checkpoints(workdir)) as checkpoints:
                networks += [jax.tree.map(np.asarray, checkpoints.restore(number)) for number in (0, 1)]
        return networks


def count_collectives(experiment):
    """Count the collective operations in the compiled programs of an epoch and of an evaluation."""
    spec, state = experiment.spec, imp.init_state(experiment)
    states = imp.begin_training(experiment, state).states
    keys = devices.shard_members(jax.random.split(jax.random.key(0), len(state.members)), spec.mesh)
    split, rates = experiment.dataset.train, jnp.ones(2)

    def epoch(states, masks, split, keys):
        orders = jax.vmap(lambda key: jax.random.permutation(key, split.examples))(keys)
        batches = dataset.EpochInMemory(split, orders, keys)
        return training.scan_steps(states, masks, batches, 0, rates, None, None, spec=spec)

    def evaluation(variables, split):
        batches = split.evaluation(20)
        return training._map_batches(training._sum_examples, variables, batches, np.arange(2), spec=spec)

    programs = (
        jax.jit(epoch).lower(states, state.masks, split, keys),
        jax.jit(evaluation).lower(states.variables, split),
    )
    texts = [program.compile().as_text() for program in programs]
    return [sum(len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES) for text in texts]


def count_compilations(experiment):
    """Count how often the program of an epoch is compiled in a run of all rounds."""
    training.programs(False).scan_steps.clear_cache()
    run(experiment)
    return training.programs(False).scan_steps._cache_size()


def train_one_step(experiment, images, labels):
    """Return the first member after a step of SGD with learning rate 1, and its metrics."""
    spec = experiment.spec
    states = imp.begin_training(experiment, imp.init_state(experiment)).states
    state = jax.tree.map(lambda leaf: leaf[0], states)
    step = jax.jit(functools.partial(training.train_step, spec=spec))
    return step(state, masking.ones_like(state.params), images, labels, 1.0)


def compare_divided_batch(**fields):
    """Return a step on a batch of 8 that is divided in two parts, and the mean of the steps on each part.

    They should be equal, because a step of SGD is linear in the gradient.
    """
    divided = resnet(**fields, **{"optimizer.name": "sgd"})
    images, labels = (leaf[:8] for leaf in divided.dataset.train)
    parts = (slice(0, 8, 2), slice(1, 8, 2)) if "accumulate_steps" in fields else (slice(0, 4), slice(4, 8))
    undivided = divided._replace(spec=divided.spec._replace(accumulate_steps=1, norm_parts=1))
    steps = [train_one_step(undivided, images[part], labels[part]) for part in parts]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *steps)
    return jax.tree.map(np.asarray, (train_one_step(divided, images, labels), mean))


def buffer_pointers():
    """Return the memory addresses of a set of images and of its copies on all devices."""
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8))
    replicated = devices.replicate(images, jax.sharding.Mesh(np.array(jax.devices()), ("member",)))
    shards = [shard.data.unsafe_buffer_pointer() for shard in replicated.addressable_shards]
    return images.unsafe_buffer_pointer(), shards


def compare_paths(batch_norm):
    """Return losses and errors on a path of 7 points, divided over the devices and all on one device."""
    experiment = resnet()
    execution = experiment.spec.execution._replace(unroll=True)
    spec, train = experiment.spec._replace(execution=execution), experiment.dataset.train
    ends = [dict(spec.model.init(jax.random.key(seed), train.images[:1] / 255)) for seed in (0, 1)]

    def compute():
        options = {"num_points": 7, "batch_norm": batch_norm, "train": train}
        return connectivity.path_metrics(*ends, experiment.dataset.test, spec=spec, **options)

    with mock.patch.object(jax, "local_devices", return_value=jax.devices()[:1]):
        on_one_device = compute()
    return compute(), on_one_device


def main():
    options = {"accumulate_steps": 2, "model.norm_parts": 2}
    tasks = {
        "lenet": lambda: {mesh: run(lenet(mesh)) for mesh in MESHES},
        "lenet accumulated": lambda: run(lenet((2, 2), accumulate_steps=2)),
        "resnet": lambda: {mesh: run(resnet(mesh)) for mesh in ((1, 1), (2, 2), (1, 4))},
        "resnet in parts": lambda: {mesh: run(resnet(mesh, **options)) for mesh in ((1, 1), (2, 2))},
        "collectives": lambda: {mesh: count_collectives(resnet(mesh)) for mesh in ((4, 1), (2, 2))},
        "resumed": lambda: {kills: run_with_kills(kills) for kills in (False, True)},
        "packed": lambda: {together: run_two_seeds(together) for together in (False, True)},
        "memory": buffer_pointers,
        "programs": lambda: count_compilations(make_tiny_experiment(**mesh_fields((2, 2)))),
        "accumulated": lambda: compare_divided_batch(accumulate_steps=2),
        "paths": lambda: [compare_paths(batch_norm) for batch_norm in ("interpolate", "reestimate")],
        "in parts": lambda: compare_divided_batch(**{"model.norm_parts": 2}),
    }
    return {name: task() for name, task in tasks.items()}


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(main(), file)
