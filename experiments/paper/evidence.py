"""The paper's claims C1 to C11, each as quantities of finished runs and what they should be if it is true."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.paper import paths, repellent, stabilisation, weight_decay
from experiments.paper.quantities import (
    HIGH,
    LOW,
    MEDIUM,
    VERY_HIGH,
    Values,
    accuracy,
    angle,
    barrier,
    imp_minus_reinit,
    instability,
    peak,
    plateau,
    threshold_ratio,
    zero_bin_over_peak,
)
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run

CONNECTED = 2.0  # points of error; a barrier below it is none (Frankle et al. 2020a, section 3)
SMALL, NEAR_ORTHOGONAL = 0.5, 0.75  # angles (ours)
PART_OF_LEAD_PCT, LEVEL_POINTS = (
    25,
    1.0,
)  # % of a lead, and points of accuracy, within which there is no difference (ours)
HALF = 0.5  # of the height of a peak: a valley that parts two modes is lower (ours)
TWO_DIGITS = "{:.2f}"  # of angles and ratios


class Expected(NamedTuple):
    """What the numbers of the replicates should be if the claim is true."""

    words: str
    holds: Callable[[Values], bool]


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is measured in finished runs."""

    words: str
    runs: tuple[Run, ...]
    of: Callable[..., Values]  # the tables of `runs`
    expected: Expected
    form: str = "{:.1f}"


@dataclasses.dataclass(frozen=True)
class Claim:
    id: str
    words: str
    quantities: Callable[[Scale], Sequence[Quantity]]


def above(limit: float) -> Expected:
    """Above `limit` in every replicate."""
    return Expected(f"> {limit:g}", lambda values: (values > limit).all())


def below(limit: float) -> Expected:
    """Below `limit` in every replicate."""
    return Expected(f"< {limit:g}", lambda values: (values < limit).all())


def stable_wins(scale: Scale) -> list[Quantity]:
    stable = (scale.batch(scale.stable),)
    return [
        Quantity(
            "IMP − reinit at medium sparsity (points)", stable, lambda r: imp_minus_reinit(r, MEDIUM), above(0)
        ),
        Quantity(
            "IMP − reinit at high sparsity (points)", stable, lambda r: imp_minus_reinit(r, HIGH), above(0)
        ),
    ]


def unstable_does_not(scale: Scale) -> list[Quantity]:
    runs = (scale.batch(scale.stable), scale.batch(scale.unstable))
    no_lead = Expected(f"mean < {PART_OF_LEAD_PCT}", lambda values: values.mean() < PART_OF_LEAD_PCT)

    def over_stable(band):
        return lambda stable, unstable: (
            100 * imp_minus_reinit(unstable, band) / imp_minus_reinit(stable, band).mean()
        )

    words = "IMP − reinit over that at the stable batch size"
    return [
        Quantity(f"{words}, medium sparsity (%)", runs, over_stable(MEDIUM), no_lead, "{:.0f}"),
        Quantity(f"{words}, high sparsity (%)", runs, over_stable(HIGH), no_lead, "{:.0f}"),
    ]


def instability_tells(scale: Scale) -> list[Quantity]:
    unstable, stable = (scale.batch(scale.unstable),), (scale.batch(scale.stable),)
    all_sizes = tuple(stabilisation.over_batch_sizes(scale))
    early, medium, late = scale.resnet20.config.instability.rounds

    def over_rounds(run):
        return sum(instability(run, number) for number in (early, medium, late)) / 3

    def medium_first(*runs):
        at = {n: sum(instability(run, n) for run in runs) / len(runs) for n in (early, medium, late)}
        return np.minimum(at[early], at[late]) - at[medium]

    words = f"instability, lower of rounds {early} and {late} − round {medium}, all batch sizes"
    return [
        Quantity("instability, unstable (points)", unstable, over_rounds, above(CONNECTED)),
        Quantity("instability, stable (points)", stable, over_rounds, below(CONNECTED)),
        Quantity(words, all_sizes, medium_first, above(0)),
    ]


def repulsion_undoes_it(scale: Scale) -> list[Quantity]:
    of_networks = {  # at a smaller scale one may stand for several
        tuple(repellent.of_conv4(scale)): "Conv-4",
        tuple(repellent.of_lenet(scale)): "LeNet",
        tuple(repellent.of_resnet20(scale)[:2]): "batch size of fig. 3",
    }
    bands = (MEDIUM, HIGH)

    def kept(plain, repelled):
        beyond = accuracy(repelled, "imp", *bands) - accuracy(plain, "reinit", *bands)
        return 100 * beyond / imp_minus_reinit(plain, *bands).mean()

    def control(plain, repelled):
        return accuracy(repelled, "reinit", *bands) - accuracy(plain, "reinit", *bands)

    quantities = []
    for runs, words in reversed(of_networks.items()):
        part = Expected(
            f"mean within ±{PART_OF_LEAD_PCT}", lambda values: abs(values.mean()) < PART_OF_LEAD_PCT
        )
        level = Expected(f"mean within ±{LEVEL_POINTS:g}", lambda values: abs(values.mean()) < LEVEL_POINTS)
        quantities += [
            Quantity(
                f"IMP − reinit, {words} (points)", runs[:1], lambda r: imp_minus_reinit(r, *bands), above(0)
            ),
            Quantity(f"repelled IMP − reinit over that, {words} (%)", runs, kept, part, "{:.0f}"),
            Quantity(f"repelled reinit − reinit, {words} (points)", runs, control, level),
        ]
    return quantities


