"""What test_devices.py looks at, computed on four devices: python -m tests.helpers.on_devices FILE."""

import functools
import os
import pickle
import re
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = " ".join(
        [
            "--xla_force_host_platform_device_count=4",
            "--xla_backend_optimization_level=0",  # compiled once, run for milliseconds
            "--xla_llvm_disable_expensive_passes=true",
        ]
    )

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax import data, imp, masking, training
from imp_jax.data import dataset
from imp_jax.runtime import devices
from tests.conftest import make_tiny_experiment

MESHES = ((1, 1), (4, 1), (2, 2), (1, 4))
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def lenet(mesh=(1, 1), **overrides):
    """Four members, with two twins in round 1; all that a round may hold."""
    fields = {
        "rounds": 3,
        "rewind_step": 5,
        "instability.rounds": (1,),
        "repulsion.strength": 2.0,
        "optimizer.weight_decay": 1e-3,
    }
    return make_tiny_experiment(**fields, **mesh_fields(mesh), **overrides)


def resnet(mesh=(1, 1), **overrides):
    """A ResNet-20 of a quarter of the channels, on images of 8 × 8 that are shifted and mirrored."""
    fields = {
        "batch_size": 16,
        "replicates": 1,
        "rounds": 2,
        "epochs": 1,
        "model.name": "resnet20",
        "model.width": 0.25,
        "optimizer.name": "momentum",
        "optimizer.learning_rate": 0.02,
        "execution": "scan_vmap",
    }
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (38, 8, 8, 3), np.uint8)
    labels = np.arange(38, dtype=np.int32) % 3
    arrays = (images, labels, images[::-1], labels[::-1])
    dataset = data.from_arrays(*arrays, augmentation=("crop", "flip"))
    experiment = make_tiny_experiment(dataset, **fields | mesh_fields(mesh) | overrides)
    execution = experiment.spec.execution._replace(convolutions="xla")
    return experiment._replace(spec=experiment.spec._replace(execution=execution))


def mesh_fields(mesh):
    return {"mesh.member": mesh[0], "mesh.data": mesh[1]}


def run(experiment):
    """All rounds: of each the networks, the rows of results.csv, and the history of the training."""
    histories = []
    ends = imp.rounds(experiment, on_epoch=[lambda end: histories.append((end.round, end.progress.history))])
    return [
        (end.networks, [row | {"seconds": 0} for row in end.rows], dict(histories)[end.round]) for end in ends
    ]


def collectives(experiment):
    """How many there are in the programs of an epoch and of an evaluation."""
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


def compiled(experiment):
    """How often the program of an epoch is compiled in a run of all rounds."""
    training.programs().scan_steps.clear_cache()
    run(experiment)
    return training.programs().scan_steps._cache_size()


def one_step(experiment, images, labels):
    """The first member after a step of SGD at the rate 1, and its metrics."""
    spec = experiment.spec
    states = imp.begin_training(experiment, imp.init_state(experiment)).states
    state = jax.tree.map(lambda leaf: leaf[0], states)
    step = jax.jit(functools.partial(training.train_step, spec=spec))
    return step(state, masking.ones_like(state.params), images, labels, 1.0)


def of_parts(**fields):
    """A step on a batch of 8 in two parts, and the mean of a step on each of them: the gradient is linear."""
    whole = resnet(**fields, **{"model.name": "resnet8", "optimizer.name": "sgd"})
    images, labels = (leaf[:8] for leaf in whole.dataset.train)
    parts = (slice(0, 8, 2), slice(1, 8, 2)) if "accumulate_steps" in fields else (slice(0, 4), slice(4, 8))
    alone = whole._replace(spec=whole.spec._replace(accumulate_steps=1, norm_parts=1))
    apart = [one_step(alone, images[part], labels[part]) for part in parts]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *apart)
    return jax.tree.map(np.asarray, (one_step(whole, images, labels), mean))


def copies():
    """Where a set and its copies on all devices lie in memory."""
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8))
    replicated = devices.replicate(images, jax.sharding.Mesh(np.array(jax.devices()), ("member",)))
    shards = [shard.data.unsafe_buffer_pointer() for shard in replicated.addressable_shards]
    return images.unsafe_buffer_pointer(), shards


def main():
    options = {"accumulate_steps": 2, "model.norm_parts": 2}
    tasks = {
        "lenet": lambda: {mesh: run(lenet(mesh)) for mesh in MESHES},
        "lenet accumulated": lambda: run(lenet((2, 2), accumulate_steps=2)),
        "resnet": lambda: {mesh: run(resnet(mesh)) for mesh in MESHES},
        "resnet in parts": lambda: {mesh: run(resnet(mesh, **options)) for mesh in ((1, 1), (2, 2))},
        "collectives": lambda: {mesh: collectives(resnet(mesh)) for mesh in ((4, 1), (2, 2))},
        "memory": copies,
        "programs": lambda: compiled(make_tiny_experiment(**mesh_fields((2, 2)))),
        "accumulated": lambda: of_parts(accumulate_steps=2),
        "in parts": lambda: of_parts(**{"model.norm_parts": 2}),
    }
    return {name: task() for name, task in tasks.items()}


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(main(), file)
