"""Rows of the tables histograms, weights and layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax import masking, weights
from imp_jax.analysis.tables import BINS
from imp_jax.arms import take_members


def incomplete_rounds(tables, members):
    """Return the rounds for which a table of weights lacks rows of some member."""
    layers = tables["layers"].groupby(["round", "replicate"]).size()
    layers, expected = layers.to_dict(), layers.max() if len(layers) else 1
    histograms, weights_ = (
        tables[name].groupby(["round", "arm", "replicate"]).size().to_dict()
        for name in ("histograms", "weights")
    )
    return {
        number
        for number, of_round in members.items()
        for arm, replicate in of_round
        if arm != "twin"
        and (
            histograms.get((number, arm, replicate)) != BINS
            or weights_.get((number, arm, replicate)) != 1
            or (arm == "imp" and layers.get((number, replicate)) != expected)
        )
    }


def compute_weights(experiment, number, networks, results):
    """Compute the rows of the tables histograms, weights and layers of one round."""
    members = [member for member in networks.members if member.arm != "twin"]
    trained, mask = networks.round.trained, networks.round.mask
    params, masks = take_members((trained["params"], mask), networks.members, members)
    by_member = results.set_index(["arm", "replicate"])["threshold"]
    thresholds = np.array([by_member[member] for member in members], np.float32)
    exclude = experiment.pruning.exclude
    counts, limit, bimodality, near_zero, survivors = _weights_of_members(
        params, masks, thresholds, exclude=exclude
    )
    edges = np.linspace(-float(limit), float(limit), BINS + 1)
    rows = {"histograms": [], "weights": [], "layers": []}
    for i, (arm, replicate) in enumerate(members):
        of_member = (replicate, arm, number)
        rows["histograms"] += [
            (*of_member, *bin) for bin in zip(edges[:-1], edges[1:], counts[i].tolist(), strict=True)
        ]
        rows["weights"].append((*of_member, int(survivors[i]), float(bimodality[i]), float(near_zero[i])))
        if arm == "imp":
            variables, mask = jax.tree.map(lambda leaf: leaf[i], networks.round[1:])  # noqa: B023
            rows["layers"] += [(replicate, number, *row) for row in compute_layers(experiment, variables, mask)]
    return rows


@functools.partial(jax.jit, static_argnames="exclude")
def _weights_of_members(params, masks, thresholds, *, exclude):
    limit = jnp.max(jnp.stack([jnp.abs(leaf).max() for leaf in masking.prunable_leaves(params, exclude)]))

    def of_member(params, mask, threshold):
        return (
            weights.histogram(params, mask, limit, BINS, exclude),
            weights.bimodality(params, mask, exclude),
            weights.share_near_zero(params, mask, threshold, exclude),
            masking.survivors(mask, exclude),
        )

    counts, *scalars = jax.vmap(of_member)(params, masks, thresholds)
    return counts, limit, *scalars


def compute_layers(experiment, variables, mask):
    """Count weights, survivors, units and dead units of each layer; nan if the units are unknown."""
    survivors = weights.survivors_by_layer(mask)
    image_shape = experiment.dataset.train.image_shape
    alive = _connectivity_of_units(experiment.spec.model, variables, mask, image_shape)
    for layer, kernel in weights.kernels(mask).items():
        units = np.asarray(alive[layer]) if layer in alive else None
        counts = (np.nan, np.nan) if units is None else (units.size, int((~units).sum()))
        yield layer, kernel.size, int(survivors[layer]), *counts


_connectivity_of_units = jax.jit(weights.connectivity_of_units, static_argnums=(0, 3))
