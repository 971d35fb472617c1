"""The paper's claims, measured: `python -m experiments.claims --root=runs/mini`.

Every claim comes down to numbers, one for each replicate, and what they should be. The table goes to the
terminal and, as Markdown, to `claims.md` in the folder of the runs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from absl import logging
from rich.table import Table

from experiments import barriers, repulsion, stabilisation, weight_decay
from experiments.panels import Exhibit, Finished, wide_console
from experiments.runs import Run
from experiments.scales import SCALES, Scale
from experiments.sweep import Sweep
from imp_jax import analysis
from imp_jax.config import UserError, choose
from imp_jax.records import write_atomically

# densities from the lowest, included, to the highest: rounds 0 to 4, 5 to 15, 16 to 20, and later (ours)
LOW_SPARSITY, MEDIUM, HIGH, VERY_HIGH = (0.35, 1.01), (0.03, 0.35), (0.01, 0.03), (0.0, 0.01)
CONNECTED = 2.0  # points of error; a barrier below it is none (Frankle et al. 2020a, section 3)
TWO_MODES = 5 / 9  # Sarle's coefficient of a uniform distribution, which is between one mode and two

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "too little data"

Values = pd.Series  # by replicate


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is measured in finished runs, and what it should be if the claim is true."""

    words: str
    runs: tuple[Run, ...]
    of: Callable[..., Values]  # the tables of `runs`
    expected: str
    holds: Callable[[Values], bool]
    form: str = "{:.1f}"


@dataclasses.dataclass(frozen=True)
class Claim:
    id: str
    words: str
    quantities: Callable[[Scale], Sequence[Quantity]]


def above(limit: float) -> dict:
    """Expected above `limit` in every replicate."""
    return {"expected": f"> {limit:g}", "holds": lambda values: (values > limit).all()}


def below(limit: float) -> dict:
    """Expected below `limit` in every replicate."""
    return {"expected": f"< {limit:g}", "holds": lambda values: (values < limit).all()}


# What is measured in the tables of a run: a number a replicate, nan where its rounds are not all there


def accuracy(run: analysis.Run, arm: str, *bands: tuple[float, float]) -> Values:
    """Test accuracy in %, the mean over the rounds within the bands of density."""
    return 100 * _over_rounds(run, arm, "test_accuracy", bands)


def lead(run: analysis.Run, *bands: tuple[float, float]) -> Values:
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


def bimodality(run: analysis.Run, arm: str, number: int = 10) -> Values:
    """Sarle's coefficient of the surviving weights of round `number`."""
    table = run.weights[run.weights["arm"] == arm]
    return _mean(table.set_index("round")[["replicate", "bimodality"]], [number], run)


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
    return whole.reindex(range(run.config.replicates))


# The claims C1 to C11, in the order of the paper


def stable_wins(scale: Scale) -> list[Quantity]:
    stable = (scale.batch(scale.stable),)
    return [
        Quantity("IMP − reinit at medium sparsity (points)", stable, lambda r: lead(r, MEDIUM), **above(0)),
        Quantity("IMP − reinit at high sparsity (points)", stable, lambda r: lead(r, HIGH), **above(0)),
    ]


def unstable_does_not(scale: Scale) -> list[Quantity]:
    unstable = (scale.batch(scale.unstable),)
    no_lead = {"expected": "not > 0 in all", "holds": lambda values: not (values > 0).all()}
    return [
        Quantity("IMP − reinit at medium sparsity (points)", unstable, lambda r: lead(r, MEDIUM), **no_lead),
        Quantity("IMP − reinit at high sparsity (points)", unstable, lambda r: lead(r, HIGH), **no_lead),
    ]


def instability_tells(scale: Scale) -> list[Quantity]:
    unstable, stable = scale.batch(scale.unstable), scale.batch(scale.stable)
    all_sizes = tuple(stabilisation.over_batch_sizes(scale))
    numbers = scale.resnet20.config.instability.rounds

    def over_rounds(run):
        return sum(instability(run, number) for number in numbers) / len(numbers)

    def medium_first(*runs):
        early, medium, late = (sum(instability(run, n) for run in runs) / len(runs) for n in numbers)
        return np.minimum(early, late) - medium

    between = (unstable, stable)
    return [
        Quantity(
            "instability, unstable − stable (points)",
            between,
            lambda u, s: over_rounds(u) - over_rounds(s),
            **above(0),
        ),
        Quantity("instability, stable (points)", (stable,), over_rounds, **below(CONNECTED)),
        Quantity("instability, lower of rounds 5 and 15 − round 10", all_sizes, medium_first, **above(0)),
    ]


