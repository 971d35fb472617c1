"""The analysis overlap: how many weights two masks share, against chance."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pandas as pd

from imp_jax import figures, similarity
from imp_jax.analysis.registry import RunInputs, complete_rows, register
from imp_jax.arms import ARMS
from imp_jax.figures import LABELS, STYLES, Figure
from imp_jax.masking import Mask
from imp_jax.members import Member

_KEYS = ("replicate", "arm", "replicate_b", "arm_b", "round")
_KINDS = ("Replicates of an arm", "IMP and another arm")


def compute_overlap(inputs: RunInputs) -> list[tuple]:
    """Compare the masks of pairs of networks in each round, by their prunable weights.

    The pairs are: replicates of an arm, and two arms of a replicate. Arms with imp's mask are left out.

    Columns:
      replicate, arm: the first network.
      replicate_b, arm_b: the second network.
      round: the round of both.
      jaccard: the Jaccard index of their masks, in [0, 1]; see `similarity.jaccard_index`.
      chance: what it would be for independent masks with the same layer densities; see
        `similarity.chance_jaccard`.

    Both are nan for a pair of empty masks.
    """
    return complete_rows(inputs, "overlap", _list_pairs(inputs), functools.partial(_compare_pairs, inputs))


def _list_pairs(inputs) -> Iterator[tuple]:
    """Yield the key of each pair whose networks are on disk."""
    for number, members in inputs.rounds.items():
        members = sorted(filter(_has_own_mask, members), key=lambda m: (m.arm != "imp", m))  # imp first
        for first, second in itertools.combinations(members, 2):
            if (first.arm == second.arm) != (first.replicate == second.replicate):
                yield first.replicate, first.arm, second.replicate, second.arm, number


def _has_own_mask(member):
    return member.arm == "imp" or member.arm not in ARMS or ARMS[member.arm].mask is not ARMS["imp"].mask


def _compare_pairs(inputs, keys) -> dict[tuple, tuple[float, float]]:
    """Return the values of each pair, except those with a network that cannot be read."""
    exclude, values = tuple(inputs.config.pruning.exclude), {}
    for key in keys:
        replicate, arm, replicate_b, arm_b, number = key
        networks = inputs.load_round(number)
        pair = [networks.get(member) for member in (Member(arm, replicate), Member(arm_b, replicate_b))]
        if None not in pair:
            values[key] = tuple(map(float, _compare(*(network.mask for network in pair), exclude)))
    return values


@functools.partial(jax.jit, static_argnames="exclude")
def _compare(mask_a: Mask, mask_b: Mask, exclude: tuple[str, ...]):
    return (
        similarity.jaccard_index(mask_a, mask_b, exclude),
        similarity.chance_jaccard(mask_a, mask_b, exclude),
    )


@figures.use_default_style
def draw_overlap(run: Any) -> Figure | None:
    """Draw the Jaccard index over density, beside its ratio to chance; None for a run without a pair.

    A row shows one kind of pair: replicates of an arm, or imp and another arm.

    Args:
      run: an `analysis.Run`.
    """
    table = _describe_pairs(run)
    kinds = [kind for kind in _KINDS if (table["kind"] == kind).any()]
    if not kinds:
        return None
    figure = Figure(figsize=(7.6, 0.6 + 2.7 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False, sharex=True)
    lines = {}
    for (left, right), kind in zip(panels, kinds, strict=True):
        for arm, rows in table[table["kind"] == kind].groupby("arm_b", observed=True):
            style = STYLES.get(arm, {})
            for axes, value in ((left, "jaccard"), (right, "ratio")):
                figures.draw_mean(axes, rows, value, label=LABELS.get(arm, arm), **style)
            lines[LABELS.get(arm, arm)] = left.containers[-1]
            chance = rows.groupby("density")["chance"].mean()
            left.plot(chance.index, chance, color=style.get("color"), linestyle=":", linewidth=1)
        right.axhline(1, color="black", linestyle=":", linewidth=1)
        left.set_ylim(-0.03, 1.03)
        right.set_ylim(bottom=0)
        left.set_ylabel(f"{kind}:\nJaccard index of the masks")
        right.set_ylabel("Jaccard index / chance")
        for axes in (left, right):
            figures.density_axis(axes, table["density"].min())
    for axes in panels[:-1].flat:
        axes.set_xlabel("")
    figures.label_below(figure, {**lines, "chance": right.lines[-1]})
    return figure


def describe_overlap(run: Any) -> str:
    """Return the sentence of the report, for the round nearest to a density of 10 %.

    Args:
      run: an `analysis.Run`.
    """
    table = _describe_pairs(run).dropna(subset=["jaccard"])
    if table.empty:
        return ""
    table = table[table["arm"] == table["arm"].min()]  # imp, except in a branch without it
    density = figures.nearest_density(table["density"])
    pairs = table[table["density"] == density].groupby(["kind", "arm_b"], observed=True)
    names = dict(zip(_KINDS, ("replicates of {}", "IMP and {}"), strict=True))
    parts = [
        f"{means.jaccard:.3f} for {names[kind].format(LABELS.get(arm, arm))} (chance: {means.chance:.3f})"
        for (kind, arm), means in pairs[["jaccard", "chance"]].mean().iterrows()
    ]
    return f"At {100 * density:.3g} % density, the Jaccard index of the masks is {', '.join(parts)}."


def _describe_pairs(run) -> pd.DataFrame:
    """Return the pairs to draw, with their kind, density, and the ratio of the index to chance."""
    table = run.overlap
    table = table[(table["arm"] == table["arm_b"]) | (table["arm"] == "imp")]
    arms = pd.CategoricalDtype(run.results["arm"].unique(), ordered=True)  # for the order of lines
    return table.assign(
        arm=table["arm"].astype(arms),
        arm_b=table["arm_b"].astype(arms),
        kind=pd.Categorical(np.where(table["arm"] == table["arm_b"], *_KINDS), _KINDS, ordered=True),
        density=table["round"].map(figures.densities(run.results)).astype(float),
        ratio=table["jaccard"] / table["chance"],
    ).query("density > 0")


register(
    "overlap",
    compute_overlap,
    columns=(*_KEYS, "jaccard", "chance"),
    needs="run",
    description="Jaccard index of two masks, and what it would be for independent masks with the same layer "
    "densities (both from 0 to 1); in each round, for replicates of an arm and for two arms of a replicate, "
    "except arms that have the mask of `imp`",
    figure=draw_overlap,
    caption="Jaccard index of two masks (weights that survive in both over those that survive in either), and "
    "its ratio to chance, which is that of independent masks with the same layer densities; mean of the pairs, "
    "bars from minimum to maximum.",
    sentence=describe_overlap,
)
