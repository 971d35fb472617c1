"""Estimate how long runs take, from the throughput that `experiments.benchmark throughput` has measured."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments.sweeps.datasets import DATASET_SIZES
from experiments.sweeps.runs import AnyRun

MEASURED = Path(__file__).parents[1] / "benchmarks" / "throughput.json"


def read_throughput() -> dict[str, dict]:
    """Read `throughput.json`: for each device what `benchmarks.throughput` has measured.

    An entry has `images_per_second` by `network_key` and batch size, `repulsion`, the factor by which repulsion
    makes a network's training slower, and `besides`, the seconds that a run takes in addition to its training.
    """
    return json.loads(MEASURED.read_text())


def count_images(run: AnyRun) -> int:
    """Count the images that all trainings of a run process."""
    config = run.config
    steps = DATASET_SIZES[config.dataset.name].train_images // config.batch_size
    return run.trainings * config.epochs * steps * config.batch_size


def network_key(config: ConfigDict) -> str:
    """Return the name of a config's network, with its width unless that is 1, such as "conv4, width 0.25"."""
    return config.model.name + (f", width {config.model.width:g}" if config.model.width != 1 else "")


def estimate_seconds(run: AnyRun, device: dict) -> float | None:
    """Estimate the seconds that a run takes on a device; None if its network was not measured there.

    Between the measured batch sizes, images/s are interpolated linearly. Outside their range they are those of
    the nearest one.

    Args:
      device: an entry of `read_throughput`.
    """
    config = run.config
    network = network_key(config)
    speeds = device.get("images_per_second", {}).get(network)
    if not speeds:
        return None
    sizes, rates = zip(*sorted((int(size), rate) for size, rate in speeds.items()), strict=True)
    seconds = count_images(run) / float(np.interp(config.batch_size, sizes, rates))
    if config.repulsion.strength:
        seconds *= device.get("repulsion", {}).get(network, 1)
    return seconds + device.get("besides", {}).get(network, 0)


def format_duration(seconds: float | None) -> str:
    """Format a duration, such as 40 s, 13 min, 5.2 h or 22 days."""
    if seconds is None:
        return "not measured"
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return (
                f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:,.0f} {unit}"
            )
    return f"{seconds:.0f} s"
