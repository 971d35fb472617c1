"""Several processes: two that train together on this machine, by gloo."""

import json
import signal
import socket
import time

import jax
import numpy as np
import pandas as pd
import pytest

from imp_jax import data, divergence, runs
from imp_jax.errors import UserError
from imp_jax.runtime import distributed
from imp_jax.workdir.checkpoints import Checkpoints, MidRoundState
from tests.conftest import quick_config
from tests.helpers import folders, in_processes
from tests.helpers.processes import Processes

OF_BOTH = in_processes.SEEDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both have left what they found."""
    path = tmp_path_factory.mktemp("processes")
    folders.write_imagenet(path)
    with Processes(2, ["-m", "tests.helpers.in_processes", path]) as both:
        for status, _, said in both.ended():
            assert status == 0, said
    return path


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"found-{process}.json").read_text()) for process in (0, 1)]


def test_all_hear_of_an_error_and_one_says_it(found):
    assert [of["most"] for of in found] == [10, 10]
    assert [of["same"] for of in found] == [[True, False, True]] * 2
    assert found[0]["errors"] == ["", "RemoteUserError: process 1: not here, 1", "UserError: not here, 0"]
    assert found[1]["errors"] == ["", "UserError: not here, 1", "RemoteUserError: process 0: not here, 0"]


def test_nobody_waits_in_the_shutdown_of_jax(folder):
    """It ends a process that has to wait there for more than five minutes."""
    (first, _), (other, shutdown) = (json.loads((folder / f"left-{p}.json").read_text()) for p in (0, 1))
    assert other < first <= shutdown


@pytest.mark.parametrize("mesh", ["members", "data"])
def test_each_decodes_its_part_of_a_stream(folder, found, mesh):
    """And what all have together is the stream of one process."""
    dataset = data.load("imagenet2012", folder, image_side=8, workers=0)
    images, labels = zip(*dataset.train.training_batches(OF_BOTH, 1, 4), strict=True)
    steps, members, batch = np.shape(labels)
    assert (steps, members, batch) == (3, 2, 4)
    for of in found:
        assert of[mesh]["labels"] == np.stack(labels).tolist()
        assert of[mesh]["images"] == np.stack(images).astype(int).sum((3, 4, 5)).tolist()
        assert of[mesh]["decoded"] == steps * members * batch // 2
        views = [labels for _, labels in dataset.test.evaluation_batches(4, np.arange(8) % 6)]
        assert of[mesh]["views"] == np.stack(views).tolist()
        # along "data" a batch is divided; along "member" all see it
        assert of[mesh]["viewed"] == (4 if mesh == "data" else 8)


def test_checkpoints_are_written_by_all_and_read_by_one(folder):
    networks = folder / "checkpoints" / "0" / "networks"
    for process in (0, 1):
        parts = (networks / f"ocdbt.process_{process}" / "d").iterdir()
        assert sum(part.stat().st_size for part in parts) > 0
    checkpoints = Checkpoints(folder)  # which compares their checksums
    restored = checkpoints.restore(0)
    expected = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(restored.trained["params"]["kernel"], expected)
    np.testing.assert_array_equal(restored.mask["params"]["kernel"], expected > 1)
    like = MidRoundState(0, restored.initial, restored.initial, divergence.init_history(2), 0.0)
    progress = checkpoints.progress(1, like, 10)
    assert (progress.step, progress.seconds) == (3, 0.5)
    jax.tree.map(np.testing.assert_array_equal, progress.tickets, restored.initial)


SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "2,3"}


@pytest.mark.parametrize(
    ("environment", "tasks", "gpus"),
    [
        ({}, 1, None),
        ({"SLURM_NTASKS": "8"}, 1, None),  # a batch script, which is one process
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4, None),
        (SRUN, 2, [0, 1, 2, 3]),  # a process a node
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8"}, 8, None),  # a process a GPU: JAX takes its own
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_GPUS_PER_TASK": "4"}, 8, [0, 1, 2, 3]),
        (SRUN | {"CUDA_VISIBLE_DEVICES": ""}, 2, None),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2, None),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 2, [0, 1]),
    ],
)
def test_processes_and_gpus_are_read_from_the_environment(environment, tasks, gpus):
    assert distributed.count_tasks(environment) == tasks
    assert distributed.local_gpus(environment) == gpus


@pytest.mark.parametrize("address", ["node", "node:", ":1234", "node:port", "node:0", "node:99999"])
def test_a_coordinator_is_a_host_and_a_port(address):
    with pytest.raises(UserError, match=rf"--coordinator is '{address}'; it should be HOST:PORT, such as"):
        distributed.initialize(address, 2, 0)


def test_a_process_0_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setattr(distributed, "_INIT_TIMEOUT_S", 0.1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"process 0 does not answer at {address}: .*refused; give each"):
            distributed.initialize(address, 2, 1)


def test_one_process_joins_nobody():
    distributed.initialize("node:1234", 1, 0)
    assert not jax.distributed.is_initialized()


def test_unlike_processes_do_not_train(data_dir, tmp_path):
    """And the one that dies, here process 0, takes the other with it."""
    command = ["-m", "tests.helpers.in_processes", tmp_path, f"--data_dir={data_dir}"]
    with Processes(2, command) as both:
        (first, _, first_said), (second, _, second_said) = both.ended()
    assert first == 7
    assert second not in (0, 7)
    refusal = "the processes differ in their configs"
    assert refusal in first_said
    assert refusal not in second_said  # it is said once
    assert (
        "cannot continue, probably because another has died" in second_said
        or "another task died" in second_said
    )
    assert not (tmp_path / "run").exists()


def test_two_processes_train_die_stop_go_on_and_match_one(data_dir, tmp_path):
    """Each batch divided between them."""
    config = quick_config(data_dir, rounds=12, epochs=4, **{"instability.rounds": (1,)})
    flags = [f"--config.{f}={config[f]}" for f in ("replicates", "rounds", "epochs", "batch_size")]
    flags += [
        "--config.dataset.normalize=False",
        "--config.instability.rounds=(1,)",
        f"--config.dataset.data_dir={data_dir}",
    ]
    workdir = tmp_path / "together"
    command = ["-m", "imp_jax.main", "--config=configs/mnist5k.py", f"--workdir={workdir}", *flags]
    command += ["--config.mesh.data=2", "--config.checkpoint_every_epochs=1"]

    with Processes(2, command) as both:
        both.wait_for_line(lambda line: line.startswith("round 1/"))
        both.all[1].kill()
        start = time.monotonic()
        (status, _, said), _ = both.ended()
        assert status != 0
        assert "another" in said  # ours, or that of JAX
        assert "died" in said
        assert time.monotonic() - start < 60

    with Processes(2, command) as both:
        line = both.wait_for_line(lambda line: " × 2 (member × data)" in line)
        assert line.startswith("mesh 1 × 2 (member × data) on 2 of 2 devices of 2 processes, cpu; 2 members")
        both.wait_for_line(lambda line: line.startswith("round "))
        both.all[1].send_signal(signal.SIGTERM)
        ended = both.ended()
    assert [status for status, *_ in ended] == [128 + signal.SIGTERM] * 2
    assert all("stopped by SIGTERM in round" in said for *_, said in ended)
    assert ended[1][1].strip().startswith("[Gloo]")  # and nothing of ours
    assert "round" not in ended[1][1]

    config.mesh.data = -1  # on one device now, from within the round
    runs.run(config, workdir)
    runs.run(config, tmp_path / "alone")
    together, alone = (pd.read_csv(path / "results.csv") for path in (workdir, tmp_path / "alone"))
    assert together[["round", "arm", "density"]].equals(alone[["round", "arm", "density"]])
    # the order of sums differs, which in later rounds decides between weights of nearly equal magnitude
    for rows, loss, accuracy in ((together["round"] < 4, 2e-3, 5e-3), (together["round"] >= 4, 0.1, 0.05)):
        np.testing.assert_allclose(together["train_loss"][rows], alone["train_loss"][rows], atol=loss)
        np.testing.assert_allclose(together["test_accuracy"][rows], alone["test_accuracy"][rows], atol=accuracy)
