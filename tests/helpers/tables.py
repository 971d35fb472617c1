"""Tables of a run from formulas instead of a training, to test figures and claims."""

from itertools import product
from pathlib import Path

import pandas as pd

from experiments.sweeps.runs import AnyRun, Branch
from imp_jax import analysis


def tables(
    run: AnyRun,
    accuracy=lambda arm, replicate, number: 0.9 + 0.01 * replicate,
    threshold=lambda arm, replicate, number: 0.1,
    angle=lambda arm, one, other: 0.5,
    barrier=lambda number: 0.01,
    instability=lambda number: 0.03,
    counts=lambda arm: (1, 2, 1, 2, 1),
    rounds: int | None = None,
) -> analysis.Run:
    """Return the tables of a run or branch, or of its first `rounds`, in the form of `analysis.load`.

    `accuracy` and `threshold` take the arm, the replicate and the round, `angle` takes the arm and two rounds.
    `barrier`, of the path that ends in a round, and `instability` are those on test images; on training images
    they are 0. `counts` are the numbers of weights around −2, −1, 0, 1 and 2, times r + 1 in replicate r.
    """
    config = run.config
    numbers = (run.numbers if isinstance(run, Branch) else range(config.rounds))[:rounds]
    replicates = range(config.replicates)
    arms = config.arms
    fraction = config.pruning.fraction if config.pruning.policy == "fixed" else config.pruning.fractions[1]
    results = pd.DataFrame(
        {
            "replicate": r,
            "arm": arm,
            "round": n,
            "density": (1 - fraction) ** n,
            "threshold": threshold(arm, r, n),
            "test_accuracy": accuracy(arm, r, n),
            "train_accuracy": accuracy(arm, r, n),
            "epochs": config.epochs,
        }
        for n, arm, r in product(numbers, arms, replicates)
    )
    distances = pd.DataFrame(
        {
            "replicate": r,
            "arm": arm,
            "metric": metric,
            "round_a": a,
            "round_b": b,
            "distance": angle(arm, a, b) if a != b else 0.0,
        }
        for r, arm, metric in product(replicates, arms, ("angular", "cosine", "euclidean"))
        for a, b in product([-1, *numbers], repeat=2)
    )
    twins = [n for n in config.instability.rounds if n in numbers]
    ends = [("successive", n, barrier) for n in numbers if n] + [("instability", n, instability) for n in twins]
    barriers = pd.DataFrame(
        {
            "replicate": r,
            "kind": kind,
            "round": n,
            "split": split,
            "barrier": height(n) if split == "test" else 0.0,
        }
        for (kind, n, height), r, split in product(ends, replicates, ("train", "test"))
    )
    paths = pd.DataFrame(
        {
            "replicate": r,
            "kind": kind,
            "round": n,
            "split": split,
            "alpha": alpha,
            "error": 0.1 + alpha * (1 - alpha),
        }
        for (kind, n, _), r, split, alpha in product(ends, replicates, ("train", "test"), (0, 0.5, 1))
    )
    histograms = pd.DataFrame(
        {"replicate": r, "arm": arm, "round": n, "left": i - 2.5, "right": i - 1.5, "count": (1 + r) * count}
        for r, arm, n in product(replicates, arms, numbers)
        for i, count in enumerate(counts(arm))
    )
    computed = dict(distances=distances, paths=paths, barriers=barriers, histograms=histograms)
    all_tables = {
        name: computed.get(name, pd.DataFrame()).reindex(columns=registered.columns)
        for name, registered in analysis.ANALYSES.items()
    }
    return analysis.Run(Path(run.name), config, results, all_tables)
