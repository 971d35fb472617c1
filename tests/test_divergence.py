"""Detection of divergence from metrics, and whole runs with members that diverge."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis, divergence, training
from imp_jax.errors import UserError
from tests.conftest import quick_config
from tests.helpers.rounds import run

STEPS = 4  # per epoch


def make_history(losses, accuracies, cuts=()):
    """Return the history of metrics [steps, members], read in chunks that end with each epoch and at `cuts`."""
    losses, accuracies = (np.array(values, np.float32) for values in (losses, accuracies))
    history = divergence.init_history(losses.shape[1])
    ends = sorted({*range(0, len(losses) + 1, STEPS), *cuts})
    for first, last in itertools.pairwise(ends):
        history = divergence.update_history(history, losses[first:last], accuracies[first:last], first, STEPS)
    return history


@pytest.mark.parametrize("cuts", [(), (1, 3, 5), (2, 6, 7)])
def test_history_has_the_means_of_the_last_epoch_for_any_chunks(cuts):
    losses, accuracies = np.random.default_rng(0).random((2, 8, 3), np.float32)
    history = make_history(losses, accuracies, cuts)
    np.testing.assert_allclose(history.loss, losses[4:].mean(0), rtol=1e-6)
    np.testing.assert_allclose(history.accuracy, accuracies[4:].mean(0), rtol=1e-6)
    best = np.maximum(accuracies[:4].mean(0), accuracies[4:].mean(0))
    np.testing.assert_allclose(history.best_accuracy, best, rtol=1e-6)
    assert history.broken_at.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("cuts", [(), (3,), (6, 7)])
def test_history_has_the_first_step_with_a_non_finite_loss(cuts):
    losses = np.ones((8, 4))
    losses[5:, 1], losses[2, 2], losses[7, 3] = np.nan, np.inf, -np.inf
    history = make_history(losses, np.ones((8, 4)), cuts)
    assert history.broken_at.tolist() == [-1, 5, 2, 7]
    assert {i: step for i, (step, _) in divergence.non_finite_members(history).items()} == {1: 5, 2: 2, 3: 7}
    assert "nan or infinite" in divergence.non_finite_members(history)[1][1]


def test_diverged_members_are_found_at_the_end_of_training():
    accuracies = np.zeros((8, 6))
    accuracies[:4] = [0.9, 0.9, 0.24, 0.9, 0.9, 0.1]
    accuracies[4:] = [0.9, 0.12, 0.12, 0.13, 0.1, 0.1]  # chance is 0.1
    losses = np.ones((8, 6))
    losses[6, 4] = np.nan
    found = divergence.diverged_members(
        make_history(losses, accuracies), [1, 1, 1, 1, 1, np.nan], classes=10, steps=8
    )
    # 1 dropped to chance; 2 never learned; 3 is above chance; 4 has a nan loss; 5 has one after training
    assert {i: step for i, (step, _) in found.items()} == {1: 8, 4: 6, 5: 8}
    assert found[1][1] == "the accuracy fell to 12.0% after 90.0%"


# --- in whole runs, on mnist5k ---


def break_in_round_1(monkeypatch, indices, value=np.nan):
    """Replace the weights of the members at `indices` by `value` after the first epoch of round 1."""
    train = training.train_and_evaluate
    calls = itertools.count()

    def train_and_break(states, *args, **kwargs):
        states, metrics, evaluations = train(states, *args, **kwargs)
        members = len(metrics.loss[0])
        if next(calls) == 3:  # calls 0 to 2 are the epochs of round 0
            is_broken = jnp.isin(jnp.arange(members), jnp.array(indices))
            states = states._replace(
                params=jax.tree.map(
                    lambda p: jnp.where(is_broken.reshape(-1, *[1] * (p.ndim - 1)), value, p), states.params
                )
            )
        return states, metrics, evaluations

    monkeypatch.setattr(training, "train_and_evaluate", train_and_break)


def test_divergence_stops_the_run_and_is_recorded(data_dir, tmp_path, monkeypatch):
    config = quick_config(data_dir, epochs=3, replicates=2)
    break_in_round_1(monkeypatch, [1, 2])
    with pytest.raises(
        UserError,
        match=r"nan or infinite in round 1, arm imp, replicate 1, at step 8 .* rounds 0 to 0 finished",
    ):
        run(config, tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0] * 4
    lines = (tmp_path / "divergences.csv").read_text().splitlines()
    broken = ["1,imp,1,8,the loss became nan or infinite", "0,reinit,1,8,the loss became nan or infinite"]
    assert lines == ["replicate,arm,round,step,what", *broken]


@pytest.mark.parametrize(
    ("broken", "in_round_1", "in_round_2"),
    [
        ([1], [("imp", 0), ("reinit", 0), ("reinit", 1)], [("imp", 0), ("reinit", 0)]),  # imp, replicate 1
        ([2, 4], [("imp", 0), ("imp", 1), ("reinit", 1), ("twin", 1)], [("imp", 0), ("imp", 1), ("reinit", 1)]),
    ],
)
def test_member_with_a_nan_loss_is_dropped(
    data_dir, tmp_path, monkeypatch, one_figure, broken, in_round_1, in_round_2
):
    """If it is imp, whose mask all arms use, its whole replicate ends. Other members do not change."""
    config = quick_config(data_dir, epochs=3, replicates=2, on_divergence="drop")
    config.model.width, config.analysis.path_points = 0.1, 3
    config.instability.rounds = (1,) if 4 in broken else ()
    config.repulsion.strength = 2.0 if 4 in broken else 0.0
    run(config, tmp_path / "healthy")
    break_in_round_1(monkeypatch, broken)
    run(config, tmp_path / "run")
    results = pd.read_csv(tmp_path / "run" / "results.csv")
    members = {
        n: list(zip(rows["arm"], rows["replicate"], strict=True)) for n, rows in results.groupby("round")
    }
    assert members[1] == in_round_1
    assert members[2] == in_round_2
    keys = ["arm", "replicate", "round"]
    healthy = pd.read_csv(tmp_path / "healthy" / "results.csv").merge(results[keys], on=keys)
    columns = ["density", "threshold", "test_loss", *(["repulsion"] if config.repulsion.strength else [])]
    np.testing.assert_allclose(results[columns], healthy[columns], rtol=2e-3)
    divergences = pd.read_csv(tmp_path / "run" / "divergences.csv")
    assert len(divergences) == len(broken)
    assert (divergences["step"] == 8).all()

    analysis.run(tmp_path / "run")
    analysed = analysis.load(tmp_path / "run")
    assert analysed.members(1) == tuple(in_round_1)
    rounds = analysed.distances.groupby(["arm", "replicate"])["round_a"].unique()
    for member in members[0]:
        assert rounds[member].tolist() == [-1, *(n for n in range(3) if member in members[n])]
    successive = analysed.barriers.query("kind == 'successive' and split == 'test'").groupby("round")[
        "replicate"
    ]
    assert successive.unique().map(list).to_dict() == {
        n: [r for arm, r in members[n] if arm == "imp"] for n in (1, 2)
    }

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")  # to resume without the member
    ends = []
    run(config, tmp_path / "run", on_round=[ends.append])
    (end,) = ends
    assert [(row["arm"], row["replicate"]) for row in end.rows] == in_round_2
    resumed = pd.read_csv(tmp_path / "run" / "results.csv")
    np.testing.assert_allclose(resumed[columns], results[columns], rtol=1e-4)


def test_saved_optima_are_those_of_the_members_left(data_dir, tmp_path, monkeypatch):
    """A run that keeps only its first and last rounds resumes from the optima that it has saved."""
    config = quick_config(data_dir, epochs=3, rounds=4, replicates=2, on_divergence="drop")
    config.update_from_flattened_dict(
        {"keep_checkpoints": "ends", "repulsion.strength": 2.0, "model.width": 0.1}
    )
    break_in_round_1(monkeypatch, [1])  # imp of replicate 1
    run(config, tmp_path)
    columns = ["replicate", "arm", "density", "test_loss", "repulsion", "cosine"]
    results = pd.read_csv(tmp_path / "results.csv")
    assert results.query("round == 3")["replicate"].tolist() == [0, 0]
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "2"]
    run(config, tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv")[columns], results[columns])


def test_member_that_drops_to_chance_is_dropped(data_dir, tmp_path, monkeypatch):
    fields = {"on_divergence": "drop", "model.width": 1.0}  # a narrow network does not learn enough to drop
    config = quick_config(data_dir, epochs=3, rounds=2, replicates=2, **fields)
    break_in_round_1(monkeypatch, [3], value=0.0)  # then only the output bias has a gradient
    run(config, tmp_path)
    (line,) = pd.read_csv(tmp_path / "divergences.csv").to_dict("records")
    assert (line["arm"], line["replicate"], line["round"], line["step"]) == ("reinit", 1, 1, 24)
    assert line["what"].startswith("the accuracy fell to ")


def test_run_ends_if_all_tickets_diverge(data_dir, tmp_path, monkeypatch):
    config = quick_config(data_dir, epochs=3, on_divergence="drop")
    break_in_round_1(monkeypatch, [0])
    with pytest.raises(UserError, match=r"no ticket is left: all have diverged, the last in round 1"):
        run(config, tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["round"].tolist() == [0, 0]
