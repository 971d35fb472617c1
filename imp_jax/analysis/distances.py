"""Computes the table distances: pairwise distances between the networks of all rounds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imp_jax import similarity
from imp_jax.analysis.registry import RunInputs, complete_rows

INITIALISATION = -1  # in distances.csv, the "round" of the weights to which survivors are reset


def compute_distances(inputs: RunInputs) -> list[tuple]:
    """Return the rows of the table: existing rows, and if any is missing, all rows of rounds on disk."""
    return complete_rows(inputs, "distances", _expected_rows(inputs), lambda _: dict(_compute_matrices(inputs)))


def _expected_rows(inputs):
    trained = {member for members in inputs.rounds.values() for member in members if member.arm != "twin"}
    return {
        (replicate, arm, metric, a, b)
        for arm, replicate in trained
        for a, b in itertools.product(
            [number for number, members in inputs.rounds.items() if (arm, replicate) in members], repeat=2
        )
        if is_compared(inputs.config, a, b)
        for metric in similarity.METRICS
    }


def is_compared(config: ConfigDict, a: int, b: int) -> bool:
    """Return whether two rounds are compared; with `ends`, only pairs that every run has on disk together."""
    return config.keep_checkpoints == "all" or min(a, b) <= 0 or abs(a - b) <= 1


def _compute_matrices(inputs):
    """Yield the key and value of each row: of each member between the initialisation and its rounds on disk."""
    exclude = tuple(inputs.config.pruning.exclude)
    matrices = jax.jit(functools.partial(similarity.distance_matrices, exclude=exclude))
    networks = {
        number: {
            member: (network.params, network.mask)
            for member, network in round_networks.items()
            if member.arm != "twin"
        }
        for number, round_networks in inputs.networks.items()
    }
    if 0 in networks:
        initial = {
            member: (inputs.networks[0][member].initial, mask) for member, (_, mask) in networks[0].items()
        }
        networks = {INITIALISATION: initial, **networks}
    for member in dict.fromkeys(member for round_networks in networks.values() for member in round_networks):
        rounds = [number for number, round_networks in networks.items() if member in round_networks]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(networks[n][member] for n in rounds))
        for metric, matrix in matrices(*stacked).items():
            for (a, b), distance in np.ndenumerate(np.asarray(matrix)):
                if is_compared(inputs.config, rounds[a], rounds[b]):
                    yield (member.replicate, member.arm, metric, rounds[a], rounds[b]), (float(distance),)
