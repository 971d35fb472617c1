"""Computes the tables paths and barriers: linear paths between networks and their error barriers."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from imp_jax import connectivity
from imp_jax.analysis.registry import NetworkInputs, RunInputs


def compute_path(inputs: NetworkInputs) -> Iterator[tuple]:
    """Compute loss and error on the linear path between two networks, on both splits.

    A path of kind "successive" starts at the network of the previous round, and a path of kind "instability"
    ends at the twin.
    """
    settings, experiment = inputs.config.analysis, inputs.experiment
    ends = inputs.variables, inputs.other.variables
    if inputs.kind == "successive":
        ends = ends[::-1]
    for split in ("train", "test"):
        losses, errors = connectivity.path_metrics(
            *ends,
            getattr(experiment.dataset, split),
            spec=experiment.spec,
            num_points=settings.path_points,
            batch_norm=settings.batch_norm,
            train=experiment.dataset.train,
        )
        alphas = np.linspace(0, 1, len(losses))
        for alpha, loss, error in zip(alphas, losses, errors, strict=True):
            yield split, alpha, float(loss), float(error), settings.batch_norm


def paths_are_current(table: pd.DataFrame, config: ConfigDict) -> pd.Series:
    """Return which rows belong to complete paths, with the number of points and `batch_norm` of the config."""
    points = table.groupby(["replicate", "kind", "round"])["alpha"].transform("size")
    return (points == 2 * config.analysis.path_points) & (table["batch_norm"] == config.analysis.batch_norm)


def compute_barriers(inputs: RunInputs) -> Iterator[tuple]:
    """Compute the error and loss barriers of all paths."""
    for key, points in inputs.tables["paths"].groupby(["replicate", "kind", "round", "split"], sort=False):
        points = points.sort_values("alpha")
        yield (
            *key,
            *(
                float(connectivity.error_barrier(points[column].to_numpy(), inputs.config.analysis.baseline))
                for column in ("error", "loss")
            ),
        )
