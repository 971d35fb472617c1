"""Time runs with repulsion: `python -m experiments.benchmark repulsion`.

Whole runs of configs/mnist5k.py without repulsion and with λ = 2 are timed in turn. The size of the store of
earlier optima is printed for each round: measured for LeNet, and computed for ResNet-50.
"""

import contextlib
import tempfile

from rich.console import Console
from rich.table import Table

from experiments.benchmarks.tables import print_quantities
from experiments.benchmarks.whole_runs import make_mnist5k_config, time_run
from experiments.sweeps.networks import compute_variable_shapes
from experiments.sweeps.runs import load_config
from imp_jax import masking, repulsion
from imp_jax.experiment import setup
from imp_jax.round_state import add_optimum
from imp_jax.workdir import checkpoints

Store = tuple[int, ...]  # rows, and the slots of each leaf


def benchmark_repulsion(rounds: int, repeats: int, epochs: int | None) -> None:
    """Time whole runs without and with repulsion in turn, and print the store of each round."""

    def make_config(strength):
        config = make_mnist5k_config(rounds, epochs)
        config.repulsion.strength = strength
        return config

    with tempfile.TemporaryDirectory() as workdir:  # imports, and compiles what both kinds of run share
        config = make_config(0.0)
        config.rounds = 1
        time_run(config, workdir)
    plain, repelled, stores = [], [], []
    for repeat in range(1 + repeats):
        with tempfile.TemporaryDirectory() as workdir:
            plain.append(time_run(make_config(0.0), f"{workdir}/plain"))
            repelled.append(time_run(make_config(2.0), f"{workdir}/repelled"))
            if repeat == 0:
                experiment = setup(make_config(2.0), use_mesh=False)
                stores, sizes = _rebuild_stores(experiment, f"{workdir}/repelled", rounds)
    (cold_plain, *plain), (cold_repelled, *repelled) = plain, repelled
    print_quantities(
        f"configs/mnist5k.py, {len(experiment.members)} members, {rounds} rounds",
        {
            "run without repulsion (s)": (plain, "{:.1f}"),
            "run with λ = 2 (s)": (repelled, "{:.1f}"),
            "ratio": ([b / a for a, b in zip(plain, repelled, strict=True)], "{:.2f}"),
            "ratio of the first, which compiles": ([cold_repelled / cold_plain], "{:.2f}"),
            "programs compiled for repulsion": ([len(set(stores))], "{:d}"),
        },
    )
    print_stores(f"LeNet-300-100, P = {sum(sizes):,}: store of a member, MB", sum(sizes), stores)
    stores, parameters = _compute_resnet50_stores(rounds)
    print_stores(f"ResNet-50, P = {parameters:,}: computed, layers pruned alike, MB", parameters, stores)


def print_stores(title: str, parameters: int, stores: list[Store]) -> None:
    """Print the size of the store in each round from round 1, and of storing whole networks instead."""
    table = Table("round", "rows × slots", "numbers / P", "float32", "bfloat16", "naive", title=title)
    for number, (rows, *slots_per_leaf) in enumerate(stores, start=1):
        slots = sum(slots_per_leaf)
        table.add_row(
            str(number),
            f"{rows} × {slots:,}",
            f"{rows * slots / parameters:.2f}",
            *(f"{slots * (4 + size * rows) / 1e6:,.2f}" for size in (4, 2)),  # 4 bytes of position per slot
            f"{4 * number * parameters / 1e6:,.2f}",
        )
    Console(soft_wrap=True).print(table)


def _rebuild_stores(experiment, workdir, rounds):
    """Return the store's shape in each round of a finished run, and the sizes of its prunable leaves."""
    stores, optima = [], None
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as run_checkpoints:
        previous = run_checkpoints.restore(0)
        for number in range(1, rounds):
            current = run_checkpoints.restore(number)
            optima = add_optimum(experiment, optima, previous, current.mask)
            previous = current
            stores.append(optima.shape)
        return stores, [leaf[0].size for leaf in masking.prunable_leaves(previous.mask)]


def _compute_resnet50_stores(rounds):
    """Return the store's shape in each round if all layers were pruned by 20 %, and the number of weights."""
    params = compute_variable_shapes(load_config("resnet50"))["params"]
    sizes = [leaf.size for leaf in masking.prunable_leaves(params)]
    stores, shape = [], None
    for number in range(1, rounds):
        survivors = [round(0.8**number * size) for size in sizes]
        shape = repulsion.next_store_shape(shape, number, rounds - 1, survivors, sum(sizes))
        stores.append(shape)
    return stores, sum(sizes)
