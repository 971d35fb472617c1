"""Time the saving of states within rounds: `python -m experiments.benchmark checkpoints`."""

import tempfile

from experiments.benchmarks.tables import print_quantities
from experiments.benchmarks.whole_runs import make_mnist5k_config, time_run


def benchmark_checkpoints(rounds: int, repeats: int, epochs: int | None) -> None:
    """Time whole runs that save their state every few epochs, in turn with one that does not."""
    config = make_mnist5k_config(rounds, epochs)
    seconds = {every: [] for every in (config.epochs, config.checkpoint_every_epochs, 1)}
    for _ in range(1 + repeats):
        for every, times in seconds.items():
            config.checkpoint_every_epochs = every
            with tempfile.TemporaryDirectory() as workdir:
                times.append(time_run(config, workdir))
    (_, without), *others = ((every, times[1:]) for every, times in seconds.items())
    print_quantities(
        f"configs/mnist5k.py, {rounds} rounds of {config.epochs} epochs",
        {"run without states within rounds (s)": (without, "{:.1f}")}
        | {
            f"extra time with a state every {every} epochs": (
                [b / a - 1 for a, b in zip(without, times, strict=True)],
                "{:.1%}",
            )
            for every, times in others
        },
    )
