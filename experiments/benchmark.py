"""How fast this machine is: `python -m experiments.benchmark SUBJECT`.

    table          the training steps of all networks: images/s, shares of the machine's peaks, memory
    conv4, resnet8, resnet20, resnet50               the training steps of one network
    midi           rounds of configs/resnet8_scenes.py with all analyses, in turn with an earlier commit
    lenet          whole rounds of configs/mnist5k.py: training, evaluation, pruning, recording
    convolutions   the passes of the convolutions of ResNet-20 and Conv-4, in each form that a CPU has
    sparse         the training steps of LeNet at each density: dense, compact, and of the surviving weights
    load           the training steps of LeNet and ResNet-8 alone, and beside one busy process per core
    forms          ResNet-20 with its members unrolled, vmapped, and vmapped with three forms of convolutions
    analysis       all analyses of a run of configs/mnist5k.py
    repulsion      whole runs without and with repulsion, and the size of the store of earlier optima
    branch         the members of a branch, on all rounds at once, beside those of a run
    checkpoints    whole runs that save their state within the rounds, and one that does not
    throughput     images/s, from which `python -m experiments.run list` estimates costs; --record="one H100"
                   stores them
    scaling        training steps on more and more devices, and the time of the paper's sweeps on 1, 8 and 64
    disk           the size of the checkpoints of each config of table 1
    gpu-plan       the GPU program of each network, compiled without a GPU, and its predicted speed
    gpu            a GPU within --minutes: agreement with a CPU, training steps in each form, whole rounds

Each subject is documented in its module in experiments/benchmarks/. Options that a subject does not use are
refused.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from absl import logging

from experiments.benchmarks import (
    analysis,
    branch,
    checkpoints,
    convolutions,
    disk,
    forms,
    load,
    midi,
    pytorch,
    repulsion,
    rounds,
    scaling,
    sparse,
    steps,
    throughput,
)
from experiments.benchmarks.gpu import measure, plan, targets
from imp_jax import cli
from imp_jax.errors import UserError, user_path
from imp_jax.runtime import devices

NETWORKS = ("conv4", "resnet8", "resnet20", "resnet50")
STEPS = ("table", *NETWORKS)
WHOLE_RUNS = ("analysis", "repulsion", "branch", "checkpoints", "throughput", "disk")
SUBJECTS = (
    *(
        "table",
        "lenet",
        *NETWORKS,
        "midi",
        "convolutions",
        "sparse",
        "load",
        "forms",
        "analysis",
        "repulsion",
        "branch",
    ),
    *("checkpoints", "throughput", "scaling", "disk", "gpu-plan", "gpu"),
)


class Option(NamedTuple):
    """An option of the command line, and the subjects that use it."""

    subjects: tuple[str, ...]
    help: str
    arguments: Mapping[str, Any] = MappingProxyType({"type": int})  # of `add_argument`


OPTIONS = {
    "rounds": Option(
        ("lenet", "midi", "sparse", *WHOLE_RUNS), "rounds of a run (default: lenet 8, midi 2, others 25)"
    ),
    "repeats": Option(
        tuple(subject for subject in SUBJECTS if subject not in ("lenet", "disk", "gpu-plan", "gpu")),
        "number of timings (default: 5; some subjects 2, 3 or 7)",
    ),
    "epochs": Option(
        ("lenet", "midi", "repulsion", "branch", "checkpoints"), "epochs per training (default: the config's)"
    ),
    "base": Option(("midi",), f"the commit to compare with (default: {midi.BASE})", {}),
    "steps": Option((*STEPS, "load", "forms"), "training steps of a timing"),
    "members": Option((*STEPS, "load", "forms", "gpu-plan"), "number of members (forms: default 1, 3 and 6)"),
    "batch_size": Option(
        (*STEPS, "load", "forms", "convolutions", "gpu-plan"),
        "default: the config's; convolutions 128; forms 128, 512 and 2048",
    ),
    "dtype": Option(
        (*STEPS, "load", "forms", "gpu-plan"),
        "of the computation (default: the config's)",
        {"choices": ["float32", "bfloat16"]},
    ),
    "execution": Option((*STEPS, "load"), "as config.execution", {}),
    "torch": Option(
        ("table", *pytorch.TORCH_NETWORKS),
        "time PyTorch too, on the CPU, in turn: eager, and for lenet also compiled and written out",
        {"action": "store_true"},
    ),
    "out": Option((*STEPS, "gpu-plan", "gpu"), "write the table as JSON", {"metavar": "FILE"}),
    "compare": Option(STEPS, "print ratios to a table that --out wrote", {"metavar": "FILE"}),
    "record": Option(
        ("throughput",), "write it to experiments/benchmarks/throughput.json", {"metavar": "DEVICE"}
    ),
    "network": Option(("gpu-plan",), "only rows of this network", {"choices": list(plan.CONFIGS)}),
    "form": Option(("gpu-plan",), "only rows of this form of convolutions", {"choices": list(plan.FORMS)}),
    "full": Option(
        ("gpu-plan",),
        "all networks, members, batch sizes, dtypes and forms: about an hour (estimated)",
        {"action": "store_true"},
    ),
    "device": Option(("gpu-plan",), "GPU to compile for (default: h100)", {"choices": list(targets.GPUS)}),
    "wheels": Option(
        ("gpu-plan",), "folder of the wheels (default: in ~/.cache/imp_jax)", {"metavar": "FOLDER"}
    ),
    "measured": Option(("gpu-plan",), "the rows that the subject gpu measures", {"action": "store_true"}),
    "minutes": Option(("gpu",), "after which nothing more is measured (default: 8)", {"type": float}),
    "install": Option(("gpu-plan",), "install the wheels into that folder first", {"action": "store_true"}),
}
AT_LEAST_1 = ("rounds", "repeats", "epochs", "steps", "members", "batch_size", "minutes")


def main() -> None:
    cli.replace_unprintable()
    arguments = make_parser().parse_args()
    logging.set_verbosity(logging.ERROR)
    devices.use_one_device_per_cpu_core()
    try:
        check_options(arguments)
        run_subject(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", choices=SUBJECTS)
    for name, option in OPTIONS.items():
        parser.add_argument(
            f"--{name}", help=f"{', '.join(option.subjects)}: {option.help}", **option.arguments
        )
    return parser


def check_options(arguments: argparse.Namespace) -> None:
    """Raise a `UserError` if an option is not used by the subject, or is a number below 1."""
    for name, option in OPTIONS.items():
        value = getattr(arguments, name)
        if value is None or value is False:
            continue
        if arguments.subject not in option.subjects:
            raise UserError(
                f"--{name} is for {', '.join(option.subjects)}; {arguments.subject} does not use it, so it "
                f"should be left out"
            )
        if name in AT_LEAST_1 and value < 1:
            raise UserError(f"--{name} is {value}; it should be at least 1")


def run_subject(arguments: argparse.Namespace) -> None:
    """Call the benchmark of the subject with its options and their defaults."""
    subject, run_rounds, epochs = arguments.subject, arguments.rounds or 25, arguments.epochs
    forwarded = ("repeats", "steps", "dtype", "execution", "members", "batch_size")
    options = [f"--{name}={value}" for name in forwarded if (value := getattr(arguments, name))]
    match subject:
        case "lenet":
            rounds.benchmark_rounds(arguments.rounds or 8, epochs, arguments.torch)
        case "midi":
            midi.benchmark_midi(
                arguments.rounds or 2, arguments.repeats or 2, arguments.base or midi.BASE, epochs
            )
        case "analysis":
            analysis.benchmark_analysis(run_rounds, arguments.repeats or 5)
        case "repulsion":
            repulsion.benchmark_repulsion(run_rounds, arguments.repeats or 2, epochs)
        case "branch":
            branch.benchmark_branch(run_rounds, arguments.repeats or 3, epochs)
        case "checkpoints":
            checkpoints.benchmark_checkpoints(run_rounds, arguments.repeats or 5, epochs)
        case "disk":
            disk.benchmark_disk(run_rounds)
        case "throughput":
            throughput.benchmark_throughput(run_rounds, arguments.repeats or 3, arguments.record)
        case "scaling":
            scaling.benchmark_scaling(arguments.repeats or 3)
        case "convolutions":
            convolutions.benchmark_convolutions(arguments.batch_size or 128, arguments.repeats or 7)
        case "sparse":
            sparse.benchmark_sparse(run_rounds, arguments.repeats or 5)
        case "load":
            load.benchmark_load(options)
        case "forms":
            members = [arguments.members] if arguments.members else (1, 3, 6)
            batch_sizes = [arguments.batch_size] if arguments.batch_size else (128, 512, 2048)
            forms.benchmark_forms("resnet20", members, batch_sizes, options)
        case "gpu-plan":
            wheels = (
                user_path(arguments.wheels, "--wheels") if arguments.wheels else plan.default_wheels_folder()
            )
            fields = ("network", "members", "batch_size", "dtype", "form")
            choices = {name: getattr(arguments, name) for name in fields}
            rows = plan.choose_rows(list_plan_rows(arguments), **choices)
            plan.print_plan(rows, arguments.device or "h100", wheels, arguments.out, install=arguments.install)
        case "gpu":
            measure.benchmark_gpu(arguments.minutes or 8, arguments.out or "gpu.json")
        case _:
            names = steps.ROWS if subject == "table" else [subject]
            steps.benchmark_steps(names, options, arguments.torch, arguments.out, arguments.compare)


def list_plan_rows(arguments: argparse.Namespace) -> Sequence[plan.Row]:
    """Return the rows of the subject gpu-plan. Raises `UserError` if two sets of rows are asked for."""
    if arguments.full and arguments.measured:
        raise UserError("--full and --measured are two sets of rows; one of them should be left out")
    if arguments.measured:
        return measure.list_rows()
    return plan.list_all_rows() if arguments.full else plan.DEFAULT_ROWS


if __name__ == "__main__":
    main()
