"""Rows of the tables paths and barriers."""

import numpy as np

from imp_jax import connectivity
from imp_jax.analysis.tables import make_table
from imp_jax.arms import Member


def replicates_with_both_ends(kind, number, members):
    """Return the replicates that have both ends of the paths of a kind that end in round `number`."""
    if kind == "successive":
        ends = set(members.get(number - 1, ())) & set(members[number])
        return [replicate for arm, replicate in ends if arm == "imp"]
    twins = [replicate for arm, replicate in members[number] if arm == "twin"]
    return [replicate for replicate in twins if Member("imp", replicate) in members[number]]


def compute_paths(experiment, settings, number, kind, before, now):
    """Compute the rows of the paths of one kind that end in round `number`, on both splits."""
    dataset = experiment.dataset
    options = {
        "spec": experiment.spec,
        "num_points": settings.path_points,
        "batch_norm": settings.batch_norm,
        "train": dataset.train,
    }
    other, other_arm = (before, "imp") if kind == "successive" else (now, "twin")
    for arm, replicate in now.members:
        if arm != "imp" or Member(other_arm, replicate) not in other.members:
            continue
        ends = now.trained("imp", replicate), other.trained(other_arm, replicate)
        if kind == "successive":
            ends = ends[::-1]
        for split in ("train", "test"):
            losses, errors = connectivity.path_metrics(*ends, getattr(dataset, split), **options)
            alphas = np.linspace(0, 1, len(losses))
            for alpha, loss, error in zip(alphas, losses, errors, strict=True):
                yield replicate, kind, number, split, alpha, float(loss), float(error), options["batch_norm"]


def drop_stale_paths(paths, settings, finished):
    """Drop paths with other points or statistics than the config asks for, if both ends are on disk."""
    points = paths.groupby(["replicate", "kind", "round", "split"])["alpha"].transform("size")
    configured = (points == settings.path_points) & (paths["batch_norm"] == settings.batch_norm)
    before = paths["round"] - (paths["kind"] == "successive")
    return paths[configured | ~paths["round"].isin(finished) | ~before.isin(finished)]


def compute_barriers(paths, baseline):
    rows = []
    for key, points in paths.groupby(["replicate", "kind", "round", "split"], sort=False):
        points = points.sort_values("alpha")
        barriers = (connectivity.error_barrier(points[of].to_numpy(), baseline) for of in ("error", "loss"))
        rows.append((*key, *map(float, barriers)))
    return make_table("barriers", rows)
