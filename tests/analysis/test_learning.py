"""Early stopping from made-up curves of epochs.csv, and from a run of two rounds."""

import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis, runs
from imp_jax.analysis.learning import describe_learning, draw_learning, find_early_stopping
from imp_jax.workdir.epochs import FIELDS
from tests.conftest import make_tiny_config, make_tiny_dataset

NAN = float("nan")
FIGURE = analysis.FIGURES["learning"]  # before a fixture removes it


def make_curve(replicate, arm, number, test_losses, test_accuracies, validation_losses=None):
    """Make the rows of a training in epochs.csv."""
    validation_losses = validation_losses or [NAN] * len(test_losses)
    columns = zip(test_losses, test_accuracies, validation_losses, validation_losses, strict=True)
    return [(replicate, arm, number, epoch + 1, *values) for epoch, values in enumerate(columns)]


def make_epochs(*curves):
    return pd.DataFrame([row for curve in curves for row in curve], columns=list(FIELDS))


def test_early_stopping_is_at_the_first_lowest_validation_loss():
    epochs = make_epochs(
        make_curve(0, "imp", 0, [3, 2, 1], [0.5, 0.6, 0.7], [0.3, 0.1, 0.2]),
        make_curve(0, "reinit", 0, [3, 2, 1], [0.1, 0.2, 0.3], [0.2, 0.1, 0.1]),  # two are as low
        make_curve(0, "imp", 1, [1, 2, 3], [0.8, 0.9, 1.0], [NAN, 0.4, float("inf")]),
        make_curve(1, "imp", 1, [1, 2, 3], [0.8, 0.9, 1.0], [NAN, NAN, NAN]),
    )
    expected = [
        (0, "imp", 0, "validation", 2.0, 0.6),
        (0, "reinit", 0, "validation", 2.0, 0.2),
        (0, "imp", 1, "validation", 2.0, 0.9),
    ]
    assert list(find_early_stopping(epochs).itertuples(index=False, name=None)) == expected


def test_test_images_are_used_and_named_without_validation_images():
    epochs = make_epochs(make_curve(0, "imp", 0, [3, 1, 2], [0.5, 0.7, 0.6]))
    expected = [(0, "imp", 0, "test", 2.0, 0.7)]
    assert list(find_early_stopping(epochs).itertuples(index=False, name=None)) == expected


@pytest.fixture(scope="module")
def made_up():
    """Return the tables learning, epochs and results of two replicates, with four epochs in each round.

    In round n, the density is 4⁻ⁿ, the test accuracy after epoch e is 0.1 e + 0.01 n, and the losses are lowest
    after epoch n + r + 1, where r is the replicate.
    """
    curves, results = [], []
    for number in range(3):
        for arm in ("imp", "reinit"):
            for replicate in range(2):
                stop = number + replicate + 1
                accuracies = [0.1 * epoch + 0.01 * number for epoch in range(1, 5)]
                losses = [abs(epoch - stop) for epoch in range(1, 5)]
                curves.append(make_curve(replicate, arm, number, losses, accuracies, losses))
                results.append((replicate, arm, number, 0.25**number, accuracies[-1]))
    epochs = make_epochs(*curves)
    results = pd.DataFrame(results, columns=["replicate", "arm", "round", "density", "test_accuracy"])
    registered = analysis.ANALYSES["learning"]
    config = make_tiny_config()
    inputs = analysis.registry.RunInputs(results, {}, config, {}, None, None, None, epochs)
    return registered.make_table(registered.function(inputs)), epochs, results


def test_the_table_has_the_accuracy_at_the_end(made_up):
    learning, _, _ = made_up
    assert len(learning) == 12
    for row in learning.itertuples():
        assert row.early_stopping_epoch == row.round + row.replicate + 1
        assert row.early_stopping_accuracy == pytest.approx(0.1 * row.early_stopping_epoch + 0.01 * row.round)
        assert row.final_accuracy == pytest.approx(0.4 + 0.01 * row.round)


def test_the_figure_shows_curves_and_early_stopping_epochs(made_up):
    learning, epochs, results = made_up
    left, right = draw_learning(learning, epochs, results).axes
    lines = [line for line in left.lines if len(line.get_xdata()) == 4]
    assert [line.get_label() for line in lines] == ["100 %", "25 %", "6.25 %"]
    for number, line in enumerate(lines):
        np.testing.assert_allclose(line.get_ydata(), 10 * np.arange(1, 5) + number)
    circles = [line.get_xydata()[0] for line in left.lines if len(line.get_xdata()) == 1]
    np.testing.assert_allclose(circles, [(n + 1.5, 10 * (n + 1.5) + n) for n in range(3)])
    assert len(right.containers) == 2
    np.testing.assert_allclose(right.containers[0].lines[0].get_ydata(orig=False), [1.5, 2.5, 3.5])


def test_the_sentence_has_the_means_of_the_first_round_and_of_the_one_nearest_to_10_percent(made_up):
    learning, _, results = made_up
    assert describe_learning(learning, results) == (
        "imp reaches its lowest validation loss after 1.5 epochs at 100 % density and after 3.5 epochs at "
        "6.25 % density; there its test accuracy is 37.00 % at that epoch and 42.00 % at the end of the "
        "training."
    )
    one_round = learning[(learning["round"] == 0) & (learning["arm"] == "reinit")]  # as in a branch
    assert describe_learning(one_round, results) == (
        "reinit reaches its lowest validation loss after 1.5 epochs at 100 % density; there its test "
        "accuracy is 15.00 % at that epoch and 40.00 % at the end of the training."
    )


@pytest.mark.parametrize("evaluate", [True, False])
@pytest.mark.usefixtures("one_figure")
def test_a_run_is_analysed(tmp_path, monkeypatch, evaluate):
    """With `ends`, early stopping in deleted rounds stays known; without evaluation there is nothing."""
    config = make_tiny_config(rounds=4, evaluate_epochs=evaluate, keep_checkpoints="ends")
    monkeypatch.setattr(analysis, "setup", lambda config, use_mesh: runs.setup(config, make_tiny_dataset()))
    runs.run(config, tmp_path, dataset=make_tiny_dataset(), analyses=analysis)
    analysis.run(tmp_path)
    run = analysis.load(tmp_path)
    if evaluate:
        keys = ["replicate", "arm", "round"]
        assert not (tmp_path / "checkpoints" / "1").exists()
        assert set(run.learning["round"]) == {0, 1, 2, 3}
        expected, table = (
            frame.set_index(keys).sort_index() for frame in (find_early_stopping(run.epochs), run.learning)
        )
        pd.testing.assert_frame_equal(table[list(expected)], expected, check_dtype=False)
        assert set(table["split"]) == {"test"}
        assert FIGURE.draw(run) is not None
        assert "lowest test loss" in FIGURE.sentence(run)
    else:
        assert run.epochs.empty
        assert run.learning.empty
        assert FIGURE.draw(run) is None
