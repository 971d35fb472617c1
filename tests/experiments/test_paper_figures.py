"""The figures and tables of the paper, drawn from made-up tables."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.paper import catalogue, commands
from experiments.paper.catalogue import list_runs
from experiments.paper.panels import NOT_RUN
from experiments.paper.scales import MINI, PAPER, SMOKE
from imp_jax import figures
from tests.helpers.tables import tables

PANELS = {  # number of panels at the paper's scale
    **{f"fig{n}": 6 for n in (1, 6)},
    **{f"fig{n}": 1 for n in (2, 13, 14, 20, 23)},
    **{f"fig{n}": 2 for n in (3, 7, 8, 12, 15, 17, 18, 19)},
    **{f"fig{n}": 4 for n in (5, 16, 21, 22)},
    "fig4": 6,
    **{f"fig{n}": 12 for n in (9, 10, 11)},
}
FIGURES = [name for name in catalogue.FIGURES if name.startswith("fig")]


@pytest.fixture(scope="module")
def finished():
    """Return made-up tables of all runs of the scales `PAPER` and `MINI`, by run."""
    return {run: tables(run) for scale in (PAPER, MINI) for run in list_runs(catalogue.FIGURES.values(), scale)}


def list_panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def list_texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_with_all_panels(name, finished):
    figure = catalogue.FIGURES[name].draw(PAPER, finished)
    assert isinstance(figure, Figure)
    assert len(list_panels(figure)) == PANELS[name]
    assert NOT_RUN not in list_texts(figure)
    assert figures.to_bytes(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", FIGURES)
def test_panels_of_missing_runs_show_not_run(name, finished):
    figure = catalogue.FIGURES[name]
    assert list_texts(figure.draw(MINI, {})) == [NOT_RUN] * len(list_panels(figure.draw(MINI, finished)))
    first = figure.runs(MINI)[0]
    one_round = {first: tables(first, rounds=1)}  # no barrier between rounds yet
    figures.to_bytes(figure.draw(MINI, one_round))


def test_figure_1_shows_means_and_ranges_of_the_replicates():
    def accuracy(arm, replicate, number):
        return 0.5 + 0.1 * replicate**2 - 0.02 * number - 0.3 * (arm == "reinit")

    runs = catalogue.FIGURES["fig1"].runs(PAPER)
    figure = catalogue.FIGURES["fig1"].draw(PAPER, {run: tables(run, accuracy=accuracy) for run in runs})
    assert [axes.get_title() for axes in list_panels(figure)] == [f"batch size {n}" for n in PAPER.batch_sizes]
    for axes in list_panels(figure):
        imp, reinit, warm_imp, _ = axes.containers
        assert [bars[0].get_linestyle() for bars in axes.containers] == ["-", "--", "-", "--"]
        assert imp.get_label() == "no warm-up, IMP"
        assert warm_imp.get_label() == "10 epochs of warm-up, IMP"
        density, mean = imp[0].get_data(orig=False)
        np.testing.assert_allclose(density, 0.8 ** np.arange(25))
        np.testing.assert_allclose(mean, 100 * (0.5 + 0.1 * 5 / 3 - 0.02 * np.arange(25)))
        low_to_high = np.array([segment[:, 1] for segment in imp[2][0].get_segments()])
        np.testing.assert_allclose(low_to_high, np.stack([50 - 2 * np.arange(25), 90 - 2 * np.arange(25)], 1))
        np.testing.assert_allclose(reinit[0].get_ydata(orig=False), mean - 30)


def test_the_y_axis_ends_15_points_below_the_best_accuracy():
    plain, repelled = catalogue.FIGURES["fig14"].runs(PAPER)
    failing = tables(repelled, accuracy=lambda arm, r, n: 0.9 - 0.03 * n)
    (axes,) = catalogue.FIGURES["fig14"].draw(PAPER, {plain: tables(plain), repelled: failing}).axes
    assert axes.get_ylim() == pytest.approx((92 - 15 - 1, 92 + 1))
    (axes,) = catalogue.FIGURES["fig14"].draw(PAPER, {plain: tables(plain)}).axes
    assert axes.get_ylim() == pytest.approx((90 - 1, 92 + 1))


def test_no_value_is_clipped_if_most_are_far_below_the_best_accuracy():
    plain = catalogue.FIGURES["fig14"].runs(PAPER)[0]
    falling = tables(plain, accuracy=lambda arm, r, n: 0.9 - 0.03 * n)
    (axes,) = catalogue.FIGURES["fig14"].draw(PAPER, {plain: falling}).axes
    assert axes.get_ylim() == pytest.approx((90 - 3 * 24 - 1, 90 + 1))


def test_an_empty_panel_does_not_remove_the_axes_of_the_others():
    runs = catalogue.FIGURES["fig12"].runs(PAPER)
    first, second = catalogue.FIGURES["fig12"].draw(PAPER, {runs[0]: tables(runs[0])}).axes
    assert list_texts(second.figure) == [NOT_RUN]
    assert len(first.get_yticks()) > 2


def test_figure_2_has_one_line_per_round_over_batch_sizes():
    runs = catalogue.FIGURES["fig2"].runs(PAPER)
    finished = {
        run: tables(run, instability=lambda n, run=run: 1e-5 * n * run.config.batch_size) for run in runs[1:]
    }
    (axes,) = catalogue.FIGURES["fig2"].draw(PAPER, finished).axes
    for number, bars in zip((5, 10, 15), axes.containers, strict=True):
        sizes, points = bars[0].get_data(orig=False)
        np.testing.assert_allclose(sizes, PAPER.batch_sizes[1:])  # without the first, which was not run
        np.testing.assert_allclose(points, 1e-3 * number * sizes)
        assert bars.get_label() == f"round {number}"


def test_distance_matrices_have_the_rounds_in_order_and_the_initialisation_last():
    (run,) = catalogue.FIGURES["fig18"].runs(PAPER)
    figure = catalogue.FIGURES["fig18"].draw(
        PAPER, {run: tables(run, angle=lambda arm, a, b: 0.01 * abs(a - b))}
    )
    for axes in list_panels(figure):
        matrix = axes.images[0].get_array()
        assert matrix.shape == (26, 26)
        assert matrix[3, 7] == pytest.approx(0.04)
        assert matrix[25, 7] == pytest.approx(0.08)  # the initialisation
        assert axes.images[0].get_clim() == (0, 1)


def test_distance_matrices_of_several_runs_share_a_colour_scale():
    runs = catalogue.FIGURES["fig11"].runs(PAPER)
    finished = {run: tables(run, angle=lambda *_, run=run: float(run.config.batch_size)) for run in runs}
    figure = catalogue.FIGURES["fig11"].draw(PAPER, finished)
    assert {axes.images[0].get_clim() for axes in list_panels(figure)} == {(0, 4096)}


def test_figure_8_shows_the_barrier_at_every_density():
    (run,) = catalogue.FIGURES["fig8"].runs(PAPER)
    left, right = catalogue.FIGURES["fig8"].draw(PAPER, {run: tables(run, barrier=lambda n: 0.001 * n)}).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        *("100 → 80 %", "13 → 11 %", "1.8 → 1.4 %"),
    ]
    (test,) = right.containers
    np.testing.assert_allclose(test[0].get_ydata(orig=False), 0.1 * np.arange(1, 25))


def test_table_1_lists_parameters_and_hyperparameters():
    lines = catalogue.FIGURES["table1"].draw(PAPER, {}).splitlines()
    assert lines[2].startswith("| LeNet-300-100 | mnist | 266,610 | 25 | 60 | adam | 0.0012 | constant |")
    assert lines[3].startswith("| ResNet-20 | cifar10 | 268,346 | 85 | 128 | momentum | 0.1 | ÷10 at 56, 71 |")
    assert lines[4].startswith("| Conv-4 | cifar10 | 2,425,930 | 75 | 128 | momentum | 0.01 | cosine |")
    assert lines[5].endswith("| ÷10 at 30, 60, 80 | Kaiming normal | 1e-05 | one-shot (30%) |")


def test_the_table_of_appendix_c_has_the_loss_of_accuracy_from_one_pruning_step():
    first, _ = catalogue.FIGURES["tablec"].runs(MINI)
    first_tables = tables(first, accuracy=lambda arm, r, n: 0.7 + 0.01 * r - 0.02 * n * (1 + r))
    lines = catalogue.FIGURES["tablec"].draw(MINI, {first: first_tables}).splitlines()
    assert lines[2] == "| 0.02 | 71.0 (70.0 to 72.0) % | -4.0 (-6.0 to -2.0) points |"
    assert lines[3] == f"| 0.005 | {NOT_RUN} | {NOT_RUN} |"
    lines = catalogue.FIGURES["tablec"].draw(MINI, {first: tables(first, rounds=1)}).splitlines()
    assert lines[2].endswith(f"% | {NOT_RUN} |")


def test_describe_names_the_scale_and_the_trainings_of_a_figure():
    figure = catalogue.FIGURES["fig14"]
    plain, _ = figure.runs(MINI)
    note = commands.describe(figure, MINI, [plain])
    assert note.startswith("scale mini: LeNet-300-100 on mnist5k, 20 epochs, 3 replicates; scale paper: LeNet")
    assert note.endswith("; 1 of 2 runs not finished")
    assert commands.describe(figure, PAPER, []) == "LeNet-300-100 on mnist, 25 epochs, 3 replicates"
    assert "1 epoch," in commands.describe(figure, SMOKE, [])
