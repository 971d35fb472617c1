"""Quantities that the claims measure in the tables of a run.

Each function returns one number per replicate; it is nan if the replicate lacks any of the rounds it needs.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from imp_jax import analysis

# Bands of sparsity (ours), the same at all scales, as half-open intervals of density. In rounds that prune a
# fifth, they contain rounds 0 to 4, 5 to 15, 16 to 20, and later ones.
LOW, MEDIUM, HIGH, VERY_HIGH = (0.35, 1.01), (0.03, 0.35), (0.01, 0.03), (0.0, 0.01)

HISTOGRAM_DENSITY = 0.8**10  # of the histograms in figures 5, 19 and 22, which are of round 10

Values = pd.Series  # by replicate


def accuracy(run: analysis.Run, arm: str, *bands: tuple[float, float]) -> Values:
    """Compute the test accuracy in %, the mean over the rounds within the bands."""
    return accuracy_in_rounds(run, arm, rounds_in_bands(run, bands))


def accuracy_in_rounds(
    run: analysis.Run, arm: str, rounds: Sequence[int], column: str = "test_accuracy"
) -> Values:
    """Compute the accuracy in %, the mean over some rounds.

    Args:
      column: test_accuracy or train_accuracy.
    """
    return 100 * _mean_over_rounds(run, arm, column, rounds)


def imp_minus_reinit(run: analysis.Run, *bands: tuple[float, float]) -> Values:
    """Compute by how many points of accuracy IMP is above its reinit."""
    return accuracy(run, "imp", *bands) - accuracy(run, "reinit", *bands)


def threshold_ratio(run: analysis.Run, *bands: tuple[float, float]) -> Values:
    """Compute the ratio of IMP's pruning threshold to its reinit's."""
    rounds = rounds_in_bands(run, bands)
    return _mean_over_rounds(run, "imp", "threshold", rounds) / _mean_over_rounds(
        run, "reinit", "threshold", rounds
    )


def instability(run: analysis.Run, number: int) -> Values:
    """Compute the test error barrier in points between two trainings of round `number`'s ticket."""
    return _mean_barrier(run, "instability", [number])


def barrier(run: analysis.Run, *bands: tuple[float, float]) -> Values:
    """Compute the mean test error barrier in points on the paths to the rounds within the bands."""
    return _mean_barrier(run, "successive", [n for n in rounds_in_bands(run, bands) if n > 0])


def angle(run: analysis.Run, arm: str, *bands: tuple[float, float], apart: int = 1) -> Values:
    """Compute the mean angle (1: orthogonal) of rounds within the bands to those `apart` rounds earlier."""
    pairs = [(number - apart, number) for number in rounds_in_bands(run, bands) if number >= apart]
    table = run.distances[(run.distances["metric"] == "angular") & (run.distances["arm"] == arm)]
    return _mean_by_replicate(table.set_index(["round_a", "round_b"])[["replicate", "distance"]], pairs, run)


def zero_bin_over_peak(run: analysis.Run, arm: str) -> Values:
    """Compute the height at zero over the greatest height in the histogram of round 10 of the paper (ours)."""
    number = find_round(run.config, HISTOGRAM_DENSITY)
    table = run.histograms[(run.histograms["arm"] == arm) & (run.histograms["round"] == number)]
    bins = table.groupby("replicate")
    at_zero = table[(table["left"] < 0) & (table["right"] > 0)].set_index("replicate")["count"]
    return (at_zero / bins["count"].max()).reindex(range(run.config.replicates)).astype(float)


def threshold_peak_round(run: analysis.Run) -> Values:
    """Find the round in which IMP's pruning threshold is highest."""
    return _apply_by_replicate(run, lambda rows: rows["round"][rows["threshold"].idxmax()])


def plateau_end_round(run: analysis.Run) -> Values:
    """Find the last round in which IMP is less than a point below the dense network (ours)."""

    def find_last(rows):
        accuracy = rows.set_index("round")["test_accuracy"]
        return accuracy.index[accuracy > accuracy[0] - 0.01].max()

    return _apply_by_replicate(run, find_last)


def _apply_by_replicate(run, measure):
    """Apply `measure` to the rows of IMP of each replicate that has all rounds."""
    replicates = run.results[run.results["arm"] == "imp"].groupby("replicate")
    values = {r: measure(rows) for r, rows in replicates if len(rows) == run.config.rounds}
    return pd.Series(values, dtype=float).reindex(range(run.config.replicates))


def rounds_in_bands(run: analysis.Run, bands: Sequence[tuple[float, float]]) -> list[int]:
    """List the rounds of a whole run whose density is within the bands."""
    density = (1 - run.config.pruning.fraction) ** np.arange(run.config.rounds)
    return [n for n, d in enumerate(density) if any(low <= d < high for low, high in bands)]


def find_round(config: ConfigDict, density: float) -> int:
    """Return the round of a whole run whose density is nearest to `density` on a logarithmic axis."""
    densities = (1 - config.pruning.fraction) ** np.arange(config.rounds)
    return int(np.argmin(abs(np.log(densities / density))))


def _mean_over_rounds(run, arm, column, rounds):
    table = run.results[run.results["arm"] == arm]
    return _mean_by_replicate(table.set_index("round")[["replicate", column]], rounds, run)


def _mean_barrier(run, kind, numbers):
    table = run.barriers[(run.barriers["kind"] == kind) & (run.barriers["split"] == "test")]
    return 100 * _mean_by_replicate(table.set_index("round")[["replicate", "barrier"]], numbers, run)


def _mean_by_replicate(table, entries, run):
    """Compute the mean of each replicate over `entries` of the index; nan if any of them is missing."""
    replicate, column = table.columns
    groups = table[table.index.isin(entries)].groupby(replicate)[column].agg(["mean", "count"])
    complete = groups["mean"].where((groups["count"] == len(entries)) & bool(entries))
    return complete.reindex(range(run.config.replicates)).astype(float)
