"""The analyses and figures of the paper, registered in the same way as a user's own."""

import pandas as pd

from imp_jax import figures, similarity
from imp_jax.analysis.distances import compute_distances
from imp_jax.analysis.paths import compute_barriers, compute_path, paths_are_current
from imp_jax.analysis.registry import register, register_figure
from imp_jax.analysis.weights import (
    compute_histogram,
    compute_layers,
    compute_statistics,
    has_all_bins,
    has_all_layers,
)

register(
    "distances",
    compute_distances,
    columns=("replicate", "arm", "metric", "round_a", "round_b", "distance"),
    needs="run",
    description="angular, cosine and Euclidean distance between the optima of all rounds, and to the "
    "initialisation (round −1), for each arm and replicate, on the weights that survive in both",
    definition=similarity.DEFINITION,
)
register(
    "paths",
    compute_path,
    columns=("split", "alpha", "loss", "error", "batch_norm"),
    needs="pair",
    description="loss (nats) and error (0 to 1) at points between the optima of successive rounds "
    "(`successive`) and between `imp` and its twin (`instability`), on both splits",
    is_current=paths_are_current,
)
register(
    "barriers",
    compute_barriers,
    columns=("replicate", "kind", "round", "split", "barrier", "loss_barrier"),
    needs="run",
    description="error and loss barriers of these paths",
)
register(
    "histograms",
    compute_histogram,
    columns=("left", "right", "count"),
    description="histograms of the surviving weights; all networks of a round have the same intervals",
    is_current=has_all_bins,
)
register(
    "weights",
    compute_statistics,
    columns=("survivors", "bimodality", "near_zero"),
    description="number of surviving weights, their bimodality coefficient (Sarle's), and the share of them "
    "below half of the pruning threshold of the round",
)
register(
    "layers",
    lambda i: compute_layers(i.experiment, i.variables, i.mask),
    columns=("layer", "weights", "survivors", "units", "dead_units"),
    needs="imp",
    description="surviving weights and dead units of each layer; a unit is dead if it is on no path of "
    "surviving weights from input to output; units are empty if the paths of a model are not known",
    is_current=has_all_layers,
    definition=2,  # 1 used activations, and counted all units of networks with layer normalisation as dead
)

register_figure(
    "accuracy",
    lambda run: figures.accuracy(run.results),
    "Test accuracy over density; mean of the replicates, bars from minimum to maximum.",
)
register_figure(
    "branches",
    lambda run: figures.accuracy(results_with_branches(run)) if run.branches else None,
    "Test accuracy over density of all arms of the run and of its branches; mean of the replicates, bars from "
    "minimum to maximum.",
)
register_figure(
    "threshold",
    lambda run: figures.threshold(run.results),
    "Pruning threshold, the largest magnitude removed after a round, over density.",
)
for _metric, _caption in {
    "angular": "Angles between the trained networks of all rounds and the initialisation (last row and "
    "column), on the weights that survive in both: 0 is the same direction, 1 is orthogonal.",
    "cosine": "Cosine distances between the same networks.",
    "euclidean": "Euclidean distances between the same networks.",
}.items():
    register_figure(
        f"distances_{_metric}",
        lambda run, metric=_metric: figures.distances(run.distances, metric) if len(run.distances) else None,
        _caption,
    )
register_figure(
    "histograms",
    lambda run: figures.histograms(run.histograms) if len(run.histograms) else None,
    "Histograms of the surviving weights after training, summed over replicates.",
)
register_figure(
    "barriers",
    lambda run: figures.barriers(run.paths, run.barriers, run.results) if _has(run, "successive") else None,
    "Test error on the linear paths between the optima of successive rounds, and the barrier: the largest "
    "increase over the baseline, which is set in the config.",
)
register_figure(
    "instability",
    lambda run: figures.instability(run.barriers, run.results) if _has(run, "instability") else None,
    "Instability: the error barrier between two trainings of a ticket that differ in data order and "
    "augmentation.",
)


def results_with_branches(run):
    """Return results.csv of a run and its branches; an arm that several of them have gets the branch's name."""
    tables, seen = [run.results], set(run.results["arm"])
    for name, branch in run.branches.items():
        table = branch.results
        names = {arm: f"{arm} ({name})" if arm in seen else arm for arm in table["arm"].unique()}
        tables.append(table.assign(arm=table["arm"].map(names)))
        seen |= set(names)
    return pd.concat([table for table in tables if len(table)], ignore_index=True)


def _has(run, kind):
    return (run.barriers["kind"] == kind).any()
