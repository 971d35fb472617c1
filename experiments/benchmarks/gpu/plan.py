"""Compile the GPU program of each network without a GPU: `python -m experiments.benchmark gpu-plan`.

For each row XLA compiles the training program for the GPU of --device. The table has what the program tells:
the kernels of a step, the calls of cuDNN, the bytes and products of an image beside the least that the layers
need, the peak of memory, and whether the host launches kernels or a CUDA graph. The images/s are predicted from
these numbers, see `estimate`. *Nothing is measured.*
"""

import concurrent.futures
import importlib.metadata
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import steps
from experiments.benchmarks.gpu import estimate, hlo, targets
from experiments.benchmarks.tables import require_folder_of
from experiments.benchmarks.work import count_work
from experiments.paper import catalogue
from experiments.paper.scales import PAPER
from experiments.sweeps import cost
from experiments.sweeps.runs import load_config
from imp_jax.errors import UserError, user_path
from imp_jax.runtime import devices
from imp_jax.workdir.files import write_atomically

WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
DTYPES = ("float32", "bfloat16")
BATCH_SIZES = (128, 512, 2048)
MEMBERS = (1, 3, 6)
FORMS = {name: mode for name, mode in steps.FORMS.items() if name != "patches"}
CONFIGS = {"lenet": "mnist5k", "conv4": "conv4", "resnet20": "resnet20", "resnet50": "resnet50"}


class Row(NamedTuple):
    """One program of the table."""

    network: str  # a key of CONFIGS
    members: int
    batch_size: int
    dtype: str
    form: str  # a key of FORMS


class Plan(NamedTuple):
    """What is known about a program before it has run on a GPU."""

    row: Row
    kernels: int  # of a step, with calls of cuDNN and cuBLAS
    small_kernels: int  # that move less than `estimate.SMALL_BYTES`
    convolutions: int
    largest_window: int  # of a convolution, in pixels
    transposes: int  # kernels that transpose or copy at least `estimate.SMALL_BYTES`
    mbytes_per_image: float
    least_mbytes_per_image: float
    mflop_per_image: float
    least_mflop_per_image: float
    peak_gib: float
    graphs: int  # launched by the host in each step
    launches: int  # of kernels and library calls outside of graphs, in each step
    epoch_is_a_graph: bool
    images_per_second: estimate.Range


# every network, and for ResNet-20 batch sizes and forms
DEFAULT_ROWS = (
    Row("lenet", 6, 60, "float32", "vmapped"),
    Row("conv4", 6, 128, "bfloat16", "per_member"),
    *(Row("resnet20", 6, size, "float32", "per_member") for size in (128, 2048)),
    *(Row("resnet20", 6, size, "bfloat16", "per_member") for size in BATCH_SIZES),
    *(Row("resnet20", 6, 128, "bfloat16", form) for form in ("unrolled", "vmapped", "grouped")),
    Row("resnet50", 1, 128, "bfloat16", "per_member"),
)


def list_all_rows() -> list[Row]:
    """Return the rows of every network, number of members, batch size, dtype and form."""
    return [
        Row(network, members, size, dtype, form)
        for network in CONFIGS
        for members in MEMBERS
        for size in ((60, *BATCH_SIZES) if network == "lenet" else BATCH_SIZES)
        for dtype in DTYPES
        for form in FORMS
    ]


def choose_rows(rows: Iterable[Row], **choices: Any) -> list[Row]:
    """Return the rows with the values `choices`, without those that have the same program as another.

    Args:
      choices: values of fields of `Row`, or None. Members and batch sizes may be values that no row has.
    """
    numbers = {name: choices[name] for name in ("members", "batch_size") if choices.get(name)}
    rows = list(dict.fromkeys(_choose_form(row._replace(**numbers)) for row in rows))
    return [
        row for row in rows if all(not value or getattr(row, name) == value for name, value in choices.items())
    ]


def _choose_form(row):
    """Choose one of the forms that have the same program: all of one member, and three of LeNet."""
    if row.network == "lenet":
        return row._replace(form="unrolled" if row.form == "unrolled" and row.members > 1 else "vmapped")
    return row._replace(form="per_member") if row.members == 1 else row


