"""How similar the networks of pruning rounds are (section 4, figures 4, 5, 9 to 11, 18, 19, 21, 22)."""

from matplotlib.figure import Figure

from experiments.paper.panels import Finished, PaperFigure, histograms, matrices
from experiments.paper.scales import Scale
from experiments.paper.stabilisation import over_batch_sizes, over_stability
from experiments.sweeps.runs import Run

ARMS = {"imp": "IMP", "reinit": "reinitialisation"}


def at_some_batch_sizes(scale: Scale) -> list[Run]:
    return [scale.batch(size) for size in scale.compared]


def unstable_and_stable(scale: Scale) -> list[Run]:
    return [scale.batch(scale.unstable), scale.batch(scale.stable)]


def of_lenet(scale: Scale) -> list[Run]:
    return [scale.lenet]


def layout(runs: list[Run]) -> list[list[tuple[str, Run, str]]]:
    """A row an arm, a column a run of some batch size; of one run, IMP and its control side by side."""
    if len(runs) == 1:
        return [[(words, runs[0], arm) for arm, words in ARMS.items()]]
    return [
        [(f"{words}, batch {run.config.batch_size}", run, arm) for run in runs] for arm, words in ARMS.items()
    ]


def _matrices(id, runs, metric="angular", shows="angles between rounds"):
    def draw(scale: Scale, finished: Finished) -> Figure:
        return matrices(finished, layout(runs(scale)), metric)

    return PaperFigure(id, shows, runs, draw)


def _histograms(id, runs):
    def draw(scale: Scale, finished: Finished) -> Figure:
        return histograms(finished, layout(runs(scale)))

    return PaperFigure(id, "histograms of the weights after round 10", runs, draw)


FIGURES = (
    _matrices("fig4", at_some_batch_sizes),
    _histograms("fig5", unstable_and_stable),
    _matrices("fig9", over_batch_sizes),
    _matrices("fig10", over_batch_sizes, "cosine", "cosine distances between rounds"),
    _matrices("fig11", over_batch_sizes, "euclidean", "Euclidean distances between rounds"),
    _matrices("fig18", of_lenet),
    _histograms("fig19", of_lenet),
    _matrices("fig21", over_stability),
    _histograms("fig22", over_stability),
)
