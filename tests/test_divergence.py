import itertools

import numpy as np
import pytest

from imp_jax import divergence

STEPS = 4  # an epoch


def seen_of(losses, accuracies, cuts=()):
    """What is seen of [steps, members] in chunks that end at epochs and `cuts`."""
    losses, accuracies = (np.array(values, np.float32) for values in (losses, accuracies))
    seen = divergence.init_history(losses.shape[1])
    ends = sorted({*range(0, len(losses) + 1, STEPS), *cuts})
    for first, last in itertools.pairwise(ends):
        seen = divergence.update_history(seen, losses[first:last], accuracies[first:last], first, STEPS)
    return seen


@pytest.mark.parametrize("cuts", [(), (1, 3, 5), (2, 6, 7)])
def test_means_are_of_the_latest_epoch_however_it_is_cut(cuts):
    losses, accuracies = np.random.default_rng(0).random((2, 8, 3), np.float32)
    seen = seen_of(losses, accuracies, cuts)
    np.testing.assert_allclose(seen.loss, losses[4:].mean(0), rtol=1e-6)
    np.testing.assert_allclose(seen.accuracy, accuracies[4:].mean(0), rtol=1e-6)
    best = np.maximum(accuracies[:4].mean(0), accuracies[4:].mean(0))
    np.testing.assert_allclose(seen.best_accuracy, best, rtol=1e-6)
    assert seen.broken_at.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("cuts", [(), (3,), (6, 7)])
def test_the_first_broken_step_is_known(cuts):
    losses = np.ones((8, 4))
    losses[5:, 1], losses[2, 2], losses[7, 3] = np.nan, np.inf, -np.inf
    seen = seen_of(losses, np.ones((8, 4)), cuts)
    assert seen.broken_at.tolist() == [-1, 5, 2, 7]
    assert {i: step for i, (step, _) in divergence.non_finite_members(seen).items()} == {1: 5, 2: 2, 3: 7}
    assert "nan or infinite" in divergence.non_finite_members(seen)[1][1]


def test_a_training_that_is_over_is_judged_by_its_end():
    accuracies = np.zeros((8, 6))
    accuracies[:4] = [0.9, 0.9, 0.24, 0.9, 0.9, 0.1]
    accuracies[4:] = [0.9, 0.12, 0.12, 0.13, 0.1, 0.1]  # of 10 classes
    losses = np.ones((8, 6))
    losses[6, 4] = np.nan
    found = divergence.diverged_members(
        seen_of(losses, accuracies), [1, 1, 1, 1, 1, np.nan], classes=10, steps=8
    )
    # 1 fell to chance; 2 had never learnt; 3 is above chance; 4 broke before; 5 broke with its last step
    assert {i: step for i, (step, _) in found.items()} == {1: 8, 4: 6, 5: 8}
    assert found[1][1] == "the accuracy fell to 12.0% after 90.0%"
