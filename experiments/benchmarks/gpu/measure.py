"""Measure a GPU within a given time: `python -m experiments.benchmark gpu --minutes=8 --out=FILE`.

The tasks are in order of their value, each in a process of its own, so that one that fails does not end the
others: agreement with a CPU (`agreement`), training steps in each form and under other settings of XLA, and
whole rounds with checkpoints (`gpu_rounds`). The file is written after each. Images/s are compared with the
prediction for an H100 in predicted.json, which `gpu-plan --measured --out=FILE` writes.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.gpu import agreement
from experiments.benchmarks.gpu.plan import Row, describe_row
from experiments.benchmarks.tables import require_folder_of
from experiments.sweeps.runs import REPOSITORY
from imp_jax.errors import UserError, one_line
from imp_jax.runtime.distributed import visible_gpus
from imp_jax.workdir.files import write_atomically

PREDICTED = Path(__file__).parent / "predicted.json"
ON_GPU = {"JAX_PLATFORMS": "cuda"}  # otherwise JAX uses the CPU if it cannot use the GPU
EPOCH_IMAGES = 50_000  # a timing is about an epoch of CIFAR-10, but at least 20 steps
LEAST_SECONDS = 20  # a task is not started with less time left


class Setting(NamedTuple):
    """A setting of XLA or JAX, by environment variables."""

    name: str = ""
    environment: Mapping[str, str] = MappingProxyType({})


class Task(NamedTuple):
    """What is measured, in processes of its own."""

    name: str
    measure: Callable[..., dict]  # of the timeout in s; returns a dict for JSON


NO_GRAPHS = Setting("no CUDA graphs", {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="})
HIGHEST = Setting("products in float32", {"JAX_DEFAULT_MATMUL_PRECISION": "highest"})
DETERMINISTIC = Setting("deterministic", {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"})

STEPS = (
    *((Row("resnet20", 6, 512, "bfloat16", form), Setting()) for form in ("per_member", "grouped")),
    (Row("resnet20", 6, 512, "bfloat16", "per_member"), NO_GRAPHS),
    (Row("resnet20", 6, 128, "bfloat16", "per_member"), Setting()),
    (Row("resnet20", 6, 128, "float32", "per_member"), Setting()),
    (Row("lenet", 6, 60, "float32", "vmapped"), Setting()),
    (Row("resnet20", 6, 2048, "bfloat16", "per_member"), Setting()),
    *((Row("resnet20", 6, 512, "bfloat16", form), Setting()) for form in ("vmapped", "unrolled")),
    (Row("resnet20", 6, 128, "bfloat16", "grouped"), Setting()),
    *((Row("conv4", 6, 128, "bfloat16", form), Setting()) for form in ("per_member", "grouped")),
    (Row("resnet50", 1, 128, "bfloat16", "per_member"), Setting()),
    (Row("resnet20", 6, 512, "bfloat16", "per_member"), DETERMINISTIC),
    (Row("resnet20", 6, 512, "float32", "per_member"), HIGHEST),
)


def benchmark_gpu(minutes: float, out: str) -> None:
    """Measure the first visible GPU for `minutes`, print the tables, and write them to `out` as JSON.

    Raises:
      UserError: no GPU is visible, the folder of `out` does not exist, or `out` does.
    """
    gpus = visible_gpus(os.environ)
    if not gpus:
        raise UserError(
            "no GPU is visible: nvidia-smi lists none, or JAX_PLATFORMS or CUDA_VISIBLE_DEVICES hides it; "
            "gpu-plan predicts the speed of a GPU on any machine"
        )
    require_folder_of(out)
    if Path(out).exists():
        raise UserError(f"--out is {out!r}, which exists; move it away, or give another name")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]  # one GPU, as in the predictions
    table = run_tasks(list_tasks(), 60 * minutes, Path(out))
    print_tables(table)
    print(f"table: {out}")


def list_rows() -> list[Row]:
    """Return the rows whose training steps are timed."""
    return list(dict.fromkeys(row for row, _ in STEPS))


def list_tasks() -> list[Task]:
    """Return all tasks, the most valuable first."""
    steps = [make_steps_task(row, setting) for row, setting in STEPS]
    others = (
        Task("agreement with a CPU", measure_agreement),
        Task("whole rounds of resnet20: 6 × 512, bfloat16", measure_rounds),
    )
    return [others[0], *steps[:4], others[1], *steps[4:]]


def run_tasks(tasks: Sequence[Task], seconds: float, out: Path) -> dict:
    """Run tasks one after the other until the time is over, and write the table to `out` after each.

    A task that fails has an `error` instead of results, and one that is not started "no time was left".
    """
    end = time.monotonic() + seconds
    table: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "gpu": describe_gpu(),
        "jax": jax.__version__,
        "tasks": [],
    }
    for task in tasks:
        start = time.monotonic()
        left = end - start
        result = _run_task(task, left) if left >= LEAST_SECONDS else {"error": "no time was left"}
        seconds_used = round(time.monotonic() - start, 1)
        table["tasks"].append({"name": task.name, "seconds": seconds_used, **result})
        write_atomically(out, json.dumps(table, indent=2) + "\n")
        print(f"{task.name}: {result.get('error') or f'{seconds_used} s'}", file=sys.stderr)
    return table


def _run_task(task, timeout_s):
    try:
        return task.measure(timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": "not finished in the time that was left"}
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or ["no message"]
        return {"error": f"exit status {error.returncode}: {lines[-1]}", "stderr": "\n".join(lines[-20:])}
    except (OSError, ValueError, KeyError) as error:
        return {"error": one_line(error)}


def make_steps_task(row: Row, setting: Setting) -> Task:
    """Return the task that times the training steps of a row under a setting."""

    def measure(timeout_s):
        steps = max(20, EPOCH_IMAGES // row.batch_size)
        if row.network == "resnet50":
            steps = 20
        options = {name: value for name, value in row._asdict().items() if name != "network"}
        arguments = [row.network, *(f"--{name}={value}" for name, value in options.items())]
        arguments += [f"--steps={steps}", "--repeats=3"]
        timed = run_module(
            "experiments.benchmarks.steps", arguments, timeout_s, {**ON_GPU, **setting.environment}
        )
        predicted = None if setting.name else read_prediction(row)
        return {"row": row._asdict(), "setting": setting.name, **timed, "predicted": predicted}

    return Task(describe_row(row) + f", {setting.name}" * bool(setting.name), measure)


def read_prediction(row: Row) -> dict | None:
    """Return the images/s that `gpu-plan` predicts for an H100: low, middle and high; None if unknown."""
    stored = json.loads(PREDICTED.read_text())["rows"]
    return next((plan["images_per_second"] for plan in stored if plan["row"] == row._asdict()), None)


def measure_rounds(timeout_s: float) -> dict:
    """Time whole rounds of ResNet-20, with and without checkpoints within them."""
    return run_module("experiments.benchmarks.gpu.gpu_rounds", [], timeout_s, ON_GPU)


def measure_agreement(timeout_s: float) -> dict:
    """Train the same networks on a CPU and on this GPU in float32, and compare their losses."""
    end, losses = time.monotonic() + timeout_s, {}
    with tempfile.TemporaryDirectory() as folder:
        for platform, environment in (("cpu", {"JAX_PLATFORMS": "cpu"}), ("gpu", ON_GPU)):
            path = Path(folder) / f"{platform}.json"
            left = end - time.monotonic()
            run_module("experiments.benchmarks.gpu.agreement", [str(path)], left, environment)
            losses[platform] = json.loads(path.read_text())
    return {"agreement": agreement.compare_losses(losses["cpu"], losses["gpu"])}


def run_module(module: str, arguments: Sequence[str], timeout_s: float, environment: Mapping[str, str]) -> dict:
    """Run a module in a process of its own and return its last line, parsed as JSON; {} if it prints nothing.

    Raises:
      subprocess.SubprocessError: the process fails or takes longer than `timeout_s`.
    """
    variables = os.environ | environment
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)  # because compilation is timed
    if "XLA_FLAGS" in environment:
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {environment['XLA_FLAGS']}".strip()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=True,
    )
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {}


def describe_gpu() -> str:
    """Return the name and the driver version of the first visible GPU, as nvidia-smi prints them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    command += [f"--id={gpu}" for gpu in visible_gpus(os.environ)[:1]]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return printed.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def print_tables(table: dict) -> None:
    """Print the images/s beside the predictions, then the other results."""
    title = f"measured on {table['gpu']}, {table['date']}, JAX {table['jax']}; predictions are for an H100"
    steps = Table("training steps", title=title)
    for heading in (
        *("images/s of all (min to max)", "predicted (range)", "measured/predicted"),
        *("compilation (s)", "memory (GiB)"),
    ):
        steps.add_column(heading, justify="right")
    others = []
    for task in table["tasks"]:
        if rates := task.get("images_per_second"):
            rate, predicted = statistics.median(rates), task["predicted"]
            prediction = ("", "")
            if predicted:
                low, middle, high = (f"{predicted[name]:,.0f}" for name in ("low", "middle", "high"))
                prediction = (f"{middle} ({low} to {high})", f"{rate / predicted['middle']:.2f}")
            steps.add_row(
                task["name"],
                f"{rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
                *prediction,
                f"{task['compilation']:.0f}",
                f"{task['memory']:.2f}",
            )
        elif "error" in task:
            others.append(f"{task['name']}: {task['error']}")
        else:
            results = {k: v for k, v in task.items() if k not in ("name", "seconds")}
            others.append(f"{task['name']}: {json.dumps(results)}")
    console = Console(width=160)
    console.print(steps)
    for line in others:
        console.print(line, markup=False, soft_wrap=True)
