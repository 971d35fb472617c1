"""Figures 4, 5, 9 to 11, 18, 19, 21 and 22 (section 4): how similar the networks of pruning rounds are."""

from matplotlib.figure import Figure

from experiments.paper.panels import Finished, PaperFigure, draw_histograms, draw_matrices
from experiments.paper.scales import Scale
from experiments.paper.stabilisation import list_batch_size_runs, list_conv4_stability_runs
from experiments.sweeps.runs import Run

ARMS = {"imp": "IMP", "reinit": "reinitialisation"}


def list_fig4_runs(scale: Scale) -> list[Run]:
    """List the runs at the batch sizes of figure 4."""
    return [scale.make_resnet20_run(size) for size in scale.fig4_batch_sizes]


def list_unstable_and_stable_runs(scale: Scale) -> list[Run]:
    """List the runs at the unstable and at the stable batch size."""
    return [scale.make_resnet20_run(scale.unstable), scale.make_resnet20_run(scale.stable)]


def list_lenet_run(scale: Scale) -> list[Run]:
    """List LeNet's run."""
    return [scale.lenet]


def lay_out_panels(runs: list[Run]) -> list[list[tuple[str, Run, str]]]:
    """Return rows of (title, run, arm): one row per arm and one column per run.

    For a single run, IMP and its control are next to each other in one row.
    """
    if len(runs) == 1:
        return [[(words, runs[0], arm) for arm, words in ARMS.items()]]
    return [
        [(f"{words}, batch {run.config.batch_size}", run, arm) for run in runs] for arm, words in ARMS.items()
    ]


def _make_matrices(name, runs, metric="angular", shows="angles between rounds"):
    def draw(scale: Scale, finished: Finished) -> Figure:
        return draw_matrices(finished, lay_out_panels(runs(scale)), metric)

    return PaperFigure(name, shows, runs, draw)


def _make_histograms(name, runs):
    def draw(scale: Scale, finished: Finished) -> Figure:
        return draw_histograms(finished, lay_out_panels(runs(scale)))

    return PaperFigure(name, "histograms of the weights at 10.7 % density", runs, draw)


FIGURES = (
    _make_matrices("fig4", list_fig4_runs),
    _make_histograms("fig5", list_unstable_and_stable_runs),
    _make_matrices("fig9", list_batch_size_runs),
    _make_matrices("fig10", list_batch_size_runs, "cosine", "cosine distances between rounds"),
    _make_matrices("fig11", list_batch_size_runs, "euclidean", "Euclidean distances between rounds"),
    _make_matrices("fig18", list_lenet_run),
    _make_histograms("fig19", list_lenet_run),
    _make_matrices("fig21", list_conv4_stability_runs),
    _make_histograms("fig22", list_conv4_stability_runs),
)
