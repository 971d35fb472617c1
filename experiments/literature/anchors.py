"""Published accuracies of ResNet-20 on CIFAR-10, and our runs with the same training.

The numbers are the raw data of Renda, Frankle and Carbin 2020, "Comparing rewinding and fine-tuning in neural
network pruning": test accuracies in %, medians of 3 replicates. Epochs, batch size, learning rates, momentum,
L2 and the momentum of the running statistics are theirs. Two things differ: their shortcuts are projections
with BatchNorm at the start of each stage, ours have no weights; they standardise each image, we each channel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.literature.comparison import format_table
from experiments.paper.scales import SMOKE
from experiments.sweeps.runs import Run, make_run
from experiments.sweeps.sweep import Finished
from imp_jax.methods import METHODS

DENSE = 91.71  # standard deviation 0.23
TOLERANCE_POINTS = 0.5  # (ours) about two standard deviations of the dense network
DENSITIES_PCT = (80.0, 64.0, 51.2, 41.0, 32.8, 26.2, 21.0, 16.8, 13.4, 10.7)
AGREES, DIFFERS, NOT_RUN, NOT_COMPARABLE = "agrees", "differs", "not run", "not comparable"


class Anchor(NamedTuple):
    """A row of the published table.

    Attributes:
      words: the name of the method.
      method: its name in `imp_jax.methods`.
      arm: imp, or reinit for the control of the method.
      accuracies: by `DENSITIES_PCT`, in %.
    """

    words: str
    method: str
    arm: str
    accuracies: tuple[float, ...]


ANCHORS = (
    Anchor(
        "IMP to initialisation",
        "imp",
        "imp",
        (91.86, 91.31, 90.59, 90.53, 90.01, 89.60, 89.21, 88.56, 87.55, 86.67),
    ),
    Anchor(
        "weight rewinding, step 4,701",
        "rewind",
        "imp",
        (91.76, 91.76, 91.99, 91.83, 92.03, 91.64, 91.67, 91.31, 91.41, 91.00),
    ),
    Anchor(
        "learning-rate rewinding",
        "lrr",
        "imp",
        (92.11, 92.12, 92.29, 92.27, 92.12, 92.14, 91.89, 91.79, 91.47, 91.01),
    ),
    Anchor(
        "one-shot to initialisation",
        "oneshot",
        "imp",
        (91.14, 91.07, 90.69, 90.91, 90.18, 89.50, 89.18, 88.71, 87.51, 87.06),
    ),
    Anchor(
        "one-shot, reinit",
        "oneshot",
        "reinit",
        (91.17, 90.64, 90.48, 90.26, 89.70, 89.06, 88.49, 87.91, 87.46, 86.88),
    ),
)


class AnchorScale(NamedTuple):
    """The runs of a scale.

    Attributes:
      run: the run of IMP; the other methods have its recipe.
      rewind_step: of weight rewinding.
      comparable: whether its accuracies can be compared with the published ones.
    """

    run: Run
    rewind_step: int
    comparable: bool


_RECIPE = make_run(
    "resnet20",
    {
        "epochs": 182,
        "batch_size": 128,
        "optimizer.learning_rate": 0.1,
        "optimizer.milestones": (91, 136),
        "optimizer.weight_decay": 2e-4,
        "model.norm_affine": True,
        "model.norm_momentum": 0.997,
        "rounds": 1 + len(DENSITIES_PCT),
        "arms": ("imp",),
        "instability.rounds": (),
    },
)
SCALES = {
    "full": AnchorScale(_RECIPE, rewind_step=4701, comparable=True),
    "smoke": AnchorScale(
        SMOKE.trunk.with_overrides(rounds=3, arms=("imp",), instability__rounds=()), 2, comparable=False
    ),
}


def make_method_run(scale: AnchorScale, method: str) -> Run:
    """Return the run of a method; one-shot pruning has a reinit beside it."""
    fields = {"rewind_step": scale.rewind_step} if method == "rewind" else {}
    arms = tuple(anchor.arm for anchor in ANCHORS if anchor.method == method)
    return scale.run.with_overrides(METHODS[method] | fields, arms=arms)


def list_runs(scale: AnchorScale) -> list[Run]:
    """List one run per method."""
    return [make_method_run(scale, method) for method in dict.fromkeys(anchor.method for anchor in ANCHORS)]


class Row(NamedTuple):
    """One published number beside ours, both in %; ours is nan if it was not run."""

    words: str
    density: float
    ours: float
    theirs: float
    verdict: str


def compare(scale: AnchorScale, finished: Finished) -> list[Row]:
    """Compare our medians over replicates with the published numbers, for the rounds that the scale trains."""
    rows = [_compare_one(scale, finished, "dense", ANCHORS[0], 0, DENSE)]
    for anchor in ANCHORS:
        for number, theirs in enumerate(anchor.accuracies[: scale.run.rounds - 1], start=1):
            rows.append(_compare_one(scale, finished, anchor.words, anchor, number, theirs))
    return rows


def _compare_one(scale, finished, words, anchor, number, theirs):
    run, ours = make_method_run(scale, anchor.method), np.nan
    if run in finished:
        results = finished[run].results
        chosen = results[(results["arm"] == anchor.arm) & (results["round"] == number)]
        if len(chosen) == run.config.replicates:
            ours = 100 * chosen["test_accuracy"].median()
    verdict = AGREES if abs(ours - theirs) <= TOLERANCE_POINTS else DIFFERS
    if np.isnan(ours):
        verdict = NOT_RUN
    elif not scale.comparable:
        verdict = NOT_COMPARABLE
    return Row(words, 100 * (1 - run.config.pruning.fraction) ** number, ours, theirs, verdict)


def format_rows(rows: Sequence[Row]) -> str:
    """Return the comparison as a Markdown table."""
    columns = ("method", "density (%)", "ours (%)", "theirs (%)", "difference (points)", "verdict")
    cells = []
    for row in rows:
        ours, difference = (
            ("–", "–") if np.isnan(row.ours) else (f"{row.ours:.2f}", f"{row.ours - row.theirs:+.2f}")
        )
        cells.append((row.words, f"{row.density:.1f}", ours, f"{row.theirs:.2f}", difference, row.verdict))
    return format_table(columns, cells)
