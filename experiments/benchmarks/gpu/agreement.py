"""Compare the training of a GPU with that of a CPU, in float32.

`python -m experiments.benchmarks.gpu.agreement FILE` trains small networks in each form of this platform and
writes their losses; `compare_losses` compares those of two platforms.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from experiments.benchmarks.steps import FORMS
from experiments.sweeps.datasets import DATASET_SIZES
from experiments.sweeps.runs import load_config
from imp_jax import data, imp, training
from imp_jax.experiment import setup

STEPS = 20
CONFIGS = {"mnist5k": ("vmapped",), "resnet8_scenes": ("per_member", "grouped")}  # with the forms of a GPU
CPU_FORM = "unrolled"  # the layers of Flax
RATE = 0.1  # times the learning rate of the config, which amplifies differences to 14 % within 20 steps
# Largest relative differences of the loss. Before the first update, only products and sums differ in rounding:
# TF32 would be 1e-4 or more. Later, a few rectifiers near zero differ, and training amplifies this.
LIMITS = {"first step": 1e-5, "second step": 1e-3, "last step": 0.02}

Losses = dict[str, dict[str, list[list[float]]]]  # by config and form: [steps][members], in nats


def main() -> None:
    """Train on this platform and write the losses; started by `measure.measure_agreement`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.gpu.agreement", description=main.__doc__
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    on_cpu = jax.default_backend() == "cpu"
    losses = {
        name: {form: train(name, form) for form in ((CPU_FORM,) if on_cpu else forms)}
        for name, forms in CONFIGS.items()
    }
    out.write_text(json.dumps(losses))


def train(name: str, form: str) -> list[list[float]]:
    """Train two members of a config in a form of `steps.FORMS`; return their losses, [steps][members]."""
    config = load_config(name)
    config.update(arms=("imp",), replicates=2, batch_size=32, dtype="float32", matmul_precision="highest")
    config.instability.rounds = ()
    _, image_shape, num_classes = DATASET_SIZES[config.dataset.name]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, 32 * STEPS)
    # something to learn: the mean of an image depends on its class
    images = rng.integers(0, 100, (len(labels), *image_shape)) + 15 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    dataset = data.from_arrays(images, labels, images[:2], labels[:2], num_classes=num_classes)
    experiment = setup(config, dataset, use_mesh=False)
    on_cpu = jax.default_backend() == "cpu"
    spec = experiment.spec._replace(execution=FORMS[form]._replace(scan=not on_cpu))
    experiment = experiment._replace(spec=spec)
    state = imp.init_state(experiment)
    states = imp.begin_training(experiment, state).states
    keys = jax.random.split(jax.random.key(1), 2)
    batches = experiment.dataset.train.training_epochs(keys, 1, config.batch_size).epoch(0)
    rates = np.full(STEPS, RATE * config.optimizer.learning_rate, np.float32)
    _, metrics = training.train_steps(states, state.masks, batches, 0, rates, spec=spec)
    return np.asarray(metrics.loss).tolist()


def compare_losses(expected: Losses, actual: Losses) -> Mapping[str, Mapping[str, float | bool]]:
    """Return the largest relative difference of the losses at the steps of `LIMITS`, and whether all are below.

    Args:
      expected: of a CPU, in `CPU_FORM`.
      actual: of a GPU, in the forms of `CONFIGS`.

    Returns: by config and form, such as "mnist5k, vmapped".

    Raises:
      ValueError: `actual` has other forms, such as those of a CPU.
    """
    if any(set(forms) != set(CONFIGS[name]) for name, forms in actual.items()):
        raise ValueError("the losses are not those of a GPU: they have other forms")
    results = {}
    for name, forms in actual.items():
        reference = np.array(expected[name][CPU_FORM])
        for form, losses in forms.items():
            difference = np.abs(np.array(losses) / reference - 1).max(1)
            steps = dict(zip(LIMITS, difference[[0, 1, -1]].tolist(), strict=True))
            agrees = all(steps[step] <= limit for step, limit in LIMITS.items())
            results[f"{name}, {form}"] = {**steps, "agrees": agrees}
    return results


if __name__ == "__main__":
    main()
