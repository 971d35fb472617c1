"""Workdirs with random networks instead of trained ones, to test analyses."""

import contextlib
import zlib
from pathlib import Path

import jax
import numpy as np

from imp_jax import analysis, masking
from imp_jax.workdir.checkpoints import Checkpoints, RoundNetworks
from imp_jax.workdir.lock import open_workdir
from imp_jax.workdir.results import FIELDS, Results, read_results
from tests.conftest import make_tiny_config

SHAPES = {
    f"Dense_{i}": {"kernel": shape, "bias": shape[1:]} for i, shape in enumerate([(16, 6), (6, 5), (5, 3)])
}
ARMS_WITH_IMPS_MASK = ("imp", "reinit", "twin")


def write_run(workdir: Path, members, **overrides) -> Path:
    """Write the networks of `make_tiny_experiment` with random weights and masks, and return the workdir.

    Args:
      members: the pairs (arm, replicate) of each round, by its number.
      overrides: fields of the config.
    """
    config, rows = make_tiny_config(**overrides), []
    with open_workdir(workdir, config), contextlib.closing(Checkpoints(workdir)) as checkpoints:
        for number, of_round in members.items():
            networks = [draw_network(arm, replicate, number) for arm, replicate in of_round]
            for arm, replicate in of_round:
                keys = {"replicate": replicate, "arm": arm, "round": number, "density": 0.8**number}
                rows.append(dict.fromkeys(FIELDS, 0.1) | keys)
            checkpoints.save(number, jax.tree.map(lambda *leaves: np.stack(leaves), *networks), rows)
        Results(workdir, rows)
    return workdir


def draw_network(arm, replicate, number):
    """Draw the networks and the mask of a member; arms of a replicate with imp's mask have the same."""
    mask_arm = "imp" if arm in ARMS_WITH_IMPS_MASK else arm
    weights, masks = (
        np.random.default_rng([zlib.crc32(name.encode()), replicate, number]) for name in (arm, mask_arm)
    )
    params = jax.tree.map(lambda shape: weights.normal(size=shape).astype(np.float32), SHAPES, is_leaf=is_shape)
    mask = jax.tree.map(lambda shape: masks.random(shape) < 0.8**number, SHAPES, is_leaf=is_shape)
    mask = jax.tree.map(lambda keep, prunable: keep | (not prunable), mask, masking.prunable(mask))
    params = jax.tree.map(lambda p, keep: p * keep, params, mask)
    return RoundNetworks({"params": params}, {"params": params}, mask)


def is_shape(tree):
    return isinstance(tree, tuple)


@contextlib.contextmanager
def only_analysis(name):
    """Register no other analysis for a while."""
    registered = dict(analysis.ANALYSES)
    for other in set(registered) - {name}:
        del analysis.ANALYSES[other]
    yield
    analysis.ANALYSES.clear()  # in the order in which they were registered
    analysis.ANALYSES.update(registered)


def compute(workdir, experiment, name, **config_fields):
    """Compute the missing rows of all registered analyses, and return the table of one of them."""
    config = analysis.load(workdir).config
    config.update(config_fields)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        analysis.compute(checkpoints, config, lambda: experiment, workdir, read_results(workdir))
    return analysis.load(workdir).tables[name]


@contextlib.contextmanager
def hidden_rounds(workdir, *numbers):
    """Move the checkpoints of rounds out of the workdir for a while."""
    for number in numbers:
        (workdir / "checkpoints" / str(number)).rename(workdir / f"hidden-{number}")
    yield
    for number in numbers:
        (workdir / f"hidden-{number}").rename(workdir / "checkpoints" / str(number))