def print_plan(
    rows: Sequence[Row], gpu_name: str, wheels: Path, out: str | None = None, *, install: bool = False
) -> None:
    """Compile all rows for a GPU, print the table and what the paper's sweeps would take.

    Args:
      gpu_name: a key of `targets.GPUS`.
      wheels: folder of `WHEELS`.
      out: a file to which the table is written as JSON.
      install: whether to install the wheels first.

    Raises:
      UserError: there are no rows; the wheels are missing, of another version, or cannot be installed; the
        folder of `out` does not exist; or the text of a program cannot be read.
    """
    if not rows:
        raise UserError("no row of the table has these values; add --full, or leave some of them out")
    require_folder_of(out)
    if install:
        install_wheels(wheels)
    check_wheels(wheels)
    plans = []
    for plan in compile_rows(rows, gpu_name, wheels):
        plans.append(plan)
        print(f"compiled {len(plans)} of {len(rows)}: {describe_row(plan.row)}", file=sys.stderr)
    plans.sort(key=lambda plan: rows.index(plan.row))
    gpu = targets.GPUS[gpu_name]
    Console(width=200).print(make_table(plans, gpu))
    for line in describe_sweeps(plans, gpu):
        print(line)
    if out:
        table = {"gpu": gpu_name, "jax": jax.__version__, "rows": [_to_json(plan) for plan in plans]}
        write_atomically(Path(out), json.dumps(table, indent=2) + "\n")


def default_wheels_folder() -> Path:
    """Return the folder of the wheels, outside of the environment: with them, JAX would look for a GPU."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return user_path(cache / "imp_jax" / f"cuda-plugin-{jax.__version__}", "the folder of the wheels")


def install_command(wheels: Path) -> list[str]:
    """Return the command that installs the wheels into their folder."""
    versions = [f"{name}=={jax.__version__}" for name in WHEELS]
    target = ["--no-deps", "--upgrade", "--target", str(wheels)]
    return [sys.executable, "-m", "pip", "install", *target, *versions]


def install_wheels(wheels: Path) -> None:
    """Install the wheels into their folder. Raises `UserError` if pip fails, after it has printed why."""
    if subprocess.run(install_command(wheels), check=False).returncode:
        raise UserError(f"the wheels {' and '.join(WHEELS)} could not be installed into {wheels}")


def check_wheels(wheels: Path) -> None:
    """Raise a `UserError` that names the command to type unless the folder has the wheels of JAX's version."""
    found = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions(path=[str(wheels)])
    }
    if any(found.get(name) != jax.__version__ for name in WHEELS):
        raise UserError(
            f"{wheels} has no {' and '.join(WHEELS)} of version {jax.__version__}, with which programs are "
            f"compiled for a GPU (132 MB, not installed into this environment); add --install, or type\n  "
            f"{shlex.join(install_command(wheels))}"
        )


def compile_rows(rows: Sequence[Row], gpu_name: str, wheels: Path) -> Iterator[Plan]:
    """Compile rows in processes of their own, which see the wheels; yield plans as they are finished."""
    changed = {  # read by the processes when they start
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # XLA writes no thunk sequence of a cached program
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    workers = max(1, min(devices.available_cores(), len(rows), 8))
    try:
        with concurrent.futures.ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_append_to_path,  # before JAX looks for plugins
            initargs=(str(wheels),),
        ) as pool:
            # the longest first
            by_length = sorted(rows, key=lambda row: -row.members * (row.form == "unrolled"))
            futures = [pool.submit(compile_row, row, gpu_name) for row in by_length]
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # otherwise the other rows are compiled first
                raise
    except hlo.UnknownTextError as error:
        raise UserError(
            f"the text of XLA's programs in JAX {jax.__version__} differs from that of JAX 0.10, which "
            f"experiments/benchmarks/gpu/hlo.py reads ({error}); use that version, or change the reader"
        ) from error
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a process that compiled was killed; is there enough memory (1 GB each)?") from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _append_to_path(folder):
    sys.path.append(folder)


