"""How fast this machine is: `python -m experiments.benchmark SUBJECT`.

SUBJECT is table, lenet, conv4, resnet20, resnet50, convolutions, forms, analysis, repulsion, checkpoints, disk,
throughput or scaling.

For table the training steps of all networks are timed, for conv4, resnet20 and resnet50 those of one: images/s,
arithmetic and bytes moved as shares of the machine's peaks, compilation and memory (`experiments/steps.py`).
With --torch the same steps of an eager PyTorch loop are timed in turn; --out keeps the table as JSON, and
--compare sets it against an older one.

For lenet the real thing is timed, `imp.rounds` of configs/mnist5k.py into a temporary workdir, from one round
to the next: training, evaluation, pruning, checkpoint, results and figure. Recording goes on beside the next
training, so the CPU time it takes from that training counts as training. With --torch an eager PyTorch loop
with the images in memory, and one with a DataLoader, are timed between the rounds.

For convolutions, the parts of those of ResNet-20 and Conv-4 are timed alone, in each form there is on a CPU.

For forms, the steps of ResNet-20 with its members unrolled, as grouped convolutions and as batched products of
patches are timed: 1, 3 and 6 members at batch 128, 512 and 2048, or those that --members and --batch_size say.

For analysis, a run of configs/mnist5k.py with trainings of one epoch is analysed again and again.

For repulsion, whole runs of configs/mnist5k.py without it and with λ = 2 are timed in turn, and the size of the
store of earlier optima is printed, as it was in each round; for ResNet-50 as it would be.

For checkpoints, runs of configs/mnist5k.py that save their state within the rounds are timed in turn with one
that does not.

For throughput, the training steps of all networks are timed at the batch sizes of the figures (on a CPU, of
the convolutional ones at one), and what a whole run of configs/mnist5k.py takes besides, and with repulsion.
With --record="one H100" that becomes what `python -m experiments.run list` reckons with on such a device.

For scaling, training steps are timed over more and more GPUs, or over virtual devices of the CPU, with the same
work for each; and what the sweeps of the paper would take on 1, 8 and 64 devices like this is printed.

For disk, networks of random weights are saved as the rounds of each config would be, and the sizes printed.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from experiments.benchmarks import convolutions, scaling, steps
from experiments.paper import catalogue, networks
from experiments.paper.scales import MINI, PAPER
from experiments.sweeps import cost
from experiments.sweeps.runs import REPOSITORY, Run
from imp_jax import cli
from imp_jax.errors import UserError
from imp_jax.workdir.files import write_atomically

NETWORKS = ("conv4", "resnet20", "resnet50")
SUBJECTS = (
    "table",
    "lenet",
    *NETWORKS,
    "convolutions",
    "forms",
    "analysis",
    "repulsion",
    "checkpoints",
    "disk",
    "throughput",
    "scaling",
)


def main():
    cli.replace_unprintable()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument(
        "--rounds",
        type=int,
        help="lenet: to time (default: 8); analysis, repulsion, checkpoints, disk: of the run (default: 25)",
    )
    parser.add_argument(
        "--repeats", type=int, help="others: timings to take (default: 5, of repulsion 2 after the first)"
    )
    parser.add_argument(
        "--epochs", type=int, help="lenet, repulsion, checkpoints: of a training (default: the config's)"
    )
    parser.add_argument("--steps", type=int, help="table, conv4 and so on: of a timing")
    parser.add_argument("--members", type=int, help="table, conv4 and so on: networks side by side")
    parser.add_argument("--batch_size", type=int, help="table, conv4 and so on: default is the config's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="likewise")
    parser.add_argument("--execution", help="likewise")
    parser.add_argument(
        "--torch", action="store_true", help="table, lenet, conv4, resnet20: eager PyTorch in turn, on the CPU"
    )
    parser.add_argument("--out", metavar="FILE", help="table, conv4 and so on: keep it as JSON")
    parser.add_argument("--compare", metavar="FILE", help="table, conv4 and so on: ratios to what --out kept")
    parser.add_argument(
        "--record", metavar="DEVICE", help="throughput: write it to experiments/benchmarks/throughput.json"
    )
    arguments = parser.parse_args()
    for name in ("rounds", "repeats", "epochs", "steps", "members", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            sys.exit(f"error: --{name} is {value}; it should be at least 1")
    logging.set_verbosity(logging.ERROR)
    from imp_jax.runtime import devices

    devices.use_one_device_per_cpu_core()
    try:
        if arguments.torch and arguments.subject not in ("table", *steps.IN_TORCH):
            raise UserError(
                f"--torch is for table, {', '.join(steps.IN_TORCH)}; there is no {arguments.subject} in PyTorch"
            )
        if arguments.subject == "lenet":
            benchmark_rounds(arguments.rounds or 8, arguments.epochs, arguments.torch)
        elif arguments.subject == "analysis":
            benchmark_analysis(arguments.rounds or 25, arguments.repeats or 5)
        elif arguments.subject == "repulsion":
            benchmark_repulsion(arguments.rounds or 25, arguments.repeats or 2, arguments.epochs)
        elif arguments.subject == "checkpoints":
            benchmark_checkpoints(arguments.rounds or 25, arguments.repeats or 5, arguments.epochs)
        elif arguments.subject == "disk":
            benchmark_disk(arguments.rounds or 25)
        elif arguments.subject == "throughput":
            benchmark_throughput(arguments.rounds or 25, arguments.repeats or 3, arguments.record)
        elif arguments.subject == "scaling":
            scaling.benchmark(arguments.repeats or 3)
        else:
            asked = ("repeats", "steps", "dtype", "execution", "members", "batch_size")
            options = [f"--{name}={value}" for name in asked if (value := getattr(arguments, name))]
            if arguments.subject == "convolutions":
                convolutions.benchmark(arguments.batch_size or 128, arguments.repeats or 7)
            elif arguments.subject == "forms":
                members = [arguments.members] if arguments.members else (1, 3, 6)
                sizes = [arguments.batch_size] if arguments.batch_size else (128, 512, 2048)
                steps.benchmark_forms("resnet20", members, sizes, options)
            else:
                names = steps.ROWS if arguments.subject == "table" else [arguments.subject]
                steps.benchmark(names, options, arguments.torch, arguments.out, arguments.compare)
    except UserError as error:
        sys.exit(f"error: {error}")


def benchmark_rounds(timed_rounds: int, epochs: int | None, torch: bool) -> None:
    """Time `timed_rounds` rounds of configs/mnist5k.py, in turn with eager PyTorch if asked to."""
    from imp_jax import data, imp

    config = main_job(timed_rounds + 2, epochs)
    examples = data.load(config.dataset.name, config.dataset.data_dir).train.examples
    members = len(config.arms) * config.replicates
    images = members * config.epochs * (examples // config.batch_size) * config.batch_size
    contenders = steps.torch_contenders("lenet", 200, config.batch_size) if torch else {}
    theirs = {name: [] for name in contenders}

    with tempfile.TemporaryDirectory() as workdir:
        spans, trainings, start = [], [], time.perf_counter()
        for rows in imp.rounds(config, workdir):
            spans.append(time.perf_counter() - start)
            trainings.append(rows[0]["seconds"])
            for name, train in contenders.items():
                start = time.perf_counter()
                train()
                theirs[name].append(200 * config.batch_size / (time.perf_counter() - start))
            start = time.perf_counter()
    # a round is handed over once the next has trained, beside its recording: the first span holds
    # two trainings and the compilation, the last none
    first, *rounds, _ = spans
    trainings = trainings[2:]
    other = [1 - training / whole for training, whole in zip(trainings, rounds, strict=True)]
    rates = [images / seconds for seconds in rounds]

    print_table(
        f"configs/mnist5k.py, {members} members",
        {
            "images/s, all members, whole round": (rates, "{:,.0f}"),
            "images/s, all members, training": ([images / seconds for seconds in trainings], "{:,.0f}"),
            "seconds a round": (rounds, "{:.2f}"),
            "share of a round not training": (other, "{:.1%}"),
            "start, data, compilation (s)": ([first - 2 * statistics.median(rounds)], "{:.2f}"),
        }
        | {f"images/s of {name}": (values[1:-1], "{:,.0f}") for name, values in theirs.items()}
        | {
            f"whole round × {name}": ([a / b for a, b in zip(rates, values[1:-1], strict=True)], "{:.1f}")
            for name, values in theirs.items()
        },
    )


def benchmark_throughput(
    rounds: int, repeats: int, record: str | None, names: Sequence[str] = ("lenet", *NETWORKS)
) -> None:
    """Time all networks at the batch sizes of the figures, and whole runs; print the table, and `record` it."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    speeds, table = {}, {}
    for name in names:
        runs = [run for scale in (PAPER, MINI) for run in catalogue.runs_of(catalogue.FIGURES.values(), scale)]
        sizes = sorted({run.config.batch_size for run in runs if run.config.model.name == name})
        if on_cpu and name in NETWORKS:  # seconds a step, of which more images do not make less an image
            sizes = [16 if name == "resnet50" else 128]
        for size in sizes:
            config = importlib.import_module(f"configs.{name}").get_config()
            config.batch_size = size
            members = config.replicates * len(config.arms)
            count = 60 if name == "lenet" else 4
            train, _ = steps.make_train_fn(config, members, count)
            times = []
            for _ in range(1 + repeats):
                start = time.perf_counter()
                train()
                times.append(time.perf_counter() - start)
            rates = [members * count * size / seconds for seconds in times[1:]]
            speeds.setdefault(name, {})[str(size)] = round(statistics.median(rates), 1)
            table[f"{name}, batch {size}, {members} members (images/s)"] = (rates, "{:,.0f}")

    def whole_run(run):
        with tempfile.TemporaryDirectory() as workdir:
            start = time.perf_counter()
            command = run.command(Path(workdir) / "run")
            environment = os.environ | {"XDG_CACHE_HOME": workdir}  # it finds no compiled programs
            subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, check=True)
            return time.perf_counter() - start

    plain = Run("mnist5k", (("rounds", rounds),))
    training_alone = cost.seconds(plain, {"images_per_second": speeds})
    taken, repelled = whole_run(plain), whole_run(plain.with_overrides(repulsion__strength=2.0))
    besides, factor = taken - training_alone, 1 + (repelled - taken) / training_alone
    table["a run besides its training (s)"] = ([besides], "{:.1f}")
    table["training with repulsion over without"] = ([factor], "{:.2f}")
    print_table("throughput", table)
    if record:
        entry = {
            "images_per_second": speeds,
            "repulsion": {"lenet": round(factor, 2)},
            "besides": {"lenet": round(besides, 1)},
        }
        write_atomically(cost.MEASURED, json.dumps(cost.read_throughput() | {record: entry}, indent=2) + "\n")
        print(f"recorded as {record!r} in {cost.MEASURED}")


