"""Computes the table distances: pairwise distances between the networks of all rounds."""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax import similarity
from imp_jax.analysis.registry import RunInputs

INITIALISATION = -1  # in distances.csv, the "round" of the weights to which survivors are reset

_INDEX = ["replicate", "arm", "metric", "round_a", "round_b"]


def compute_distances(inputs: RunInputs) -> Iterator[tuple]:
    """Yield the rows of the table: existing rows, and if any is missing, all rows of rounds on disk."""
    known = inputs.tables["distances"]
    missing = _expected_rows(inputs) - set(known[_INDEX].itertuples(index=False, name=None))
    computed = list(_compute_matrices(inputs)) if missing else []
    yield from computed
    computed_keys = {row[:5] for row in computed}
    for row in known[[*_INDEX, "distance"]].itertuples(index=False, name=None):
        if row[:5] not in computed_keys:
            yield row


def _expected_rows(inputs):
    trained = {member for members in inputs.rounds.values() for member in members if member.arm != "twin"}
    return {
        (replicate, arm, metric, a, b)
        for arm, replicate in trained
        for a, b in itertools.product(
            [number for number, members in inputs.rounds.items() if (arm, replicate) in members], repeat=2
        )
        if _is_compared(inputs.config, a, b)
        for metric in similarity.METRICS
    }


def _is_compared(config, a, b):
    """Return whether two rounds are compared; with `ends`, only pairs that every run has on disk together."""
    return config.keep_checkpoints == "all" or min(a, b) <= 0 or abs(a - b) <= 1


def _compute_matrices(inputs):
    """Yield the distances of each member between the initialisation and its rounds on disk."""
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
                if _is_compared(inputs.config, rounds[a], rounds[b]):
                    yield member.replicate, member.arm, metric, rounds[a], rounds[b], float(distance)
