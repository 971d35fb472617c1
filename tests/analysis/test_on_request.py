"""What analyses on request share."""

import contextlib

import jax
import numpy as np
import pytest

from imp_jax import analysis
from imp_jax.analysis.computation import NetworkReader
from imp_jax.analysis.on_request import replay_round, take_batches, trained_epochs
from imp_jax.analysis.registry import RunInputs
from imp_jax.members import Member
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_experiment
from tests.helpers import on_request
from tests.helpers.rounds import assert_trees_equal


def test_batches_are_whole_and_without_repetition():
    experiment = make_tiny_experiment()
    for images, batch_size, shape in ((20, 8, (2, 8)), (3, 8, (1, 8)), (1000, 8, (5, 8)), (46, 46, (1, 46))):
        batches, labels = take_batches(experiment, images, batch_size)
        assert labels.shape == shape
        assert batches.shape == (*shape, 4, 4, 1)
        expected_images, expected_labels = on_request.subset(labels.size)
        np.testing.assert_array_equal(batches.reshape(-1, 4, 4, 1), expected_images * 255)
        np.testing.assert_array_equal(labels.ravel(), expected_labels)
        assert len(np.unique(batches.reshape(-1, 16), axis=0)) == labels.size


def test_a_round_is_repeated_from_its_checkpoint_with_the_statistics_of_batchnorm(tmp_path):
    """With `rewind_step=None`, round 1 starts with the statistics of the end of round 0."""
    overrides = {"model.name": "normalized", "rewind_step": None, "arms": ("imp",), "rounds": 2}
    run = analysis.load(on_request.train(tmp_path / "run", **overrides))
    experiment = on_request.make_experiment(run.config)
    members = {number: run.members(number) for number in range(2)}
    with contextlib.closing(Checkpoints(run.workdir)) as checkpoints:
        reader = NetworkReader(checkpoints, run.config, lambda: experiment, run.results, members)
        inputs = RunInputs(
            run.results, {}, run.config, members, reader.read_all, lambda: experiment, reader.read_once
        )
        replicates, masks, states = replay_round(inputs, 1, [10])
    networks = jax.tree.map(np.asarray, run.round(1))
    assert [Member("imp", replicate) for replicate in replicates] == list(run.members(1))
    assert_trees_equal(masks, networks.mask)
    assert_trees_equal(states[10].states.variables, networks.trained)
    assert networks.initial["batch_stats"]["BatchNorm_0"]["mean"].any()


@pytest.mark.parametrize("policy", ["short", "evidence"])
def test_short_rounds_are_repeated_with_their_own_schedule(tmp_path, policy):
    """Under evidence they also start from the trained weights, without a rewind step."""
    fields = {
        "retraining.policy": policy,
        "retraining.epochs": 1,
        "optimizer.schedule": "cosine",
        "rewind_step": 3,
    }
    if policy == "evidence":
        fields["retraining.barrier"] = 1.0  # every round after round 1 is short
    on_request.train(tmp_path, rounds=3, **fields)
    replayed = {}

    def replay(inputs):
        for number in range(3):
            steps = 5 * trained_epochs(inputs, number)
            replayed[number] = steps, replay_round(inputs, number, [steps])[2][steps].states.variables
        return []

    analysis.register("replayed", replay, columns=("value",), needs="run", cost=lambda inputs: 1)
    try:
        run = on_request.compute(tmp_path, "replayed")
    finally:
        del analysis.ANALYSES["replayed"]
    assert [steps for steps, _ in replayed.values()] == {"short": [10, 5, 5], "evidence": [10, 10, 5]}[policy]
    for number, (_, variables) in replayed.items():
        for replicate in (0, 1):
            trained = on_request.network(run, number, "imp", replicate).trained
            assert_trees_equal(jax.tree.map(lambda leaf: leaf[replicate], variables), trained)  # noqa: B023
