"""Train tiny runs into workdirs, and compute some of their analyses."""

import contextlib
from unittest import mock

import jax
import numpy as np

from imp_jax import analysis, runs
from imp_jax.analysis.registry import ANALYSES
from imp_jax.experiment import setup
from imp_jax.members import stream_number
from imp_jax.workdir.checkpoints import Checkpoints
from imp_jax.workdir.results import read_results
from tests.conftest import make_tiny_config, make_tiny_dataset


def train(workdir, **overrides):
    """Train the tiny network of `make_tiny_experiment` with these config fields."""
    runs.run(make_tiny_config(**overrides), workdir, dataset=make_tiny_dataset())
    return workdir


def make_experiment(config):
    return setup(config, make_tiny_dataset(), use_mesh=False)


def compute(workdir, *names, experiment=make_experiment, **overrides):
    """Compute only the analyses `names`, on request, with these config fields; return the `analysis.Run`."""
    run = analysis.load(workdir)
    on_request = tuple(name for name in names if ANALYSES[name].cost)
    run.config.update_from_flattened_dict({"analysis.also": on_request, **overrides})
    (workdir / "analysis").mkdir(exist_ok=True)
    with (
        mock.patch.dict(ANALYSES, {name: ANALYSES[name] for name in names}, clear=True),
        contextlib.closing(Checkpoints(workdir)) as checkpoints,
    ):
        results = read_results(workdir)
        analysis.compute(checkpoints, run.config, lambda: experiment(run.config), workdir, results)
    return analysis.load(workdir)


def refuse(config):
    """Fail if an analysis opens the data set, because no row is missing."""
    raise AssertionError(f"the data set of {config.dataset.name} was opened")


def network(run, number, arm, replicate):
    """Return the initial and trained variables and the mask of one network, as NumPy arrays."""
    index = run.members(number).index((arm, replicate))
    return jax.tree.map(lambda leaf: np.asarray(leaf[index]), run.round(number))


def subset(count, seed=0):
    """Return the first `count` training images of the tiny set, in [0, 1], and their labels, in drawn order."""
    images, labels = make_tiny_dataset().train
    key = jax.random.fold_in(jax.random.key(seed), stream_number("analysis images"))
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(labels)))[:count]
    return np.asarray(images)[order] / 255.0, np.asarray(labels)[order]


def replace_networks(workdir, number, change):
    """Write the checkpoint of a round again with `change(networks)`."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        networks, rows = checkpoints.restore(number), checkpoints.rows(number)
        masks = checkpoints.next_masks(number)
        networks = change(jax.tree.map(np.array, networks))
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints._rounds.delete(number)
        checkpoints.save(number, networks, rows, next_masks=masks)
