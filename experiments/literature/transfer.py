"""Masks and tickets of one training used in another: between seeds, and between true and random labels.

A mask with the weights of another seed should be as good as a reinit, which is the same. It is an open question
whether a mask found with random labels is useful for true labels, and a ticket of true labels for random ones.
"""

from matplotlib.figure import Figure

from experiments.literature.comparison import (
    NO_BETTER_THAN_REINIT,
    Comparison,
    Series,
    draw_series,
    format_comparisons,
)
from experiments.literature.controls import style_series
from experiments.paper.panels import (
    GREEN,
    Finished,
    PaperFigure,
    add_common_legend,
    make_grid,
)
from experiments.paper.scales import Scale
from experiments.sweeps.runs import AnyRun, Branch, Run

PURPLE = "#CC79A7"
SEED = 1  # of the other run; the trunk has seed 0
OTHER_SEED = "IMP's mask of another seed"
RANDOM_LABELS = "IMP's mask of random labels"
TRUE_LABELS = "IMP's ticket of true labels"
STYLES = {
    OTHER_SEED: {"color": GREEN, "linestyle": "-.", "marker": "^"},
    RANDOM_LABELS: {"color": PURPLE, "linestyle": "-.", "marker": "d"},
    TRUE_LABELS: {"color": PURPLE, "linestyle": "--", "marker": "d"},
}


def make_other_seed_run(scale: Scale) -> Run:
    """Return the run of another seed."""
    return scale.trunk.with_overrides(seed=SEED, arms=("imp",), instability__rounds=())


def make_random_labels_run(scale: Scale) -> Run:
    """Return the run on random labels, with the initialisations of the trunk."""
    return scale.trunk.with_overrides(dataset__labels="random", instability__rounds=())


def make_branches(scale: Scale) -> tuple[Branch, Branch, Branch]:
    """Return three branches of the trunk.

    They train its tickets under masks of another seed, under masks of random labels, and on random labels.
    """
    numbers = scale.trunk_rounds
    return (
        Branch(scale.trunk, "mask_of_other_seed", ("imp",), numbers, make_other_seed_run(scale)),
        Branch(scale.trunk, "mask_of_random_labels", ("imp",), numbers, make_random_labels_run(scale)),
        Branch(scale.trunk, "on_random_labels", ("imp",), numbers, overrides=(("dataset.labels", "random"),)),
    )


def list_runs(scale: Scale) -> list[AnyRun]:
    """List the runs and the branches."""
    runs = (scale.trunk, make_other_seed_run(scale), make_random_labels_run(scale))
    return [*runs, *make_branches(scale)]


def draw(scale: Scale, finished: Finished) -> Figure:
    """Draw the test accuracy on true labels, and the training accuracy on random ones."""
    figure, (left, right) = make_grid(2, columns=2, width=4, height=3.2, sharey=False)
    random_labels = make_random_labels_run(scale)
    other_seed, mask_of_random, on_random = make_branches(scale)
    references = [style_series(arm, Series(scale.trunk, arm)) for arm in ("imp", "reinit")]
    others = {OTHER_SEED: Series(other_seed), RANDOM_LABELS: Series(mask_of_random)}
    others = [(label, series, STYLES[label]) for label, series in others.items()]
    draw_series(left, finished, references + others)
    left.set_title("trained on true labels", fontsize="medium")
    references = [style_series(arm, Series(random_labels, arm, "train_accuracy")) for arm in ("imp", "reinit")]
    ticket = (TRUE_LABELS, Series(on_random, "imp", "train_accuracy"), STYLES[TRUE_LABELS])
    draw_series(right, finished, [*references, ticket], y_range_points=100)
    right.set_title("trained on random labels", fontsize="medium")
    add_common_legend(figure, columns=3)
    return figure


def compare(scale: Scale) -> list[Comparison]:
    """Compare the transfers with imp and its reinit where the mask or the ticket is used."""
    other_seed, mask_of_random, on_random = (Series(branch) for branch in make_branches(scale))
    trunk = [Series(scale.trunk, arm) for arm in ("imp", "reinit")]
    random_labels = [Series(make_random_labels_run(scale), arm, "train_accuracy") for arm in ("imp", "reinit")]
    numbers = scale.trunk_rounds
    on_random = on_random._replace(column="train_accuracy")
    return [
        Comparison("IMP", trunk[0], *trunk, numbers),
        Comparison("reinit", trunk[1], *trunk, numbers),
        Comparison(OTHER_SEED, other_seed, *trunk, numbers, NO_BETTER_THAN_REINIT),
        Comparison(RANDOM_LABELS, mask_of_random, *trunk, numbers),
        Comparison("on random labels, training accuracy: IMP", random_labels[0], *random_labels, numbers),
        Comparison("the same: reinit", random_labels[1], *random_labels, numbers),
        Comparison(f"the same: {TRUE_LABELS}", on_random, *random_labels, numbers),
    ]


def tabulate(scale: Scale, finished: Finished) -> str:
    """Return the table of all transfers."""
    return format_comparisons(compare(scale), finished)


FIGURES = (
    PaperFigure("transfer", "accuracy, masks and tickets of other seeds and labels", list_runs, draw, tabulate),
)