def attraction_helps(scale: Scale) -> list[Quantity]:
    unstable, attracted = repellent.of_resnet20(scale)[2:]
    rewound = unstable.with_overrides(rewind_step=scale.rewind_step)

    def difference(arm):
        return lambda one, other: accuracy(other, arm, MEDIUM) - accuracy(one, arm, MEDIUM)

    return [
        Quantity(
            "attracted − plain IMP, medium sparsity (points)",
            (unstable, attracted),
            difference("imp"),
            above(0),
        ),
        Quantity(
            "attracted − rewound IMP, medium sparsity (points)",
            (rewound, attracted),
            difference("imp"),
            below(0),
        ),
        Quantity(
            "attracted − plain reinit, medium sparsity (points)",
            (unstable, attracted),
            difference("reinit"),
            below(0),
        ),
    ]


def stable_comes_back(scale: Scale) -> list[Quantity]:
    unstable, stable = (scale.batch(scale.unstable),), (scale.batch(scale.stable),)

    def outside(run):
        return np.minimum(angle(run, "imp", LOW), angle(run, "imp", HIGH, VERY_HIGH))

    return [
        Quantity(
            "angle, stable IMP, medium sparsity",
            stable,
            lambda r: angle(r, "imp", MEDIUM),
            below(SMALL),
            TWO_DIGITS,
        ),
        Quantity(
            "angle, unstable IMP, medium sparsity",
            unstable,
            lambda r: angle(r, "imp", MEDIUM),
            above(NEAR_ORTHOGONAL),
            TWO_DIGITS,
        ),
        Quantity(
            "angle, stable reinit, medium sparsity",
            stable,
            lambda r: angle(r, "reinit", MEDIUM),
            above(NEAR_ORTHOGONAL),
            TWO_DIGITS,
        ),
        Quantity(
            "angle, unstable reinit, medium sparsity",
            unstable,
            lambda r: angle(r, "reinit", MEDIUM),
            above(NEAR_ORTHOGONAL),
            TWO_DIGITS,
        ),
        Quantity(
            "angle, stable IMP, lower or higher − medium sparsity",
            stable,
            lambda r: outside(r) - angle(r, "imp", MEDIUM),
            above(0),
            TWO_DIGITS,
        ),
    ]


def two_modes(scale: Scale) -> list[Quantity]:
    stable = (scale.batch(scale.stable),)
    words = "histogram of round 10 at zero over its peak, stable"
    return [
        Quantity(f"{words} IMP", stable, lambda run: zero_bin_over_peak(run, "imp"), below(HALF), TWO_DIGITS),
        Quantity(
            f"{words} reinit", stable, lambda run: zero_bin_over_peak(run, "reinit"), above(HALF), TWO_DIGITS
        ),
    ]


def threshold_rises(scale: Scale) -> list[Quantity]:
    stable = (scale.batch(scale.stable),)
    return [
        Quantity(
            "threshold, IMP over reinit, medium sparsity",
            stable,
            lambda r: threshold_ratio(r, MEDIUM),
            above(1),
            TWO_DIGITS,
        ),
        Quantity(
            "threshold, IMP over reinit, high sparsity",
            stable,
            lambda r: threshold_ratio(r, HIGH),
            above(1),
            TWO_DIGITS,
        ),
    ]


def weight_decay_hurts(scale: Scale) -> list[Quantity]:
    runs = tuple(weight_decay.with_and_without(scale))
    return [
        Quantity(
            "threshold's peak, without − with weight decay (rounds)",
            runs,
            lambda w, wo: peak(wo) - peak(w),
            above(0),
        ),
        Quantity(
            "end of the plateau, without − with (rounds)",
            runs,
            lambda w, wo: plateau(wo) - plateau(w),
            above(0),
        ),
    ]


def connected_at_medium(scale: Scale) -> list[Quantity]:
    stable = tuple(paths.of_stable(scale))
    return [
        Quantity("barrier, medium sparsity (points)", stable, lambda r: barrier(r, MEDIUM), below(CONNECTED)),
        Quantity("barrier, low sparsity (points)", stable, lambda r: barrier(r, LOW), above(CONNECTED)),
        Quantity(
            "barrier, very high sparsity (points)", stable, lambda r: barrier(r, VERY_HIGH), above(CONNECTED)
        ),
    ]


def checkerboard(scale: Scale) -> list[Quantity]:
    runs = tuple(repellent.last_optimum_only(scale))

    def apart(number):
        return lambda run: angle(run, "imp", MEDIUM, HIGH, VERY_HIGH, apart=number)

    return [
        Quantity("angle of neighbours, IMP", runs, apart(1), above(NEAR_ORTHOGONAL), TWO_DIGITS),
        Quantity("angle of rounds two apart, IMP", runs, apart(2), below(SMALL), TWO_DIGITS),
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
