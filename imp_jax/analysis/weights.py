"""Computes the tables histograms, weights and layers."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from imp_jax import masking, weights
from imp_jax.analysis.registry import NetworkInputs
from imp_jax.experiment import Experiment
from imp_jax.masking import Mask
from imp_jax.training import Variables

BINS = 101  # of a histogram; an odd number, so that one is centred on 0


def compute_histogram(inputs: NetworkInputs) -> Iterator[tuple]:
    """Compute a histogram of the surviving weights; all networks of a round have the same `BINS` intervals."""
    exclude = tuple(inputs.config.pruning.exclude)
    limit = max(
        np.abs(leaf).max()
        for member, network in inputs.networks.items()
        if member.arm != "twin"
        for leaf in masking.prunable_leaves(network.params, exclude)
    )
    counts = _histogram(inputs.params, inputs.mask, limit, BINS, exclude)
    edges = np.linspace(-float(limit), float(limit), BINS + 1)
    return zip(edges[:-1], edges[1:], counts.tolist(), strict=True)


def has_all_bins(table: pd.DataFrame, config: ConfigDict) -> pd.Series:
    """Return which rows belong to a complete histogram."""
    return table.groupby(["replicate", "arm", "round"])["left"].transform("size") == BINS


def compute_statistics(inputs: NetworkInputs) -> Iterator[tuple]:
    """Compute the number of surviving weights, their bimodality, and the share near zero."""
    exclude = tuple(inputs.config.pruning.exclude)
    yield tuple(
        value.item() for value in _statistics(inputs.params, inputs.mask, np.float32(inputs.threshold), exclude)
    )


def compute_layers(experiment: Experiment, variables: Variables, mask: Mask) -> Iterator[tuple]:
    """Count weights, survivors, units and dead units of each layer; NaN for units that are not known."""
    survivors = weights.survivors_by_layer(mask)
    image_shape = experiment.dataset.train.image_shape
    alive = _connectivity_of_units(experiment.spec.model, variables, mask, image_shape)
    for layer, kernel in weights.kernels(mask).items():
        units = np.asarray(alive[layer]) if layer in alive else None
        counts = (np.nan, np.nan) if units is None else (units.size, int((~units).sum()))
        yield layer, kernel.size, int(survivors[layer]), *counts


def has_all_layers(table: pd.DataFrame, config: ConfigDict) -> pd.Series:
    """Return which rows belong to networks with as many layers as the others."""
    layers = table.groupby(["replicate", "round"])["layer"].transform("size")
    return layers == layers.max()


_histogram = jax.jit(weights.histogram, static_argnums=(3, 4))
_connectivity_of_units = jax.jit(weights.connectivity_of_units, static_argnums=(0, 3))


@functools.partial(jax.jit, static_argnums=3)
def _statistics(params, mask, threshold, exclude):
    return (
        masking.survivors(mask, exclude),
        weights.bimodality(params, mask, exclude),
        weights.share_near_zero(params, mask, threshold, exclude),
    )
