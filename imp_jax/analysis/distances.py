"""Rows of the table distances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax import similarity


def pair_on_disk(config, one, other):
    """Return whether two rounds are compared: with `ends`, if every run has both on disk at some time."""
    return config.keep_checkpoints == "all" or min(one, other) <= 0 or abs(one - other) <= 1


def compute_distances(networks, exclude):
    """Compute the rows of every member's matrix, of the initialisation and the rounds that it trained in."""
    matrices = jax.jit(functools.partial(similarity.distance_matrices, exclude=exclude))
    for member in dict.fromkeys(member for of_round in networks.values() for member in of_round):
        rounds = [number for number, of_round in networks.items() if member in of_round]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(networks[n][member] for n in rounds))
        for metric, matrix in matrices(*stacked).items():
            for (a, b), distance in np.ndenumerate(np.asarray(matrix)):
                yield member.replicate, member.arm, metric, rounds[a], rounds[b], float(distance)
