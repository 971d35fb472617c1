"""Time whole rounds of configs/resnet20.py on random images, with and without checkpoints within the rounds.

Started by `measure` as a process of its own; prints a line of JSON.
"""

import contextlib
import io
import json
import statistics
import tempfile

import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks.rounds import time_rounds
from experiments.sweeps.datasets import DATASET_SIZES
from experiments.sweeps.runs import load_config
from imp_jax import data

ROUNDS, EPOCHS, BATCH_SIZE = 4, 4, 512


def main() -> None:
    """Time a run that saves its state after every epoch, and one that saves only after every round."""
    config = load_config("resnet20")
    config.update(rounds=ROUNDS, epochs=EPOCHS, batch_size=BATCH_SIZE, dtype="bfloat16", rewind_step=0)
    config.instability.rounds, config.optimizer.milestones, config.optimizer.schedule = (), (), "constant"
    dataset = make_dataset(*DATASET_SIZES[config.dataset.name])
    print(json.dumps(measure_rounds(config, dataset)))


def make_dataset(examples: int, image_shape: tuple[int, int, int], num_classes: int) -> data.Dataset:
    """Return images of noise whose mean depends on their class, so that accuracies do not stay at chance."""
    rng = np.random.default_rng(0)

    def make_split(count):
        labels = rng.integers(0, num_classes, count)
        images = rng.integers(0, 256 - 15 * num_classes, (count, *image_shape), np.uint8)
        return images + (15 * labels[:, None, None, None]).astype(np.uint8), labels

    return data.from_arrays(
        *make_split(examples),
        *make_split(examples // 5),
        num_classes=num_classes,
        augmentation=data.DEFAULT_AUGMENTATION["cifar10"],
    )


def measure_rounds(config: ConfigDict, dataset: data.Dataset) -> dict[str, float]:
    """Return medians over rounds: seconds, the share outside training, and the cost of a state per epoch."""
    seconds, trainings = {}, {}
    for every in (config.epochs, 1):
        config.checkpoint_every_epochs = every
        with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
            spans, trained = time_rounds(config, workdir, dataset)
        # the first round compiles
        seconds[every], trainings[every] = (statistics.median(values[1:]) for values in (spans, trained))
    without = config.epochs
    members = len(config.arms) * config.replicates
    images = members * config.epochs * (dataset.train.examples // config.batch_size) * config.batch_size
    return {
        "seconds_per_round": seconds[without],
        "images_per_second_of_whole_rounds": images / seconds[without],
        "share_outside_training": 1 - trainings[without] / seconds[without],
        "extra_time_with_a_state_per_epoch": seconds[1] / seconds[without] - 1,
    }


if __name__ == "__main__":
    main()