def repulsion_undoes_it(scale: Scale) -> list[Quantity]:
    quantities = []
    for words, (plain, repelled) in (
        ("batch size of fig. 3", repulsion.of_resnet20(scale)[:2]),
        ("LeNet", repulsion.of_lenet(scale)),
    ):
        quantities += [
            Quantity(
                f"repelled IMP − reinit over IMP − reinit, {words} (%)",
                (plain, repelled),
                lambda p, r: (
                    100
                    * (accuracy(r, "imp", MEDIUM, HIGH) - accuracy(p, "reinit", MEDIUM, HIGH))
                    / lead(p, MEDIUM, HIGH)
                ),
                **{"expected": "mean < 25", "holds": lambda values: values.mean() < 25},
                form="{:.0f}",
            ),
            Quantity(
                f"repelled reinit − reinit, {words} (points)",
                (plain, repelled),
                lambda p, r: accuracy(r, "reinit", MEDIUM, HIGH) - accuracy(p, "reinit", MEDIUM, HIGH),
                **{"expected": "mean within ±1", "holds": lambda values: abs(values.mean()) < 1},
            ),
        ]
    return quantities


def attraction_helps(scale: Scale) -> list[Quantity]:
    unstable, attracted = repulsion.of_resnet20(scale)[2:]
    rewound = unstable.but(rewind_step=scale.rewind_step)

    def difference(arm):
        return lambda one, other: accuracy(other, arm, MEDIUM) - accuracy(one, arm, MEDIUM)

    return [
        Quantity(
            "attracted − plain IMP, medium sparsity (points)",
            (unstable, attracted),
            difference("imp"),
            **above(0),
        ),
        Quantity(
            "attracted − rewound IMP, medium sparsity (points)",
            (rewound, attracted),
            difference("imp"),
            **below(0),
        ),
        Quantity(
            "attracted − plain reinit, medium sparsity (points)",
            (unstable, attracted),
            difference("reinit"),
            **below(0),
        ),
    ]


def stable_comes_back(scale: Scale) -> list[Quantity]:
    unstable, stable = (scale.batch(scale.unstable),), (scale.batch(scale.stable),)

    def outside(run):
        return np.minimum(angle(run, "imp", LOW_SPARSITY), angle(run, "imp", HIGH, VERY_HIGH))

    two = {"form": "{:.2f}"}
    return [
        Quantity(
            "angle, stable IMP, medium sparsity", stable, lambda r: angle(r, "imp", MEDIUM), **below(0.5), **two
        ),
        Quantity(
            "angle, unstable IMP, medium sparsity",
            unstable,
            lambda r: angle(r, "imp", MEDIUM),
            **above(0.75),
            **two,
        ),
        Quantity(
            "angle, stable reinit, medium sparsity",
            stable,
            lambda r: angle(r, "reinit", MEDIUM),
            **above(0.75),
            **two,
        ),
        Quantity(
            "angle, unstable reinit, medium sparsity",
            unstable,
            lambda r: angle(r, "reinit", MEDIUM),
            **above(0.75),
            **two,
        ),
        Quantity(
            "angle, stable IMP, lower or higher − medium sparsity",
            stable,
            lambda r: outside(r) - angle(r, "imp", MEDIUM),
            **above(0),
            **two,
        ),
    ]


def two_modes(scale: Scale) -> list[Quantity]:
    stable, two = (scale.batch(scale.stable),), {"form": "{:.2f}"}
    limits = (
        {"expected": "> 5/9"} | {"holds": above(TWO_MODES)["holds"]},
        {"expected": "< 5/9"} | {"holds": below(TWO_MODES)["holds"]},
    )
    return [
        Quantity(
            "Sarle's coefficient, round 10, IMP", stable, lambda r: bimodality(r, "imp"), **limits[0], **two
        ),
        Quantity(
            "Sarle's coefficient, round 10, reinit",
            stable,
            lambda r: bimodality(r, "reinit"),
            **limits[1],
            **two,
        ),
    ]


