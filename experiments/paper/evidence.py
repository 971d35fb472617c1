"""The paper's claims C1 to C11: for each one, quantities of finished runs and the values that it predicts."""

import dataclasses
import math
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
    plateau_end_round,
    threshold_peak_round,
    threshold_ratio,
    zero_bin_over_peak,
)
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run

CONNECTED = 2.0  # points of error: below this barrier, networks are connected (Frankle et al. 2020a, section 3)
SMALL, NEAR_ORTHOGONAL = 0.5, 0.75  # angles (ours)
PART_OF_LEAD_PCT = 25  # a smaller part of a lead counts as no lead (ours)
LEVEL_POINTS = 1.0  # a smaller difference in accuracy counts as none (ours)
HALF = 0.5  # a valley between two modes is lower than this part of the peak (ours)
PERCENT, TWO_DIGITS = "{:.0f}", "{:.2f}"  # formats; the latter of angles and ratios


class Expected(NamedTuple):
    """The open interval in which the claim predicts the mean over replicates, and its description."""

    words: str
    low: float = -math.inf
    high: float = math.inf

    def contains(self, mean: float) -> bool:
        """Return whether a mean is in the interval."""
        return self.low < mean < self.high


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number that is measured in finished runs, once per replicate.

    Attributes:
      words: what it is, with its unit.
      runs: the runs that it is measured in.
      measure: computes it from the tables of `runs`.
      expected: what the claim predicts.
      pattern: how its values are formatted.
    """

    words: str
    runs: tuple[Run, ...]
    measure: Callable[..., Values]
    expected: Expected
    pattern: str = "{:.1f}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper. It holds if all its quantities are as expected."""

    id: str
    words: str
    quantities: Callable[[Scale], Sequence[Quantity]]


def expect_above(limit: float) -> Expected:
    """Expect a mean above `limit`."""
    return Expected(f"> {limit:g}", low=limit)


def expect_below(limit: float) -> Expected:
    """Expect a mean below `limit`."""
    return Expected(f"< {limit:g}", high=limit)


def expect_within(limit: float) -> Expected:
    """Expect a mean between −`limit` and `limit`."""
    return Expected(f"within ±{limit:g}", -limit, limit)


def quantify_c1(scale: Scale) -> list[Quantity]:
    """Compare the stable IMP with its reinit at medium and high sparsity."""
    stable = (scale.make_resnet20_run(scale.stable),)
    return [
        Quantity(
            "IMP − reinit at medium sparsity (points)",
            stable,
            lambda r: imp_minus_reinit(r, MEDIUM),
            expect_above(0),
        ),
        Quantity(
            "IMP − reinit at high sparsity (points)",
            stable,
            lambda r: imp_minus_reinit(r, HIGH),
            expect_above(0),
        ),
    ]


def quantify_c2(scale: Scale) -> list[Quantity]:
    """Compare the lead of the unstable IMP over its reinit with the stable one's."""
    runs = (scale.make_resnet20_run(scale.stable), scale.make_resnet20_run(scale.unstable))
    no_lead = expect_below(PART_OF_LEAD_PCT)

    def lead_over_stable(band):
        return lambda stable, unstable: (
            100 * imp_minus_reinit(unstable, band) / imp_minus_reinit(stable, band).mean()
        )

    words = "IMP − reinit, relative to the stable batch size"
    return [
        Quantity(f"{words}, medium sparsity (%)", runs, lead_over_stable(MEDIUM), no_lead, PERCENT),
        Quantity(f"{words}, high sparsity (%)", runs, lead_over_stable(HIGH), no_lead, PERCENT),
    ]


def quantify_c3(scale: Scale) -> list[Quantity]:
    """Compare instability where IMP fails and where it wins, and across rounds."""
    unstable, stable = (scale.make_resnet20_run(scale.unstable),), (scale.make_resnet20_run(scale.stable),)
    all_sizes = tuple(stabilisation.list_batch_size_runs(scale))
    early, medium, late = scale.resnet20.config.instability.rounds

    def mean_instability(run):
        return sum(instability(run, number) for number in (early, medium, late)) / 3

    def lead_of_medium(*runs):
        means = {n: sum(instability(run, n) for run in runs) / len(runs) for n in (early, medium, late)}
        return np.minimum(means[early], means[late]) - means[medium]

    words = f"instability, lower of rounds {early} and {late} − round {medium}, all batch sizes"
    return [
        Quantity("instability, unstable (points)", unstable, mean_instability, expect_above(CONNECTED)),
        Quantity("instability, stable (points)", stable, mean_instability, expect_below(CONNECTED)),
        Quantity(words, all_sizes, lead_of_medium, expect_above(0)),
    ]


