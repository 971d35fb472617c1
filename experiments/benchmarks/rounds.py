"""Time whole rounds of configs/mnist5k.py: `python -m experiments.benchmark lenet`.

A round is timed as a user sees it, from the end of one to the end of the next: training, evaluation, pruning,
checkpoint, results and figure. Recording runs concurrently with the next training, so the CPU time it takes
from that training counts as training. With --torch, PyTorch is timed between the rounds: two eager loops of one
network, with the images in memory and with a DataLoader, and the two forms of `torch_peer`, which train as many
networks as a round and neither evaluate, prune nor record.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

from ml_collections import ConfigDict

from experiments.benchmarks.pytorch import make_peer_train_fns, make_torch_train_fns
from experiments.benchmarks.tables import print_quantities
from experiments.benchmarks.whole_runs import make_mnist5k_config
from imp_jax import data, runs

TORCH_STEPS = 200
PEER_EPOCHS = 4


def benchmark_rounds(timed_rounds: int, epochs: int | None, torch: bool) -> None:
    """Time `timed_rounds` rounds of configs/mnist5k.py, and eager PyTorch in turn if `torch`."""
    config = make_mnist5k_config(timed_rounds + 2, epochs)
    examples = data.load(config.dataset.name, config.dataset.data_dir).train.examples
    members = len(config.arms) * config.replicates
    images = members * config.epochs * (examples // config.batch_size) * config.batch_size
    torch_train_fns = {}  # by name: a function, and the images on which it trains
    if torch:
        eager = make_torch_train_fns("lenet", TORCH_STEPS, config.batch_size)
        torch_train_fns = {name: (train, TORCH_STEPS * config.batch_size) for name, train in eager.items()}
        torch_train_fns |= make_peer_train_fns(PEER_EPOCHS)
    torch_rates = {name: [] for name in torch_train_fns}

    def time_torch():
        for name, (train, trained_images) in torch_train_fns.items():
            start = time.perf_counter()
            train()
            torch_rates[name].append(trained_images / (time.perf_counter() - start))

    with tempfile.TemporaryDirectory() as workdir:
        spans, trainings = time_rounds(config, workdir, between=time_torch)
    # the first span contains the start and the compilation; nothing is recorded during the first training
    first, _, *rounds = spans
    trainings = trainings[2:]
    other = [1 - training / whole for training, whole in zip(trainings, rounds, strict=True)]
    rates = [images / seconds for seconds in rounds]

    print_quantities(
        f"configs/mnist5k.py, {members} members",
        {
            "images/s, all members, whole round": (rates, "{:,.0f}"),
            "images/s, all members, training": ([images / seconds for seconds in trainings], "{:,.0f}"),
            "seconds per round": (rounds, "{:.2f}"),
            "share of a round outside training": (other, "{:.1%}"),
            "start, data, compilation (s)": ([first - statistics.median(rounds)], "{:.2f}"),
        }
        | {f"images/s of {name}": (values[2:], "{:,.0f}") for name, values in torch_rates.items()}
        | {
            f"whole round × {name}": ([a / b for a, b in zip(rates, values[2:], strict=True)], "{:.2f}")
            for name, values in torch_rates.items()
        },
    )


def time_rounds(
    config: ConfigDict,
    workdir: str,
    dataset: data.Dataset | None = None,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Train all rounds of a config and return the seconds of each round, and those of its training alone.

    Args:
      dataset: see `runs.run`.
      between: called after every round, outside of the timings.
    """
    spans, trainings, start = [], [], time.perf_counter()

    def note_round(end):
        nonlocal start
        spans.append(time.perf_counter() - start)
        trainings.append(end.rows[0]["seconds"])
        between()
        start = time.perf_counter()

    runs.run(config, workdir, dataset=dataset, on_round=[note_round])
    return spans, trainings