def benchmark_analysis(rounds: int, repeats: int) -> None:
    """Time the analyses of a run of 3 replicates, and its paths, and print the table."""
    import jax

    from imp_jax import analysis, connectivity, runs, training

    config = importlib.import_module("configs.mnist5k").get_config()
    config.rounds, config.epochs = rounds, 1
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        runs.run(config, workdir)
        analyses = []
        for _ in range(1 + repeats):
            shutil.rmtree(f"{workdir}/analysis", ignore_errors=True)
            start = time.perf_counter()
            analysis.run(workdir)
            analyses.append(time.perf_counter() - start)
        networks = analysis.load(workdir).round(rounds - 1).trained
    first, *analyses = analyses

    experiment = imp.setup(config)
    split, spec = experiment.dataset.train, experiment.spec
    one, other = (jax.tree.map(lambda leaf, i=i: leaf[i], networks) for i in (0, 1))
    alone = jax.tree.map(lambda leaf: leaf[:1], networks)
    ratios = []
    for _ in range(1 + 10 * repeats):
        start = time.perf_counter()
        jax.block_until_ready(training.evaluate(alone, split, spec=spec))
        between = time.perf_counter()
        connectivity.path_metrics(one, other, split, spec=spec, num_points=20)
        ratios.append((time.perf_counter() - between) / (between - start))
    print_table(
        f"analyses of configs/mnist5k.py with 1 epoch, {len(experiment.members)} members, {rounds} rounds",
        {
            "all analyses, figures and report (s)": (analyses, "{:.1f}"),
            "the first time, compilation included (s)": ([first], "{:.1f}"),
            "a path of 20 points over one evaluation": (ratios[1:], "{:.1f}"),
        },
    )