def quantify_c4(scale: Scale) -> list[Quantity]:
    """Compare repelled IMP and reinit with the plain ones, for each network."""
    names_by_runs = {  # at a smaller scale, one network may stand for several
        tuple(repellent.list_conv4_runs(scale)): "Conv-4",
        tuple(repellent.list_lenet_runs(scale)): "LeNet",
        tuple(repellent.list_resnet20_runs(scale)[:2]): "batch size of fig. 3",
    }
    bands = (MEDIUM, HIGH)

    def remaining_lead(plain, repelled):
        lead = accuracy(repelled, "imp", *bands) - accuracy(plain, "reinit", *bands)
        return 100 * lead / imp_minus_reinit(plain, *bands).mean()

    def control_difference(plain, repelled):
        return accuracy(repelled, "reinit", *bands) - accuracy(plain, "reinit", *bands)

    quantities = []
    for runs, words in reversed(names_by_runs.items()):
        quantities += [
            Quantity(
                f"IMP − reinit, {words} (points)",
                runs[:1],
                lambda r: imp_minus_reinit(r, *bands),
                expect_above(0),
            ),
            Quantity(
                f"repelled IMP − reinit, relative to IMP − reinit, {words} (%)",
                runs,
                remaining_lead,
                expect_within(PART_OF_LEAD_PCT),
                PERCENT,
            ),
            Quantity(
                f"repelled reinit − reinit, {words} (points)",
                runs,
                control_difference,
                expect_within(LEVEL_POINTS),
            ),
        ]
    return quantities


def quantify_c5(scale: Scale) -> list[Quantity]:
    """Compare attracted IMP with plain and rewound IMP, and attracted with plain reinit."""
    unstable, attracted = repellent.list_resnet20_runs(scale)[2:]
    rewound = unstable.with_overrides(rewind_step=scale.rewind_step)

    def difference(arm):
        return lambda baseline, attracted: accuracy(attracted, arm, MEDIUM) - accuracy(baseline, arm, MEDIUM)

    return [
        Quantity(
            "attracted − plain IMP, medium sparsity (points)",
            (unstable, attracted),
            difference("imp"),
            expect_above(0),
        ),
        Quantity(
            "attracted − rewound IMP, medium sparsity (points)",
            (rewound, attracted),
            difference("imp"),
            expect_below(0),
        ),
        Quantity(
            "attracted − plain reinit, medium sparsity (points)",
            (unstable, attracted),
            difference("reinit"),
            expect_below(0),
        ),
    ]


def quantify_c6(scale: Scale) -> list[Quantity]:
    """Compare the angles between rounds of stable and unstable IMP and of the reinits."""
    unstable, stable = (scale.make_resnet20_run(scale.unstable),), (scale.make_resnet20_run(scale.stable),)

    def outer_angle(run):
        return np.minimum(angle(run, "imp", LOW), angle(run, "imp", HIGH, VERY_HIGH))

    return [
        Quantity(
            "angle, stable IMP, medium sparsity",
            stable,
            lambda r: angle(r, "imp", MEDIUM),
            expect_below(SMALL),
            TWO_DIGITS,
        ),
        Quantity(
            "angle, unstable IMP, medium sparsity",
            unstable,
            lambda r: angle(r, "imp", MEDIUM),
            expect_above(NEAR_ORTHOGONAL),
            TWO_DIGITS,
        ),
        Quantity(
            "angle, stable reinit, medium sparsity",
            stable,
            lambda r: angle(r, "reinit", MEDIUM),
            expect_above(NEAR_ORTHOGONAL),
            TWO_DIGITS,
        ),
        Quantity(
            "angle, unstable reinit, medium sparsity",
            unstable,
            lambda r: angle(r, "reinit", MEDIUM),
            expect_above(NEAR_ORTHOGONAL),
            TWO_DIGITS,
        ),
        Quantity(
            "angle, stable IMP, lower or higher − medium sparsity",
            stable,
            lambda r: outer_angle(r) - angle(r, "imp", MEDIUM),
            expect_above(0),
            TWO_DIGITS,
        ),
    ]


