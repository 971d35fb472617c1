"""Train rounds in memory or into a workdir, and compare the networks of members."""

import jax
import numpy as np

from imp_jax import analysis, imp, runs


def run(config, workdir, *args, **options):
    """Call `runs.run` with the analyses, as the command does."""
    runs.run(config, workdir, *args, analyses=analysis, **options)


def train_rounds(experiment, rounds=3):
    """Train in memory; yield the networks and the thresholds of each round."""
    for end in imp.rounds(experiment._replace(rounds=rounds)):
        yield end.networks, [row["threshold"] for row in end.rows]


def initial_weights(experiment):
    return imp.init_state(experiment).tickets


def take_member(tree, i):
    return jax.tree.map(lambda x: np.asarray(x[i]), tree)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b):
    """Compare up to rounding: the order of sums depends on the number of members and steps in a program."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a, b)