def benchmark_repulsion(rounds: int, repeats: int, epochs: int | None) -> None:
    """Time whole runs without and with repulsion in turn, and print the store of each round."""

    from imp_jax import imp, masking, models, repulsion
    from imp_jax.experiment import create_model
    from imp_jax.workdir import checkpoints

    def config_of(strength):
        config = main_job(rounds, epochs)
        config.repulsion.strength = strength
        return config

    with tempfile.TemporaryDirectory() as workdir:  # imports, and the programs that both share
        config = config_of(0.0)
        config.rounds = 1
        time_run(config, workdir)
    plain, repelled, stores = [], [], []
    for repeat in range(1 + repeats):
        with tempfile.TemporaryDirectory() as workdir:
            plain.append(time_run(config_of(0.0), f"{workdir}/plain"))
            repelled.append(time_run(config_of(2.0), f"{workdir}/repelled"))
            if repeat == 0:
                experiment = imp.setup(config_of(2.0))
                with contextlib.closing(checkpoints.Checkpoints(f"{workdir}/repelled")) as of_run:
                    optima, before = None, of_run.restore(0)
                    for number in range(1, rounds):
                        after = of_run.restore(number)
                        optima, before = imp.add_optimum(experiment, optima, before, after.mask), after
                        stores.append(optima.shape)
                sizes = [leaf[0].size for leaf in masking.prunable_leaves(before.mask)]
    (cold_plain, *plain), (cold_repelled, *repelled) = plain, repelled
    print_table(
        f"configs/mnist5k.py, {len(experiment.members)} members, {rounds} rounds",
        {
            "run without repulsion (s)": (plain, "{:.1f}"),
            "run with λ = 2 (s)": (repelled, "{:.1f}"),
            "ratio": ([b / a for a, b in zip(plain, repelled, strict=True)], "{:.2f}"),
            "ratio of the first, which compiles": ([cold_repelled / cold_plain], "{:.2f}"),
            "programs it compiles": ([len(set(stores))], "{:d}"),
        },
    )
    print_stores(f"LeNet-300-100, P = {sum(sizes):,}: store of a member, MB", sum(sizes), stores)

    config = importlib.import_module("configs.resnet50").get_config()
    params = models.shapes(create_model(config, 1000, (224, 224, 3)), (224, 224, 3))["params"]
    sizes = [leaf.size for leaf in masking.prunable_leaves(params)]
    stores, shape = [], None
    for number in range(1, rounds):
        needed = [round(0.8**number * n) for n in sizes]
        shape = repulsion.next_store_shape(shape, number, rounds - 1, needed, sum(sizes))
        stores.append(shape)
    print_stores(f"ResNet-50, P = {sum(sizes):,}: computed, layers pruned alike, MB", sum(sizes), stores)


