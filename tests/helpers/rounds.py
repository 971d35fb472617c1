"""Rounds in memory and in a workdir, and trees of members compared."""

import jax
import numpy as np

from imp_jax import analysis, imp, runs


def run(config, workdir, *args, **options):
    runs.run(config, workdir, *args, analyses=analysis, **options)


def train_all(experiment, rounds=3):
    """The rounds in memory: what each left behind, and its thresholds."""
    for end in imp.rounds(experiment._replace(rounds=rounds)):
        yield end.networks, [row["threshold"] for row in end.rows]


def initial_weights(experiment):
    return imp.init_state(experiment).tickets


def member(tree, i):
    return jax.tree.map(lambda x: np.asarray(x[i]), tree)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b):
    """To rounding: XLA may sum in another order where another number of members or steps is compiled."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a, b)