def compile_row(row: Row, gpu_name: str) -> Plan:
    """Compile the program of a row for a GPU and read it. The wheels must be on `sys.path`."""
    from experiments.benchmarks.gpu.programs import compile_training  # not needed where rows are only listed

    config = load_config(CONFIGS[row.network])
    config.batch_size, config.dtype = row.batch_size, row.dtype
    least = count_work(config)
    gpu = targets.GPUS[gpu_name]
    compiled = compile_training(config, row.members, FORMS[row.form], targets.make_device(gpu))
    step, launches = hlo.read_step(compiled.hlo), hlo.read_launches(compiled.thunks)
    images = row.members * row.batch_size
    convolutions = [kernel for kernel in step.kernels if kernel.kind == "convolution"]
    large = [kernel for kernel in step.kernels if kernel.bytes >= estimate.SMALL_BYTES]
    return Plan(
        row=row,
        kernels=len(step.kernels),
        small_kernels=len(step.kernels) - len(large),
        convolutions=len(convolutions),
        largest_window=max((kernel.window for kernel in convolutions), default=0),
        transposes=sum(kernel.kind == "transpose" for kernel in large),
        mbytes_per_image=sum(kernel.bytes for kernel in step.kernels) / images / 1e6,
        least_mbytes_per_image=(least.activations + least.state / row.batch_size) / 1e6,
        mflop_per_image=sum(kernel.flops for kernel in step.kernels) / images / 1e6,
        least_mflop_per_image=least.flops / 1e6,
        peak_gib=compiled.peak_bytes / 2**30,
        graphs=launches.graphs,
        launches=launches.external_calls + launches.kernels,
        epoch_is_a_graph=launches.loop_in_graph,
        images_per_second=estimate.estimate_images_per_second(step, launches, images, gpu),
    )


def describe_row(row: Row) -> str:
    """Return a row's name, such as "resnet20: 6 × 128, bfloat16, unrolled"."""
    form = f", {row.form}" if row.members > 1 else ""
    return f"{row.network}: {row.members} × {row.batch_size}, {row.dtype}{form}"


def make_table(plans: Sequence[Plan], gpu: targets.Gpu) -> Table:
    """Make the table of all plans."""
    title = f"programs compiled for {gpu.name}, JAX {jax.__version__}; images/s predicted, not measured"
    table = Table("members × batch", title=title)
    for heading in (
        "kernels/step (small)",
        "convolutions (window)",
        "transposes",
        "MB/image (least)",
        "MFLOP/image (least)",
        "GiB",
        "host/step",
        "images/s of all, predicted",
    ):
        table.add_column(heading, no_wrap=True, justify="right")
    for plan in plans:
        launches = "0 (1 graph/epoch)" if plan.epoch_is_a_graph else f"{plan.graphs} graphs + {plan.launches}"
        low, middle, high = map(_round, plan.images_per_second)
        table.add_row(
            describe_row(plan.row),
            f"{plan.kernels:,} ({plan.small_kernels:,})",
            f"{plan.convolutions} ({plan.largest_window})" if plan.convolutions else "",
            str(plan.transposes),
            f"{plan.mbytes_per_image:,.2f} ({plan.least_mbytes_per_image:,.2f})",
            f"{plan.mflop_per_image:,.1f} ({plan.least_mflop_per_image:,.1f})",
            f"{plan.peak_gib:.2f}",
            launches,
            f"{middle:,} ({low:,} to {high:,})",
        )
    return table


def _round(speed):
    """Round to two digits, because a prediction has no more."""
    return int(float(f"{speed:.1e}"))


def describe_sweeps(plans: Sequence[Plan], gpu: targets.Gpu) -> Iterator[str]:
    """Say what figure 1 and the ResNet-50 table would take on one GPU, by dtype.

    Each run has the speed of the fastest form and number of members that fits in memory; between the compiled
    batch sizes, images/s are interpolated.
    """
    for name, network in (("fig1", "resnet20"), ("tablec", "resnet50")):
        runs = [run for run in catalogue.FIGURES[name].runs(PAPER) if cost.network_key(run.config) == network]
        images = sum(map(cost.count_images, runs))
        for dtype in DTYPES:
            matching = [
                plan
                for plan in plans
                if (plan.row.network, plan.row.dtype) == (network, dtype)
                and plan.peak_gib * 2**30 < gpu.memory_bytes
            ]
            if not matching:
                continue
            hours = []
            for low_middle_high in range(3):
                speeds: dict[str, float] = {}
                for plan in matching:
                    speed = plan.images_per_second[low_middle_high]
                    size = str(plan.row.batch_size)
                    speeds[size] = max(speeds.get(size, 0), speed)
                device = {"images_per_second": {network: speeds}}
                hours.append(sum(cost.estimate_seconds(run, device) for run in runs) / 3600)
            yield (
                f"{name}, {network}, {images / 1e9:.2f} billion images in {dtype}: {hours[1]:.1f} h "
                f"({hours[2]:.1f} to {hours[0]:.1f}) on one {gpu.name}, predicted, not measured"
            )


def _to_json(plan):
    return plan._asdict() | {
        "row": plan.row._asdict(),
        "images_per_second": plan.images_per_second._asdict(),
    }
