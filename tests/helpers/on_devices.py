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
from imp_jax.arms import take_members
from imp_jax.experiment import create_model, put_on_mesh
from imp_jax.runtime import devices
from tests.conftest import make_tiny_experiment

MESHES = ((1, 1), (4, 1), (2, 2), (1, 4))
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def lenet(**overrides):
    """Four members, with two twins in round 1; all that a round may hold."""
    fields = {
        "rounds": 3,
        "rewind_step": 5,
        "instability.rounds": (1,),
        "repulsion.strength": 2.0,
        "optimizer.weight_decay": 1e-3,
    }
    return make_tiny_experiment(**fields, **overrides)


def resnet(**overrides):
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
    }
    experiment = make_tiny_experiment(**fields | overrides)
    draw = np.random.default_rng(1)
    images = jnp.asarray(draw.integers(0, 256, (38, 8, 8, 3), np.uint8))
    labels = jnp.asarray(np.arange(38, dtype=np.int32) % 3)
    dataset = data.Dataset(
        data.InMemory(images, labels), data.InMemory(images[::-1], labels[::-1]), 3, ("crop", "flip"), None
    )
    spec = experiment.spec._replace(
        execution=experiment.spec.execution._replace(convolutions="xla"),
        model=create_model(experiment.config, 3, (8, 8, 3)),
        augmentation=dataset.augmentation,
        accumulate_steps=experiment.config.accumulate_steps,
        norm_parts=experiment.config.model.norm_parts,
    )
    return experiment._replace(dataset=dataset, spec=spec)


def placed(experiment, mesh):
    """The experiment on a mesh of the sizes `mesh`."""
    config = experiment.config
    config.mesh.member, config.mesh.data = mesh
    return put_on_mesh(experiment, devices.make_mesh(config, len(experiment.members)))


def run(experiment):
    """All rounds: of each the networks, and the rows of results.csv."""
    tickets = imp.initialize(experiment)
    masks, optima, rounds = masking.ones_like(tickets["params"]), None, []
    for number in range(experiment.config.rounds):
        of_round = imp.in_round(experiment, number)
        networks, end = imp.train(of_round, number, tickets, masks, optima)
        masks, thresholds = imp.prune(of_round, number, networks)
        tickets = imp.reset(of_round, end.tickets, networks)
        rows = imp.measure(of_round, number, networks, thresholds, 0.0, optima)
        last = take_members(networks, of_round.members, experiment.members)
        optima = imp.add_optimum(experiment, optima, last, masks)
        rounds.append((jax.tree.map(np.asarray, networks), rows, end.seen))
    return rounds


def collectives(experiment):
    """How many there are in the programs of an epoch and of an evaluation."""
    spec, members = experiment.spec, len(experiment.members)
    tickets = imp.initialize(experiment)
    masks = masking.ones_like(tickets["params"])
    states = training.init_states(tickets, masks, optimizer=spec.optimizer)
    keys = jax.random.split(jax.random.key(0), members)
    states, masks, keys = devices.shard_members((states, masks, keys), spec.mesh)
    split, options = experiment.dataset.train, {"batch_size": experiment.config.batch_size, "spec": spec}
    draws = jax.vmap(lambda key: (jax.random.permutation(key, split.examples), key))
    rates = jnp.ones(2)

    def epoch(states, masks, split, keys):
        return training._scan_steps(states, masks, split, draws(keys), 0, rates, None, **options)

    def evaluation(variables, split):
        numbers = np.arange(2)
        return training._scan_sums(training._member_sums, variables, split, numbers, batch_size=20, spec=spec)

    programs = (
        jax.jit(epoch).lower(states, masks, split, keys),
        jax.jit(evaluation).lower(states.variables, split),
    )
    texts = [program.compile().as_text() for program in programs]
    return [sum(len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES) for text in texts]


def compiled(experiment):
    """How often the program of an epoch is compiled in a run of all rounds."""
    training._train_epoch_jit.program().clear_cache()
    run(experiment)
    return training._train_epoch_jit.program()._cache_size()


def one_step(experiment, images, labels):
    """The first member after a step of SGD at the rate 1, and its metrics."""
    spec = experiment.spec
    tickets = imp.initialize(experiment)
    states = training.init_states(tickets, masking.ones_like(tickets["params"]), optimizer=spec.optimizer)
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
        "lenet": lambda: {mesh: run(placed(lenet(), mesh)) for mesh in MESHES},
        "lenet accumulated": lambda: run(placed(lenet(accumulate_steps=2), (2, 2))),
        "resnet": lambda: {mesh: run(placed(resnet(), mesh)) for mesh in MESHES},
        "resnet in parts": lambda: {mesh: run(placed(resnet(**options), mesh)) for mesh in ((1, 1), (2, 2))},
        "collectives": lambda: {mesh: collectives(placed(resnet(), mesh)) for mesh in ((4, 1), (2, 2))},
        "memory": copies,
        "programs": lambda: compiled(placed(make_tiny_experiment(), (2, 2))),
        "accumulated": lambda: of_parts(accumulate_steps=2),
        "in parts": lambda: of_parts(**{"model.norm_parts": 2}),
    }
    return {name: task() for name, task in tasks.items()}


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(main(), file)
