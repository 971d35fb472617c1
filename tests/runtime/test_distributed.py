"""Two processes that train together on this machine; their collectives use Gloo."""

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

SEEDS = in_processes.SEEDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run `tests.helpers.in_processes` in two processes; return the folder of their results."""
    path = tmp_path_factory.mktemp("processes")
    folders.write_imagenet(path)
    with Processes(2, ["-m", "tests.helpers.in_processes", path]) as processes:
        for status, _, stderr in processes.ended():
            assert status == 0, stderr
    return path


@pytest.fixture(scope="module")
def results(folder):
    return [json.loads((folder / f"found-{process}.json").read_text()) for process in (0, 1)]


def test_reductions_and_errors_reach_all_processes(results):
    assert [result["most"] for result in results] == [10, 10]
    assert [result["same"] for result in results] == [[True, False, True]] * 2
    assert results[0]["errors"] == ["", "RemoteUserError: process 1: not here, 1", "UserError: not here, 0"]
    assert results[1]["errors"] == ["", "UserError: not here, 1", "RemoteUserError: process 0: not here, 0"]


def test_no_process_waits_in_the_shutdown_of_jax(folder):
    """`jax.distributed.shutdown` kills a process that waits in it for more than five minutes."""
    (left_0, _), (left_1, shutdown_1) = (json.loads((folder / f"left-{p}.json").read_text()) for p in (0, 1))
    assert left_1 < left_0 <= shutdown_1


@pytest.mark.parametrize("mesh", ["members", "data"])
def test_each_process_decodes_its_part_of_a_stream(folder, results, mesh):
    """Together the parts are the stream of a single process."""
    dataset = data.load("imagenet2012", folder, image_side=8, workers=0)
    images, labels = zip(*dataset.train.training_batches(SEEDS, 1, 4), strict=True)
    steps, members, batch = np.shape(labels)
    assert (steps, members, batch) == (3, 2, 4)
    for result in results:
        assert result[mesh]["labels"] == np.stack(labels).tolist()
        assert result[mesh]["images"] == np.stack(images).astype(int).sum((3, 4, 5)).tolist()
        assert result[mesh]["decoded"] == steps * members * batch // 2
        views = [labels for _, labels in dataset.test.evaluation_batches(4, np.arange(8) % 6)]
        assert result[mesh]["views"] == np.stack(views).tolist()
        # "data" divides the batches of an evaluation; with "members" every process reads all of them
        assert result[mesh]["viewed"] == (4 if mesh == "data" else 8)


def test_all_processes_write_a_checkpoint_that_one_can_read(folder):
    networks = folder / "checkpoints" / "0" / "networks"
    for process in (0, 1):
        parts = (networks / f"ocdbt.process_{process}" / "d").iterdir()
        assert sum(part.stat().st_size for part in parts) > 0
    checkpoints = Checkpoints(folder)  # reading compares the checksums
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
        ({"SLURM_NTASKS": "8"}, 1, None),  # a batch script is a single process
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4, None),
        (SRUN, 2, [0, 1, 2, 3]),  # one process per node
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8"}, 8, None),  # one process per GPU, which JAX selects
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_GPUS_PER_TASK": "4"}, 8, [0, 1, 2, 3]),
        (SRUN | {"CUDA_VISIBLE_DEVICES": ""}, 2, None),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "-1"}, 2, None),  # CUDA's own way to hide all
        (SRUN | {"JAX_PLATFORMS": "cpu"}, 2, None),
        (SRUN | {"JAX_PLATFORMS": ""}, 2, [0, 1, 2, 3]),  # as if it were not set
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2, None),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 2, [0, 1]),
    ],
)
def test_processes_and_gpus_are_read_from_the_environment(environment, tasks, gpus):
    assert distributed.count_tasks(environment) == tasks
    assert distributed.local_gpus(environment) == gpus


@pytest.mark.parametrize("address", ["node", "node:", ":1234", "node:port", "node:0", "node:99999"])
def test_a_coordinator_without_host_and_port_is_refused(address):
    with pytest.raises(UserError, match=rf"--coordinator is '{address}'; it should be HOST:PORT, such as"):
        distributed.initialize(address, 2, 0)


def test_an_unreachable_process_0_is_reported(monkeypatch):
    monkeypatch.setattr(distributed, "_INIT_TIMEOUT_S", 0.1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"process 0 does not answer at {address}: .*refused; give each"):
            distributed.initialize(address, 2, 1)


def test_a_single_process_does_not_initialize_jax_distributed():
    distributed.initialize("node:1234", 1, 0)
    assert not jax.distributed.is_initialized()


def test_processes_with_different_configs_do_not_train(data_dir, tmp_path):
    """When one of them dies afterwards, here process 0, the other exits as well."""
    command = ["-m", "tests.helpers.in_processes", tmp_path, f"--data_dir={data_dir}"]
    with Processes(2, command) as processes:
        (status_0, _, stderr_0), (status_1, _, stderr_1) = processes.ended()
    assert status_0 == 7
    assert status_1 not in (0, 7)
    refusal = "the processes differ in their configs"
    assert refusal in stderr_0
    assert refusal not in stderr_1  # only one process reports it
    assert "cannot continue, probably because another has died" in stderr_1 or "another task died" in stderr_1
    assert not (tmp_path / "run").exists()


def test_two_processes_can_die_or_stop_and_resume_with_the_results_of_one(data_dir, tmp_path):
    """Each batch is divided between the two processes."""
    config = quick_config(data_dir, rounds=12, epochs=4, **{"instability.rounds": (1,)})
    flags = [f"--config.{f}={config[f]}" for f in ("replicates", "rounds", "epochs", "batch_size")]
    flags += [
        "--config.dataset.normalize=False",
        f"--config.model.width={config.model.width}",
        "--config.instability.rounds=(1,)",
        f"--config.dataset.data_dir={data_dir}",
    ]
    workdir = tmp_path / "two"
    command = ["-m", "imp_jax.main", "--config=configs/mnist5k.py", f"--workdir={workdir}", *flags]
    command += ["--config.mesh.data=2", "--config.checkpoint_every_epochs=1"]

    with Processes(2, command) as processes:
        processes.wait_for_line(lambda line: line.startswith("round 1/"))
        processes.all[1].kill()
        start = time.monotonic()
        (status, _, stderr), _ = processes.ended()
        assert status != 0
        assert "another" in stderr  # in our message or that of JAX
        assert "died" in stderr
        assert time.monotonic() - start < 60

    with Processes(2, command) as processes:
        line = processes.wait_for_line(lambda line: " × 2 (member × data)" in line)
        assert line.startswith("mesh 1 × 2 (member × data) on 2 of 2 devices of 2 processes, cpu; 2 members")
        processes.wait_for_line(lambda line: line.startswith("round "))
        processes.all[1].send_signal(signal.SIGTERM)
        ended = processes.ended()
    assert [status for status, *_ in ended] == [128 + signal.SIGTERM] * 2
    assert all("stopped by SIGTERM in round" in stderr for *_, stderr in ended)
    assert ended[1][1].strip().startswith("[Gloo]")  # a message of the library
    assert "round" not in ended[1][1]

    config.mesh.data = -1  # resume on one device, in the middle of a round
    runs.run(config, workdir)
    runs.run(config, tmp_path / "one")
    two, one = (pd.read_csv(path / "results.csv") for path in (workdir, tmp_path / "one"))
    assert two[["round", "arm", "density"]].equals(one[["round", "arm", "density"]])
    # sums are taken in another order; in later rounds this changes which of two nearly equal weights is pruned
    for rows, loss, accuracy in ((two["round"] < 4, 2e-3, 5e-3), (two["round"] >= 4, 0.1, 0.05)):
        np.testing.assert_allclose(two["train_loss"][rows], one["train_loss"][rows], atol=loss)
        np.testing.assert_allclose(two["test_accuracy"][rows], one["test_accuracy"][rows], atol=accuracy)
