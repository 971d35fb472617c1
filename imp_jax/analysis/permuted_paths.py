"""The analysis permuted_paths: barriers between independent networks before and after weight matching.

The units of the second network are permuted to match the first (Ainsworth et al. 2023, "Git Re-Basin", section
3.2), and normalisation statistics are estimated again at every point of the path, as in REPAIR for networks
with batch normalisation (Jordan et al. 2023).
"""

import contextlib
import itertools

import jax
import numpy as np
import pandas as pd

from imp_jax import connectivity, models, permutations
from imp_jax.analysis.registry import RunInputs, complete_rows, register
from imp_jax.errors import UserError
from imp_jax.figures import (
    STYLES,
    Figure,
    densities,
    density_axis,
    draw_mean,
    format_percent,
    require_rows,
    use_default_style,
)
from imp_jax.members import Member

EVERY = 3  # rounds: 0, 3, 6, …, because matching takes time (ours)
POINTS = 11  # of a path; an odd number, so that the middle, mostly the worst point, is one of them (ours)

_KEYS = ["replicate", "kind", "replicate_b", "round"]
_BARRIERS = ["barrier", "loss_barrier", "matched_barrier", "matched_loss_barrier"]
_KINDS = {"reinit": "IMP and random reinitialisation", "replicate": "the IMP networks of two replicates"}


def compute_permuted_paths(inputs: RunInputs) -> list[tuple]:
    """Return the known rows of the table, and the missing ones of the rounds on disk that `EVERY` divides.

    There are no rows for models without `permutation_spec`. Barriers are those of the test set. Columns:

      replicate, kind, replicate_b: the pair: imp and reinit of a replicate ("reinit", both numbers are equal),
        or the imps of two neighbouring replicates ("replicate").
      round: of both networks.
      barrier, loss_barrier: error barrier, as a difference of errors in [0, 1], and loss barrier in nats.
      matched_barrier, matched_loss_barrier: the same after the second network is permuted to match the first;
        NaN if one of them is not finite.
      baseline: of the barriers, from the config.
    """
    pairs = _expected_pairs(inputs)

    def compute(missing):
        computed = {}
        for key in missing if _has_known_units(inputs.config) else ():
            networks = inputs.load_round(key[-1])
            if networks:  # none in a damaged round
                barriers = _compute_barriers(*(networks[member] for member in pairs[key]), inputs)
                computed[key] = (*barriers, inputs.config.analysis.baseline)
        return computed

    return complete_rows(inputs, "permuted_paths", pairs, compute)


def _expected_pairs(inputs) -> dict[tuple, tuple[Member, Member]]:
    """Return the pairs of members in the rounds on disk, by the values of `_KEYS`."""
    pairs = {}
    for number, members in inputs.rounds.items():
        if number % EVERY == 0:
            imps = sorted(member for member in members if member.arm == "imp")
            controls = [(imp, Member("reinit", imp.replicate)) for imp in imps]
            pairs |= {(a.replicate, "reinit", a.replicate, number): (a, b) for a, b in controls if b in members}
            pairs |= {
                (a.replicate, "replicate", b.replicate, number): (a, b) for a, b in itertools.pairwise(imps)
            }
    return pairs


def _has_known_units(config) -> bool:
    """Return whether the model has a `permutation_spec`, without opening the data set."""
    with contextlib.suppress(UserError):  # the config file that registers the model was moved
        return hasattr(models.find(config.model.name)(num_classes=2), "permutation_spec")
    return False


def _compute_barriers(first, second, inputs) -> list[float]:
    """Return the values of `_BARRIERS` for two networks."""
    experiment = inputs.experiment
    model = experiment.spec.model
    can_reestimate = hasattr(model, "norm_momentum")  # without statistics, this changes nothing

    def barriers(end):
        losses, errors = connectivity.path_metrics(
            first.variables,
            end,
            experiment.dataset.test,
            spec=experiment.spec,
            num_points=POINTS,
            batch_norm="reestimate" if can_reestimate else "interpolate",
            train=experiment.dataset.train,
        )
        baseline = inputs.config.analysis.baseline
        return [float(connectivity.error_barrier(values, baseline)) for values in (errors, losses)]

    weights = jax.tree.leaves((first.params, second.params))
    if not all(np.isfinite(leaf).all() for leaf in weights):  # no assignment is the best
        return [*barriers(second.variables), np.nan, np.nan]
    matched = permutations.align(model.permutation_spec(), first.variables, second.variables)
    return [*barriers(second.variables), *barriers(matched)]


@use_default_style
def draw_permuted_paths(table: pd.DataFrame, results: pd.DataFrame) -> Figure:
    """Draw the error barriers before and after weight matching over density, one panel for each kind of pair.

    Args:
      table, results: permuted_paths.csv and results.csv.
    """
    table = require_rows(table, "pairs of networks")
    table = table.assign(density=table["round"].map(densities(results)))
    kinds = [kind for kind in _KINDS if (table["kind"] == kind).any()]
    figure = Figure(figsize=(0.8 + 3.4 * len(kinds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        rows = table[table["kind"] == kind]
        draw_mean(axes, rows, "barrier", 100, label="as trained", **STYLES["reinit"])
        matched = rows.dropna(subset=["matched_barrier"])
        draw_mean(axes, matched, "matched_barrier", 100, label="after weight matching", **STYLES["imp"])
        density_axis(axes, table["density"].min())
        axes.set_title(f"between {_KINDS[kind]}", fontsize="medium")
    panels[0].set_ylabel("Error barrier (percentage points)")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, fontsize="small", loc="outside upper center", ncols=2)
    return figure


def describe_permuted_paths(table: pd.DataFrame, results: pd.DataFrame) -> str:
    """Return the mean error barriers before and after weight matching, in the first and in the last round."""
    density, parts = densities(results), []
    for kind, name in _KINDS.items():
        rows = table[table["kind"] == kind]
        means = 100 * rows.groupby("round")[["barrier", "matched_barrier"]].mean().dropna()
        for number in dict.fromkeys(means.index[[0, -1]] if len(means) else ()):
            barrier, matched = means.loc[number]
            at = f"at {format_percent(density[number])} % density"
            parts.append((name, f"from {barrier:.1f} to {matched:.1f} points {at}"))
    changes = [f"between {name} {' and '.join(t for n, t in parts if n == name)}" for name in dict(parts)]
    return f"Weight matching changes the error barrier {', and '.join(changes)}." if changes else ""


register(
    "permuted_paths",
    compute_permuted_paths,
    columns=(*_KEYS, *_BARRIERS, "baseline"),
    needs="run",
    description="error barriers (0 to 1) and loss barriers (nats) on the test set between `imp` and `reinit` "
    "of a replicate (`reinit`) and between `imp` of neighbouring replicates (`replicate`), before and after "
    "the units of the second network are permuted to match the first, in every third round; empty for models "
    "without `permutation_spec`",
    figure=lambda run: (
        draw_permuted_paths(run.permuted_paths, run.results) if len(run.permuted_paths) else None
    ),
    caption="Error barrier on the test set between independently trained networks of a round: as trained, and "
    "after the units of the second are permuted to match the first (weight matching; Ainsworth et al. 2023); "
    "normalisation statistics are estimated again on the path (Jordan et al. 2023). Mean of the pairs, bars "
    "from minimum to maximum.",
    sentence=lambda run: describe_permuted_paths(run.permuted_paths, run.results),
    is_current=lambda table, config: table["baseline"] == config.analysis.baseline,
)
