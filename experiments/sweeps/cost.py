"""What runs cost, computed from throughput that `python -m experiments.benchmark throughput` has measured."""

import json
from pathlib import Path

import numpy as np

from experiments.paper.networks import SETS
from experiments.sweeps.runs import Run

MEASURED = Path(__file__).parents[1] / "benchmarks" / "throughput.json"


def read_throughput() -> dict[str, dict]:
    """Of each device: images/s by network and batch size, factors of repulsion, seconds a run takes besides."""
    return json.loads(MEASURED.read_text())


def seconds(run: Run, device: dict) -> float | None:
    """How long a run takes on a device, an entry of `read_throughput`; None where its network was not measured.

    Between the batch sizes measured images/s are interpolated, beyond them they are those of the nearest.
    """
    config = run.config
    speeds = device.get("images_per_second", {}).get(config.model.name)
    if not speeds:
        return None
    examples = SETS[config.dataset.name][0]
    images = run.trainings * config.epochs * (examples // config.batch_size) * config.batch_size
    sizes, rates = zip(*sorted((int(size), rate) for size, rate in speeds.items()), strict=True)
    seconds = images / float(np.interp(config.batch_size, sizes, rates))
    if config.repulsion.strength:
        seconds *= device.get("repulsion", {}).get(config.model.name, 1)
    return seconds + device.get("besides", {}).get(config.model.name, 0)


def format_duration(seconds: float | None) -> str:
    """Such as 40 s, 13 min, 5.2 h, 22 days."""
    if seconds is None:
        return "not measured"
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return (
                f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:,.0f} {unit}"
            )
    return f"{seconds:.0f} s"