def threshold_rises(scale: Scale) -> list[Quantity]:
    stable, two = (scale.batch(scale.stable),), {"form": "{:.2f}"}
    return [
        Quantity(
            "threshold, IMP over reinit, medium sparsity",
            stable,
            lambda r: threshold_ratio(r, MEDIUM),
            **above(1),
            **two,
        ),
        Quantity(
            "threshold, IMP over reinit, high sparsity",
            stable,
            lambda r: threshold_ratio(r, HIGH),
            **above(1),
            **two,
        ),
    ]


def weight_decay_hurts(scale: Scale) -> list[Quantity]:
    runs = tuple(weight_decay.with_and_without(scale))
    return [
        Quantity(
            "threshold's peak, without − with weight decay (rounds)",
            runs,
            lambda w, wo: peak(wo) - peak(w),
            **above(0),
        ),
        Quantity(
            "end of the plateau, without − with (rounds)",
            runs,
            lambda w, wo: plateau(wo) - plateau(w),
            **above(0),
        ),
    ]


def connected_at_medium(scale: Scale) -> list[Quantity]:
    stable = tuple(barriers.of_stable(scale))
    return [
        Quantity("barrier, medium sparsity (points)", stable, lambda r: barrier(r, MEDIUM), **below(CONNECTED)),
        Quantity(
            "barrier, low − medium sparsity (points)",
            stable,
            lambda r: barrier(r, LOW_SPARSITY) - barrier(r, MEDIUM),
            **above(0),
        ),
        Quantity(
            "barrier, very high − medium sparsity (points)",
            stable,
            lambda r: barrier(r, VERY_HIGH) - barrier(r, MEDIUM),
            **above(0),
        ),
    ]


def checkerboard(scale: Scale) -> list[Quantity]:
    runs, two = tuple(repulsion.last_optimum_only(scale)), {"form": "{:.2f}"}

    def apart(number):
        return lambda run: angle(run, "imp", MEDIUM, HIGH, VERY_HIGH, apart=number)

    return [
        Quantity("angle of neighbours, IMP", runs, apart(1), **above(0.75), **two),
        Quantity(
            "angle of neighbours − of rounds two apart, IMP",
            runs,
            lambda r: apart(1)(r) - apart(2)(r),
            **above(0),
            **two,
        ),
    ]


CLAIMS = (
    Claim("C1", "Stable IMP beats its reinit at medium and high sparsity", stable_wins),
    Claim("C2", "At a small batch it does not", unstable_does_not),
    Claim(
        "C3",
        "Instability is high where IMP fails, near zero where it wins; medium sparsity stabilises first",
        instability_tells,
    ),
    Claim("C4", "Repulsion takes IMP down to the plain reinit, and leaves the reinit", repulsion_undoes_it),
    Claim(
        "C5", "Attraction helps unstable IMP, but less than rewinding; it hurts the reinit", attraction_helps
    ),
    Claim(
        "C6",
        "Angles are small for stable IMP, smallest at medium sparsity; near 1 for unstable IMP and reinit",
        stable_comes_back,
    ),
    Claim("C7", "The weights of stable IMP have two modes at round 10, those of its reinit one", two_modes),
    Claim("C8", "IMP's threshold rises above its reinit's", threshold_rises),
    Claim(
        "C9",
        "Without weight decay the threshold collapses later, and the plateau is longer",
        weight_decay_hurts,
    ),
    Claim(
        "C10",
        "Successive optima are linearly connected at medium sparsity, not at very low or high",
        connected_at_medium,
    ),
    Claim("C11", "Repelled from the last optimum only, IMP goes back and forth between two", checkerboard),
)


class Row(NamedTuple):
    """A quantity as it was measured; nan where there is too little data."""

    claim: Claim
    quantity: Quantity
    mean: float
    low: float
    high: float
    verdict: str


def runs(scale: Scale) -> list[Run]:
    """All runs that the claims are measured in, each once."""
    return list(
        dict.fromkeys(run for claim in CLAIMS for quantity in claim.quantities(scale) for run in quantity.runs)
    )


