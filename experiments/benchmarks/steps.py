"""Training steps of all networks, timed: `python -m experiments.benchmark table`, or that of one network.

Each network is timed in a process of its own, on random images in the real shapes: in memory with augmentation
for CIFAR-10, and as they come from a stream, whose decoding is not timed, for ImageNet. The machine's peaks, of
a large matrix product and of a copy, are measured in the same process.
"""

import argparse
import contextlib
import datetime
import importlib
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.benchmarks.train_fn import make_train_fn
from experiments.paper import networks
from experiments.sweeps.runs import REPOSITORY
from imp_jax.errors import UserError
from imp_jax.workdir.files import write_atomically

REPULSION_ROUND = 8  # of which the row of repulsion is: so many rounds are behind it, and optima in its store


class Row(NamedTuple):
    config: str
    steps: int  # of a timing
    members_on_cpu: int | None = None  # where those of the config would take long
    batch_on_cpu: int | None = None
    strength: float = 0.0  # of repulsion


ROWS = {
    "lenet": Row("mnist5k", 60),
    "repulsion": Row("mnist5k", 60, strength=2.0),
    "conv4": Row("conv4", 8, members_on_cpu=2),
    "resnet20": Row("resnet20", 8, members_on_cpu=2),
    "resnet50": Row("resnet50", 2, batch_on_cpu=16),
}
FORMS = {"unrolled": "unrolled", "grouped": "grouped convolution", "patches": "product of patches"}
_WORK = ("machine", "members", "batch_size", "dtype", "execution")  # what two rows have alike to be compared
IN_TORCH = ("lenet", "conv4", "resnet20")


def benchmark(
    names: Iterable[str], options: Sequence[str], torch: bool, out: str | None, old: str | None
) -> None:
    """Time the rows `names`, print their table, keep it as JSON in `out`, and compare it with `old`.

    Args:
      options: of `main`, the same for all.

    Raises:
      UserError: `old` is not such a table; there is no place for `out`; a row's process was killed.
    """
    before = read(old) if old else None
    if out and not Path(out).resolve().parent.is_dir():
        raise UserError(f"--out is {out!r}, whose folder is not there; it should be a file to be written")
    rows = {}
    for name in names:
        rows[name] = row_of(name, [*options, *["--torch"] * (torch and name in IN_TORCH)])
    print_table(rows)
    table = {"date": datetime.date.today().isoformat(), "rows": rows}
    if before:
        print_ratios(before, table)
    if out:
        write_atomically(Path(out), json.dumps(table, indent=2) + "\n")
        print(f"kept as {out}")


def benchmark_forms(
    network: str, members: Sequence[int], batch_sizes: Sequence[int], options: Sequence[str]
) -> None:
    """Time the forms that the convolutions of several members may take, and print images/s of all.

    Unrolled, they follow each other; vmapped, they are one grouped convolution, or one batched product of
    patches. On a CPU each step is a program, on a GPU an epoch.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("members × batch", *FORMS.values(), title=f"images/s of all, {network}")
    for count, size in itertools.product(members, batch_sizes):
        cells = []
        for form in FORMS:
            row = row_of(network, [*options, f"--members={count}", f"--batch_size={size}", f"--form={form}"])
            rates = row["images_per_second"]
            cells.append(f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})")
        table.add_row(f"{count} × {size}", *cells)
    Console(width=120).print(table)


def row_of(name: str, options: Sequence[str]) -> dict:
    """A row of the table, timed in a process of its own; ends this one where it could not be."""
    command = [sys.executable, "-m", "experiments.benchmarks.steps", name, *options]
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # compilation is timed
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode < 0:
        raise UserError(f"{name} could not be timed: its process ended by signal {-done.returncode}")
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def read(path: str) -> dict:
    """The table that `benchmark` kept as JSON.

    Raises:
      UserError: it cannot be read, or is not one.
    """
    try:
        table = json.loads(Path(path).read_text())
        keys = {"images_per_second", "compilation", "memory", *_WORK}
        if not table["date"] or any(keys - row.keys() for row in table["rows"].values()):
            raise KeyError("something is missing")
        return table
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--compare is {path!r}, which cannot be read as a table of --out: {type(error).__name__}: {error}"
        ) from error


def print_table(rows: dict[str, dict]) -> None:
    """A line a network: medians, with minimum and maximum of the images/s."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()))
    title = f"training steps on {first['machine']}, {first['versions']}"
    table = Table(
        "members × batch", "images/s of all (min to max)", "step (ms)", "TFLOP/s", "of peak", title=title
    )
    for heading in ("GB/s", "of peak", "compilation (s)", "memory (GiB)"):
        table.add_column(heading)
    leads = list(dict.fromkeys(contender for row in rows.values() for contender in row["lead"]))
    for contender in leads:
        table.add_column(f"× {contender}")
    for name, row in rows.items():
        rates = row["images_per_second"]
        rate = statistics.median(rates)
        flops, moved = rate * row["flops_per_image"], rate * row["bytes_per_image"]
        lead = [row["lead"].get(contender, []) for contender in leads]
        table.add_row(
            f"{name}: {row['members']} × {row['batch_size']}, {row['dtype']}",
            f"{rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
            f"{1e3 * row['members'] * row['batch_size'] / rate:,.2f}",
            f"{flops / 1e12:.3f}",
            f"{flops / row['peak_flops']:.0%}",
            f"{moved / 1e9:,.1f}",
            f"{moved / row['peak_bytes']:.0%}",
            f"{row['compilation']:.1f}",
            f"{row['memory']:.2f}",
            *(f"{statistics.median(values):.2f}" if values else "" for values in lead),
        )
    Console(width=200).print(table)
    for name, row in rows.items():
        print(
            f"{name}: {row['execution']}; {row['flops_per_image'] / 1e6:,.2f} MFLOP and at least "
            f"{row['bytes_per_image'] / 1e6:,.3f} MB an image; peaks {row['peak_flops'] / 1e12:.2f} TFLOP/s, "
            f"{row['peak_bytes'] / 1e9:,.0f} GB/s"
        )


