"""The analyses and figures of the paper, registered as a user registers their own."""

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
    "initialisation (round −1), for each arm and replicate, on the weights that both keep",
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
    description="the barriers of error and loss on these paths",
)
register(
    "histograms",
    compute_histogram,
    columns=("left", "right", "count"),
    description="surviving weights of every round, counted in intervals that all networks of a round share",
    is_current=has_all_bins,
)
register(
    "weights",
    compute_statistics,
    columns=("survivors", "bimodality", "near_zero"),
    description="of the surviving weights: their number, Sarle's coefficient of bimodality, and the share "
    "below half of the pruning threshold of the round",
)
register(
    "layers",
    lambda i: compute_layers(i.experiment, i.variables, i.mask),
    columns=("layer", "weights", "survivors", "units", "dead_units"),
    needs="imp",
    description="surviving weights of every layer, and its dead units, through which no path of surviving "
    "weights leads; empty if the paths of a model are not known",
    is_current=has_all_layers,
    definition=2,  # 1 found dead units by activations: all of them in a network that normalises layers
)

register_figure(
    "accuracy",
    lambda run: figures.accuracy(run.results),
    "Test accuracy over density; mean of the replicates, bars from minimum to maximum.",
)
register_figure(
    "threshold",
    lambda run: figures.threshold(run.results),
    "Pruning threshold, the largest magnitude removed after a round, over density.",
)
for _metric, _caption in {
    "angular": "Angles between the trained networks of all rounds, on the weights that both keep, and with the "
    "initialisation (last row and column): 0 the same direction, 1 orthogonal.",
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
    "Surviving weights after training, all replicates together.",
)
register_figure(
    "barriers",
    lambda run: figures.barriers(run.paths, run.barriers, run.results) if _has(run, "successive") else None,
    "Test error on the linear paths between the optima of successive rounds, and its largest increase over the "
    "baseline of the config.",
)
register_figure(
    "instability",
    lambda run: figures.instability(run.barriers, run.results) if _has(run, "instability") else None,
    "Instability: the error barrier between two trainings of a ticket that differ in data order and "
    "augmentation.",
)


def _has(run, kind):
    return (run.barriers["kind"] == kind).any()