def measure(scale: Scale, finished: Finished) -> list[Row]:
    """Every quantity of every claim; it takes all rounds of at least two replicates."""
    rows = []
    for claim in CLAIMS:
        for quantity in claim.quantities(scale):
            values = pd.Series(dtype=float)
            if all(run in finished for run in quantity.runs):
                values = quantity.of(*(finished[run] for run in quantity.runs))
            verdict = UNKNOWN
            if len(values) >= 2 and np.isfinite(values).all():
                verdict = HOLDS if quantity.holds(values) else FAILS
            rows.append(Row(claim, quantity, values.mean(), values.min(), values.max(), verdict))
    return rows


def verdict(rows: Sequence[Row]) -> str:
    """Of a claim, from those of its quantities: it holds if all do."""
    verdicts = [row.verdict for row in rows]
    if FAILS in verdicts:
        return f"{FAILS} ({verdicts.count(HOLDS)} of {len(verdicts)} do)" if HOLDS in verdicts else FAILS
    return UNKNOWN if UNKNOWN in verdicts else HOLDS


def markdown(scale: Scale, finished: Finished) -> str:
    """The table, and below it the runs, which it calls by letters."""
    rows, letters = measure(scale, finished), _letters(scale)
    lines = [
        "| | measured | mean | min | max | expected | verdict | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim, of_claim in _by_claim(rows):
        lines.append(f"| **{claim.id}** | **{claim.words}** | | | | | **{verdict(of_claim)}** | |")
        lines += [f"| | {' | '.join(_cells(row, letters))} |" for row in of_claim]
    there = [f"{letter}: `{run.name}`" for run, letter in letters.items()]
    return "\n".join([*lines, "", "Runs: " + ", ".join(there)])


def show(scale: Scale, finished: Finished) -> None:
    """Print the table, and the runs."""
    rows, letters = measure(scale, finished), _letters(scale)
    table = Table("", "measured", "mean", "min", "max", "expected", "verdict", "runs")
    for claim, of_claim in _by_claim(rows):
        table.add_row(claim.id, f"[bold]{claim.words}", "", "", "", "", f"[bold]{verdict(of_claim)}", "")
        for row in of_claim:
            table.add_row("", *_cells(row, letters))
        table.add_section()
    console = wide_console()
    console.print(table)
    for run, letter in letters.items():
        console.print(f"{letter}: {run.name}{'' if run in finished else ' (not run)'}", highlight=False)


def _by_claim(rows):
    return [(claim, [row for row in rows if row.claim is claim]) for claim in CLAIMS]


def _letters(scale):
    return {run: chr(ord("a") + place) for place, run in enumerate(runs(scale))}


def _cells(row, letters):
    numbers = ["–" if np.isnan(n) else row.quantity.form.format(n) for n in (row.mean, row.low, row.high)]
    of = ", ".join(letters[run] for run in row.quantity.runs)
    return row.quantity.words, *numbers, row.quantity.expected, row.verdict, of


FIGURES = (Exhibit("claims", "the paper's claims, measured", runs, markdown),)


def scale_of(root: Path, name: str | None) -> Scale:
    """The scale called `name`, or of which there are runs in `root`.

    Raises:
      UserError: an unknown scale; runs of none, or of several.
    """
    if name:
        return choose(SCALES, "--scale", name)
    there = [scale for scale in SCALES.values() if any((root / run.name).is_dir() for run in runs(scale))]
    if len(there) != 1:
        held = (
            f"runs of the scales {', '.join(s.name for s in there)}"
            if there
            else "no run that a claim is about"
        )
        raise UserError(
            f"{root} holds {held}; say which with --scale={'|'.join(SCALES)}, or give another --root"
        )
    return there[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of the runs, as of experiments.run")
    parser.add_argument("--scale", help="paper, mini or smoke (default: whichever there are runs of)")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    try:
        root = arguments.root.absolute()
        scale = scale_of(root, arguments.scale)
        sweep = Sweep(root)
        sweep.refuse_others(runs(scale))
        finished = sweep.finished(runs(scale))
        if not finished:
            raise UserError(f"nothing that the claims are about has been run in {root} yet")
        show(scale, finished)
        write_atomically(root / "claims.md", markdown(scale, finished) + "\n")
        print(f"claims: {root / 'claims.md'}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
