"""What the claims measure in the tables of a run: a number a replicate, nan unless its rounds are all there."""

import numpy as np
import pandas as pd

from imp_jax import analysis

# densities from the lowest, included, to the highest: rounds 0 to 4, 5 to 15, 16 to 20, and later (ours)
LOW, MEDIUM, HIGH, VERY_HIGH = (0.35, 1.01), (0.03, 0.35), (0.01, 0.03), (0.0, 0.01)  # sparsity

Values = pd.Series  # by replicate


def accuracy(run: analysis.Run, arm: str, *bands: tuple[float, float]) -> Values:
    """Test accuracy in %, the mean over the rounds within the bands of density."""
    return 100 * _over_rounds(run, arm, "test_accuracy", bands)


def imp_minus_reinit(run: analysis.Run, *bands: tuple[float, float]) -> Values:
    """By how many points of accuracy IMP is above its reinit."""
    return accuracy(run, "imp", *bands) - accuracy(run, "reinit", *bands)


def threshold_ratio(run: analysis.Run, *bands: tuple[float, float]) -> Values:
    """IMP's pruning threshold over its reinit's."""
    return _over_rounds(run, "imp", "threshold", bands) / _over_rounds(run, "reinit", "threshold", bands)


def instability(run: analysis.Run, number: int) -> Values:
    """Points of test error on the path between two trainings of round `number`'s ticket."""
    return _barriers(run, "instability", [number])


def barrier(run: analysis.Run, *bands: tuple[float, float]) -> Values:
    """Points of test error on the paths to the rounds within the bands, the mean."""
    return _barriers(run, "successive", [n for n in _rounds(run, bands) if n > 0])


def angle(run: analysis.Run, arm: str, *bands: tuple[float, float], apart: int = 1) -> Values:
    """Angles (0 the same, 1 orthogonal) of rounds within the bands to those `apart` before, the mean."""
    pairs = [(number - apart, number) for number in _rounds(run, bands) if number >= apart]
    table = run.distances[(run.distances["metric"] == "angular") & (run.distances["arm"] == arm)]
    return _mean(table.set_index(["round_a", "round_b"])[["replicate", "distance"]], pairs, run)


def zero_bin_over_peak(run: analysis.Run, arm: str, number: int = 10) -> Values:
    """The histogram of round `number`'s surviving weights: its height at zero over its greatest (ours)."""
    table = run.histograms[(run.histograms["arm"] == arm) & (run.histograms["round"] == number)]
    bins = table.groupby("replicate")
    at_zero = table[(table["left"] < 0) & (table["right"] > 0)].set_index("replicate")["count"]
    return (at_zero / bins["count"].max()).reindex(range(run.config.replicates)).astype(float)


def peak(run: analysis.Run) -> Values:
    """The round after which IMP's pruning threshold falls."""
    return _by_replicate(run, lambda rows: rows["round"][rows["threshold"].idxmax()])


def plateau(run: analysis.Run) -> Values:
    """The last round in which IMP is less than a point below the dense network (ours)."""

    def last(rows):
        accuracy = rows.set_index("round")["test_accuracy"]
        return accuracy.index[accuracy > accuracy[0] - 0.01].max()

    return _by_replicate(run, last)


def _by_replicate(run, measure):
    """`measure` of the rows of IMP of each replicate that has all rounds."""
    replicates = run.results[run.results["arm"] == "imp"].groupby("replicate")
    values = {r: measure(rows) for r, rows in replicates if len(rows) == run.config.rounds}
    return pd.Series(values, dtype=float).reindex(range(run.config.replicates))


def _rounds(run, bands):
    """The rounds of a whole run within the bands."""
    density = (1 - run.config.pruning.fraction) ** np.arange(run.config.rounds)
    return [n for n, d in enumerate(density) if any(low <= d < high for low, high in bands)]


def _over_rounds(run, arm, column, bands):
    table = run.results[run.results["arm"] == arm]
    return _mean(table.set_index("round")[["replicate", column]], _rounds(run, bands), run)


def _barriers(run, kind, numbers):
    table = run.barriers[(run.barriers["kind"] == kind) & (run.barriers["split"] == "test")]
    return 100 * _mean(table.set_index("round")[["replicate", "barrier"]], numbers, run)


def _mean(table, wanted, run):
    """The mean of each replicate over the `wanted` entries of the index, if all are there."""
    replicate, column = table.columns
    there = table[table.index.isin(wanted)].groupby(replicate)[column].agg(["mean", "count"])
    whole = there["mean"].where(there["count"] == len(wanted)) if wanted else there["mean"] * np.nan
    return whole.reindex(range(run.config.replicates)).astype(float)