def print_ratios(before: dict, now: dict) -> None:
    """What changed between two tables, as ratios of medians."""
    from rich.console import Console
    from rich.table import Table

    table = Table("now over then", "images/s", "compilation", "memory", title=f"compared with {before['date']}")
    for name in now["rows"].keys() & before["rows"].keys():
        row, old = now["rows"][name], before["rows"][name]
        alike = all(row[k] == old[k] for k in _WORK)
        table.add_row(
            name + ("" if alike else " (not the same work, or machine)"),
            f"{statistics.median(row['images_per_second']) / statistics.median(old['images_per_second']):.2f}",
            f"{row['compilation'] / old['compilation']:.2f}" if old["compilation"] > 0 else "",
            f"{row['memory'] / old['memory']:.2f}",
        )
    Console(soft_wrap=True).print(table)


def main() -> None:
    """Time one row, and print it as a line of JSON; `benchmark` starts this."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.steps", description=main.__doc__)
    parser.add_argument("name", choices=ROWS)
    for name in ("repeats", "members", "batch_size", "steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--execution")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--form", choices=FORMS)
    try:
        print(json.dumps(time_row(parser.parse_args())))
    except UserError as error:
        sys.exit(f"error: {error}")


def time_row(arguments: argparse.Namespace) -> dict:
    """A row of the table: what was timed, and all it took."""
    import jax

    from imp_jax import training
    from imp_jax.runtime import devices

    devices.use_one_device_per_cpu_core()
    if arguments.form == "patches":
        training.use_kernels = use_patches
    row, on_cpu = ROWS[arguments.name], jax.default_backend() == "cpu"
    config = importlib.import_module(f"configs.{row.config}").get_config()
    config.repulsion.strength = row.strength
    config.batch_size = arguments.batch_size or (on_cpu and row.batch_on_cpu) or config.batch_size
    config.dtype = arguments.dtype or config.dtype
    config.execution = arguments.execution or config.execution
    if arguments.form:
        config.execution = (
            f"{'step' if on_cpu else 'scan'}_{'unroll' if arguments.form == 'unrolled' else 'vmap'}"
        )
    of_config = config.replicates * len(config.arms)
    members = arguments.members or (on_cpu and row.members_on_cpu) or of_config
    steps = arguments.steps or row.steps
    ours, execution = make_train_fn(
        config, members, steps, earlier_rounds=REPULSION_ROUND if row.strength else 0
    )

    def seconds(train):
        start = time.perf_counter()
        train()
        return time.perf_counter() - start

    first = seconds(ours)
    ours()
    on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    unit = 1 if sys.platform == "darwin" else 1024
    memory = on_device or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contenders = torch_contenders(arguments.name, members * steps, config.batch_size) if arguments.torch else {}
    for train in contenders.values():
        train()
    times, theirs = [], {name: [] for name in contenders}
    for _ in range(arguments.repeats or 5):
        times.append(seconds(ours))
        for name, train in contenders.items():
            theirs[name].append(seconds(train))
    work = work_of(config)
    mesh = devices.make_mesh(members, config.batch_size, member=config.mesh.member, data=config.mesh.data)
    places = mesh.size if mesh and not on_cpu else 1  # the devices of a CPU share its cores
    peak_flops, peak_bytes = (places * peak for peak in peaks(config.dtype))
    return {
        "machine": f"{jax.devices()[0].device_kind}, {machine()}",
        "versions": f"JAX {jax.__version__}, Python {platform.python_version()}",
        "members": members,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "execution": execution,
        "images_per_second": [members * steps * config.batch_size / s for s in times],
        "compilation": first - statistics.median(times),
        "memory": memory / 2**30,
        "flops_per_image": work.flops,
        "bytes_per_image": work.activations + work.state / config.batch_size,
        "peak_flops": peak_flops,
        "peak_bytes": peak_bytes,
        "lead": {
            name: [taken / own for taken, own in zip(of_theirs, times, strict=True)]
            for name, of_theirs in theirs.items()
        },
    }


@contextlib.contextmanager
def use_patches(implementation: str) -> Iterator[None]:
    """Like `fast_cpu.use_kernels`, with every convolution of `nn.Conv` computed by `by_patches`."""
    from imp_jax.models import fast_cpu

    patches = fast_cpu.convolution.replace_convolutions(by_patches)  # the first to see a layer
    with patches, fast_cpu.use_kernels(implementation):
        yield


def by_patches(images, kernel, strides, padding, **_):
    """`lax.conv_general_dilated` in NHWC and HWIO, as a product of patches; under vmap a batched one."""
    import jax.numpy as jnp
    from jax import lax

    rows, columns, inputs, outputs = kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    height, width = (
        (size - side) // stride + 1
        for size, side, stride in zip(padded.shape[1:3], kernel.shape, strides, strict=False)
    )
    shifted = [
        lax.slice_in_dim(
            lax.slice_in_dim(padded, row, row + (height - 1) * strides[0] + 1, strides[0], axis=1),
            column,
            column + (width - 1) * strides[1] + 1,
            strides[1],
            axis=2,
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(rows * columns * inputs, outputs)


class Work(NamedTuple):
    """What a training step of a member does at least."""

    flops: float  # of an image: multiplications and additions of matrix products and convolutions
    activations: float  # bytes an image moves: see `work_of`
    state: float  # bytes a step moves besides: weights, optimizer, gradient and mask


def work_of(config: ConfigDict) -> Work:
    """The work of a step, from the shapes of the layers that have kernels.

    Products: forward, by the weights, and by the inputs but in the first layer. Bytes: with all between two
    products done as they are read, a layer's output is written once, read by the next layer and once more
    backwards; its gradient is written once and read by both products: 6 times its size. Where it is normalised,
    statistics read it once more before, and those of its gradient read both: 9 times. Weights and moments are
    read and written, the gradient too, and the mask is read. Products with padding count; of repulsion
    nothing does.
    """
    import jax
    from flax import traverse_util

    from imp_jax import experiment, models

    _, image_shape, classes = networks.SETS[config.dataset.name]
    model = experiment.create_model(config, classes, image_shape)
    variables = models.shapes(model, image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    _, seen = jax.eval_shape(
        lambda variables, image: model.apply(
            variables, image, capture_intermediates=True, mutable=["intermediates"]
        ),
        variables,
        image,
    )
    outputs = traverse_util.flatten_dict(seen["intermediates"])
    kernels = {
        path[:-1]: leaf
        for path, leaf in traverse_util.flatten_dict(variables["params"]).items()
        if path[-1] == "kernel"
    }
    sizes = {path: math.prod(outputs[(*path, "__call__")][0].shape) for path in kernels}
    products = {path: 2 * sizes[path] * math.prod(kernel.shape[:-1]) for path, kernel in kernels.items()}
    of_images = (
        math.prod(image_shape),
        image_shape[-1],
    )  # inputs of the first layer, by kernels of 2 or 4 axes
    first = next(path for path, kernel in kernels.items() if kernel.shape[-2] == of_images[kernel.ndim == 4])
    touches = 9 if len(variables) > 1 else 6
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    moments = sum(
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(experiment.make_optimizer(config).init, variables["params"]))
    )
    return Work(
        flops=3 * sum(products.values()) - products[first],
        activations=touches * sum(sizes.values()) * jax.numpy.dtype(config.dtype).itemsize,
        state=2 * 4 * (params + moments + params) + params,
    )


def peaks(dtype: str) -> tuple[float, float]:
    """FLOP/s of a large square product of this type, and bytes/s of adding to a large row: the best of ten."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    side, count = (2048, 2**26) if on_cpu else (8192, 2**28)
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    row = jax.numpy.zeros(count, "float32")

    def fastest(function, argument, chained):
        times = []
        for _ in range(11):
            start = time.perf_counter()
            result = jax.block_until_ready(function(argument))
            times.append(time.perf_counter() - start)
            argument = result if chained else argument
        return min(times[1:])

    product = jax.jit(lambda square: square @ square)
    add = jax.jit(lambda row: row + 1, donate_argnums=0)  # or a CPU would be busy with getting new memory
    return 2 * side**3 / fastest(product, square, False), 2 * row.nbytes / fastest(add, row, True)


def machine() -> str:
    """The processor and how many cores of it this process may use."""
    from imp_jax.runtime import devices

    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(": ")[2] if lines else name
    return f"{devices.available_cores()} cores of {name}"


def torch_contenders(network: str, steps: int, batch_size: int) -> dict[str, Callable[[], None]]:
    """So many steps of a network in eager PyTorch, on all cores: several would follow each other.

    Raises:
      UserError: there is no PyTorch, or no torchvision.
    """
    try:
        import torch

        from experiments.benchmarks import torch_reference
        from imp_jax.runtime import devices
    except ImportError as error:
        raise UserError('--torch needs PyTorch and torchvision: pip install -e ".[bench]"') from error
    torch.set_num_threads(devices.available_cores())

    def repeated(step):
        def train():
            for _ in range(steps):
                step()

        return train

    contenders = torch_reference.steppers(network, batch_size)
    return {name: repeated(step) for name, step in contenders.items()}


if __name__ == "__main__":
    main()