def quantify_c7(scale: Scale) -> list[Quantity]:
    """Look for a valley at zero in the weights' histograms."""
    stable = (scale.make_resnet20_run(scale.stable),)
    words = "histogram at 10.7 % density, at zero over its peak, stable"
    return [
        Quantity(
            f"{words} IMP", stable, lambda run: zero_bin_over_peak(run, "imp"), expect_below(HALF), TWO_DIGITS
        ),
        Quantity(
            f"{words} reinit",
            stable,
            lambda run: zero_bin_over_peak(run, "reinit"),
            expect_above(HALF),
            TWO_DIGITS,
        ),
    ]


def quantify_c8(scale: Scale) -> list[Quantity]:
    """Compare IMP's pruning threshold with its reinit's."""
    stable = (scale.make_resnet20_run(scale.stable),)
    return [
        Quantity(
            "threshold, IMP over reinit, medium sparsity",
            stable,
            lambda r: threshold_ratio(r, MEDIUM),
            expect_above(1),
            TWO_DIGITS,
        ),
        Quantity(
            "threshold, IMP over reinit, high sparsity",
            stable,
            lambda r: threshold_ratio(r, HIGH),
            expect_above(1),
            TWO_DIGITS,
        ),
    ]


def quantify_c9(scale: Scale) -> list[Quantity]:
    """Compare the threshold's peak and the plateau without and with weight decay."""
    runs = tuple(weight_decay.list_weight_decay_runs(scale))
    return [
        Quantity(
            "threshold's peak, without − with weight decay (rounds)",
            runs,
            lambda decay, none: threshold_peak_round(none) - threshold_peak_round(decay),
            expect_above(0),
        ),
        Quantity(
            "end of the plateau, without − with (rounds)",
            runs,
            lambda decay, none: plateau_end_round(none) - plateau_end_round(decay),
            expect_above(0),
        ),
    ]


def quantify_c10(scale: Scale) -> list[Quantity]:
    """Compare the barriers between successive optima across bands of sparsity."""
    stable = tuple(paths.list_stable_run(scale))
    return [
        Quantity(
            "barrier, medium sparsity (points)", stable, lambda r: barrier(r, MEDIUM), expect_below(CONNECTED)
        ),
        Quantity("barrier, low sparsity (points)", stable, lambda r: barrier(r, LOW), expect_above(CONNECTED)),
        Quantity(
            "barrier, very high sparsity (points)",
            stable,
            lambda r: barrier(r, VERY_HIGH),
            expect_above(CONNECTED),
        ),
    ]


def quantify_c11(scale: Scale) -> list[Quantity]:
    """Compare angles between neighbouring rounds and between rounds two apart."""
    runs = tuple(repellent.list_last_optimum_run(scale))

    def angle_apart(apart):
        return lambda run: angle(run, "imp", MEDIUM, HIGH, VERY_HIGH, apart=apart)

    return [
        Quantity("angle of neighbours, IMP", runs, angle_apart(1), expect_above(NEAR_ORTHOGONAL), TWO_DIGITS),
        Quantity("angle of rounds two apart, IMP", runs, angle_apart(2), expect_below(SMALL), TWO_DIGITS),
    ]


CLAIMS = (
    Claim("C1", "Stable IMP beats its reinit at medium and high sparsity", quantify_c1),
    Claim("C2", "At a small batch it does not", quantify_c2),
    Claim(
        "C3",
        "Instability is high where IMP fails, near zero where it wins; medium sparsity stabilises first",
        quantify_c3,
    ),
    Claim("C4", "Repulsion takes IMP down to the plain reinit, and leaves the reinit", quantify_c4),
    Claim("C5", "Attraction helps unstable IMP, but less than rewinding; it hurts the reinit", quantify_c5),
    Claim(
        "C6",
        "Angles are small for stable IMP, smallest at medium sparsity; near 1 for unstable IMP and reinit",
        quantify_c6,
    ),
    Claim("C7", "The weights of stable IMP have two modes at round 10, those of its reinit one", quantify_c7),
    Claim("C8", "IMP's threshold rises above its reinit's", quantify_c8),
    Claim(
        "C9",
        "Without weight decay the threshold collapses later, and the plateau is longer",
        quantify_c9,
    ),
    Claim(
        "C10",
        "Successive optima are linearly connected at medium sparsity, not at very low or high",
        quantify_c10,
    ),
    Claim("C11", "Repelled from the last optimum only, IMP goes back and forth between two", quantify_c11),
)
