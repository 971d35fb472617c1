"""What each of two processes does for test_distributed.py: `python -m tests.helpers.in_processes FOLDER`."""

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
    given = parser.parse_args()
    distributed.initialize(given.coordinator, given.processes, given.process)
    with distributed.exit_on_failure():
        if given.data_dir:
            differ(given)
        found = {"most": distributed.global_max(10 * given.process), "errors": errors(given.process)}
        found["same"] = [distributed.all_processes_equal(value) for value in ("a", f"{given.process}", "b")]
        found |= stream(given.folder)
        save(given.folder)
        (given.folder / f"found-{given.process}.json").write_text(json.dumps(found))
        leave(given.folder, given.process)


def leave(folder, process):
    """Process 0 a second after the other; each notes when it leaves, and when JAX's shutdown begins."""
    shutdown, times = jax.distributed.shutdown, []

    def noting():
        times.append(time.time())
        shutdown()

    jax.distributed.shutdown = noting
    time.sleep(0 if process else 1)
    times.append(time.time())
    distributed.shutdown()
    (folder / f"left-{process}.json").write_text(json.dumps(times))


def differ(given):
    """Be refused, as the seeds differ; then process 0 dies, and the other waits for it."""
    config = quick_config(given.data_dir, seed=given.process)
    try:
        runs.run(config, given.folder / "run")
    except distributed.RemoteUserError:
        pass
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
    distributed.global_max(0)
    if given.process == 0:
        os._exit(7)
    while True:
        distributed.global_max(0)


def errors(process):
    """Who raises what, where one process, or both, cannot do something."""
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


def stream(folder):
    """What both see together of a stream, and the examples that this one decodes."""
    read, decoded = streaming._read, []

    def noting(split, example, draw):
        decoded.append(int(example))
        return read(split, example, draw)

    streaming._read = noting
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


def save(folder):
    """A round and the state of one, by both."""
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