def benchmark_checkpoints(rounds: int, repeats: int, epochs: int | None) -> None:
    """Time whole runs that save their state every so many epochs, in turn with one that does not."""
    config = main_job(rounds, epochs)
    seconds = {every: [] for every in (config.epochs, config.checkpoint_every_epochs, 1)}
    for _ in range(1 + repeats):
        for every, times in seconds.items():
            config.checkpoint_every_epochs = every
            with tempfile.TemporaryDirectory() as workdir:
                times.append(time_run(config, workdir))
    without, *others = ((every, times[1:]) for every, times in seconds.items())
    print_table(
        f"configs/mnist5k.py, {rounds} rounds of {config.epochs} epochs",
        {"run without states within rounds (s)": (without[1], "{:.1f}")}
        | {
            f"more with one every {every} epochs": (
                [b / a - 1 for a, b in zip(without[1], times, strict=True)],
                "{:.1%}",
            )
            for every, times in others
        },
    )


def benchmark_disk(rounds: int) -> None:
    """Save what runs of the four configs leave, cut by a fifth a round, and print the sizes."""
    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from imp_jax import divergence, masking, models, optimizers, training
    from imp_jax.experiment import create_model
    from imp_jax.workdir.checkpoints import Checkpoints, MidRoundState, RoundNetworks

    shown = [number for number in (0, 5, 10, 20) if number < rounds]
    table = Table(
        "MB",
        "members",
        *(f"round {number}" for number in shown),
        f"{rounds} rounds",
        "state within a round",
    )
    draw = np.random.default_rng(0)
    for name in ("lenet", *NETWORKS):
        config = importlib.import_module(f"configs.{name}").get_config()
        _, image_shape, classes = networks.SETS[config.dataset.name]
        shapes = models.shapes(create_model(config, classes, image_shape), image_shape)
        members = config.replicates * len(config.arms)

        def of_members(make, tree, members=members):
            return jax.tree.map(lambda leaf: jax.numpy.asarray(make((members, *leaf.shape))), tree)

        initial, trained = (
            of_members(lambda s: draw.normal(size=s).astype(np.float32), shapes) for _ in range(2)
        )
        mask, prunable = masking.ones_like(initial["params"]), masking.prunable(shapes["params"])
        sizes = []
        for number in range(rounds):
            if number:
                survive = of_members(lambda s: draw.random(s) < 0.8, shapes["params"])
                mask = jax.tree.map(lambda m, s, p: m & s if p else m, mask, survive, prunable)
            one, other = ({**v, "params": masking.apply(v["params"], mask)} for v in (initial, trained))
            with tempfile.TemporaryDirectory() as workdir:
                os.mkdir(f"{workdir}/checkpoints")
                with contextlib.closing(Checkpoints(workdir)) as checkpoints:
                    checkpoints.save(number, RoundNetworks(one, other, mask), [])
                    sizes.append(size_of(f"{workdir}/checkpoints"))
                    if number == 0:
                        states = training.init_states(other, mask, optimizer=optimizers.make_optimizer(config))
                        seen = divergence.init_history(members)
                        checkpoints.save_progress(0, MidRoundState(1, one, states, seen, 0.0), steps=2)
                        state = size_of(f"{workdir}/progress")
        cells = [*(sizes[number] for number in shown), sum(sizes), state]
        table.add_row(name, str(members), *(f"{megabytes:,.1f}" for megabytes in cells))
    Console(soft_wrap=True).print(table)


