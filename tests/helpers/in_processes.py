"""The program of the two processes of test_distributed.py: `python -m tests.helpers.in_processes FOLDER`."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

from imp_jax import data, divergence, runs
from imp_jax.data import streaming
from imp_jax.errors import UserError
from imp_jax.runtime import devices, distributed
from imp_jax.workdir.checkpoints import Checkpoints, MidRoundState, RoundNetworks
from tests.conftest import quick_config

SEEDS = np.array([[1, 2], [3, 4]], np.uint32)  # of two members


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("coordinator", "processes", "process"):
        parser.add_argument(f"--{name}", type=str if name == "coordinator" else int)
    parser.add_argument("--data_dir")
    arguments = parser.parse_args()
    distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    with distributed.exit_on_failure():
        if arguments.data_dir:
            train_differently_and_die(arguments)
        folder, process = arguments.folder, arguments.process
        found = {"most": distributed.global_max(10 * process), "errors": collect_errors(process)}
        found["same"] = [distributed.all_processes_equal(value) for value in ("a", f"{process}", "b")]
        found |= read_stream(folder)
        save_checkpoints(folder)
        (folder / f"found-{process}.json").write_text(json.dumps(found))
        shut_down(folder, process)


def shut_down(folder, process):
    """Shut down, process 0 one second after the other; store when this and JAX's shutdown begin."""
    jax_shutdown, times = jax.distributed.shutdown, []

    def record_and_shut_down():
        times.append(time.time())
        jax_shutdown()

    jax.distributed.shutdown = record_and_shut_down
    time.sleep(0 if process else 1)
    times.append(time.time())
    distributed.shutdown()
    (folder / f"left-{process}.json").write_text(json.dumps(times))


def train_differently_and_die(arguments):
    """Start a run, which is refused as the seeds differ; then process 0 dies while the other waits for it."""
    config = quick_config(arguments.data_dir, seed=arguments.process)
    try:
        runs.run(config, arguments.folder / "run")
    except distributed.RemoteUserError:
        pass
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
    distributed.global_max(0)
    if arguments.process == 0:
        os._exit(7)
    while True:
        distributed.global_max(0)


def collect_errors(process):
    """Return the error that this process raises if none, process 1, or both processes fail."""
    raised = []
    for failing in ((), (1,), (0, 1)):
        try:
            with distributed.raise_on_all_processes():
                if process in failing:
                    raise UserError(f"not here, {process}")
            raised.append("")
        except UserError as error:
            raised.append(f"{type(error).__name__}: {error}")
    return raised


def read_stream(folder):
    """Return the batches of a stream, gathered from both processes, and how many examples this one decoded."""
    read, decoded = streaming._read, []

    def record_and_read(split, example, rng):
        decoded.append(int(example))
        return read(split, example, rng)

    streaming._read = record_and_read
    found = {}
    dataset = data.load("imagenet2012", folder, image_side=8, workers=0)
    for name, sizes in (("members", (2, 1)), ("data", (1, 2))):
        mesh = devices.make_mesh(2, 4, member=sizes[0], data=sizes[1])
        decoded.clear()
        batches = list(dataset.train.training_batches(SEEDS, 1, 4, mesh=mesh))
        images, labels = zip(*(devices.gather_members(batch, None) for batch in batches), strict=True)
        found[name] = {
            "images": np.stack(images).astype(int).sum((3, 4, 5)).tolist(),
            "labels": np.stack(labels).tolist(),
            "decoded": len(decoded),
        }
        decoded.clear()
        examples = np.arange(8) % dataset.test.examples
        views = [
            devices.gather_members(b, None)[1].tolist()
            for b in dataset.test.evaluation_batches(4, examples, mesh)
        ]
        found[name] |= {"views": views, "viewed": len(decoded)}
    return found


def save_checkpoints(folder):
    """Save a round and a state within a round, collectively."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    tree = {
        "params": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "odd": np.ones(3, np.float32)}
    }
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, RoundNetworks(tree, tree, jax.tree.map(lambda leaf: leaf > 1, tree)), [{"round": 0}])
    checkpoints.save_progress(1, MidRoundState(3, tree, tree, divergence.init_history(2), 0.5), 10)
    checkpoints.close()


if __name__ == "__main__":
    sys.exit(main())