def size_of(folder: str) -> float:
    """The MB of all files in a folder."""
    return sum(os.path.getsize(f"{at}/{file}") for at, _, files in os.walk(folder) for file in files) / 1e6


def main_job(rounds: int, epochs: int | None) -> ConfigDict:
    """configs/mnist5k.py without twins, whose rounds are of another size and compiled once more."""
    config = importlib.import_module("configs.mnist5k").get_config()
    config.rounds, config.epochs, config.instability.rounds = rounds, epochs or config.epochs, ()
    return config


def time_run(config: ConfigDict, workdir: str) -> float:
    """The seconds that all rounds of a config take."""
    from imp_jax import imp

    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in imp.rounds(config, workdir):
            pass
    return time.perf_counter() - start


def print_stores(title: str, parameters: int, stores: list[tuple[int, ...]]) -> None:
    """The store in each round from 1, for `stores` of (rows, slots of each leaf), beside whole networks."""
    from rich.console import Console
    from rich.table import Table

    table = Table("round", "rows × slots", "numbers / P", "float32", "bfloat16", "naive", title=title)
    for number, (rows, *slots) in enumerate(stores, start=1):
        slots = sum(slots)
        table.add_row(
            str(number),
            f"{rows} × {slots:,}",
            f"{rows * slots / parameters:.2f}",
            *(f"{slots * (4 + size * rows) / 1e6:,.2f}" for size in (4, 2)),  # with a position a slot
            f"{4 * number * parameters / 1e6:,.2f}",
        )
    Console(soft_wrap=True).print(table)


def print_table(title: str, quantities: dict[str, tuple[list[float], str]]) -> None:
    """Median, minimum and maximum of each quantity, and the memory the process has needed."""
    import jax
    from rich.console import Console
    from rich.table import Table

    device = jax.devices()[0]
    table = Table(
        "quantity", "median", "min", "max", title=f"{title} on {device.device_kind}, JAX {jax.__version__}"
    )
    for name, (values, pattern) in quantities.items():
        spread = [pattern.format(f(values)) for f in (min, max)] if len(values) > 1 else ["", ""]
        table.add_row(name, pattern.format(statistics.median(values)), *spread)
    on_device = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if on_device:
        table.add_row("peak device memory (GiB)", f"{on_device / 2**30:.2f}", "", "")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table.add_row("peak host memory (GiB)", f"{peak:.2f}", "", "")
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
