"""How fast this machine is: `python -m experiments.benchmark SUBJECT`.

    table          the training steps of all networks: images/s, shares of the machine's peaks, memory
    conv4, resnet8, resnet20, resnet50               the training steps of one network
    midi           rounds of configs/resnet8_scenes.py with all analyses, in turn with an earlier commit
    lenet          whole rounds of configs/mnist5k.py: training, evaluation, pruning, recording
    convolutions   the passes of the convolutions of ResNet-20 and Conv-4, in each form that a CPU has
    load           the training steps of LeNet and ResNet-8 alone, and beside one busy process per core
    forms          ResNet-20 with its members unrolled, as grouped convolutions, and as products of patches
    analysis       all analyses of a run of configs/mnist5k.py
    repulsion      whole runs without and with repulsion, and the size of the store of earlier optima
    branch         the members of a branch, on all rounds at once, beside those of a run
    checkpoints    whole runs that save their state within the rounds, and one that does not
    throughput     images/s, from which `python -m experiments.run list` estimates costs; --record="one H100"
                   stores them
    scaling        training steps on more and more devices, and the time of the paper's sweeps on 1, 8 and 64
    disk           the size of the checkpoints of each config of table 1

For table, lenet, conv4, resnet8 and resnet20, --torch times the same steps of an eager PyTorch loop in turn.
For table and single networks, --out writes the table as JSON and --compare compares it with an earlier one.
Each subject is documented in its module in experiments/benchmarks/.
"""

import argparse
import sys

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
    steps,
    throughput,
)
from imp_jax import cli
from imp_jax.errors import UserError
from imp_jax.runtime import devices

NETWORKS = ("conv4", "resnet8", "resnet20", "resnet50")
SUBJECTS = (
    "table",
    "lenet",
    *NETWORKS,
    "midi",
    "convolutions",
    "load",
    "forms",
    "analysis",
    "repulsion",
    "branch",
    "checkpoints",
    "disk",
)
SUBJECTS += ("throughput", "scaling")


def main() -> None:
    cli.replace_unprintable()
    arguments = make_parser().parse_args()
    for name in ("rounds", "repeats", "epochs", "steps", "members", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            sys.exit(f"error: --{name} is {value}; it should be at least 1")
    logging.set_verbosity(logging.ERROR)
    devices.use_one_device_per_cpu_core()
    try:
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
    add = parser.add_argument
    add("subject", choices=SUBJECTS)
    whole_runs = "analysis, repulsion, branch, checkpoints, throughput, disk: rounds of a run (default: 25)"
    add("--rounds", type=int, help=f"lenet, midi: rounds to time (default: 8, midi 2); {whole_runs}")
    add("--repeats", type=int, help="not lenet, disk: number of timings (default: 5; some subjects 2, 3 or 7)")
    add(
        "--epochs",
        type=int,
        help="lenet, midi, repulsion, branch, checkpoints: epochs per training (default: the config's)",
    )
    add("--base", default=midi.BASE, help=f"midi: the commit to compare with (default: {midi.BASE})")
    add("--steps", type=int, help="table, one network, load, forms: training steps of a timing")
    add(
        "--members",
        type=int,
        help="table, one network, load, forms: number of members (forms: default 1, 3 and 6)",
    )
    batch_help = "default: the config's; for convolutions 128; for forms 128, 512 and 2048"
    add("--batch_size", type=int, help=f"table, one network, load, forms, convolutions ({batch_help})")
    add("--dtype", choices=["float32", "bfloat16"], help="table, one network, load, forms")
    add("--execution", help="table, one network, load: as config.execution")
    add(
        "--torch",
        action="store_true",
        help="table, lenet, conv4, resnet8, resnet20: time eager PyTorch too, on the CPU",
    )
    add("--out", metavar="FILE", help="table, one network: write the table as JSON")
    add("--compare", metavar="FILE", help="table, one network: print ratios to a table that --out wrote")
    add("--record", metavar="DEVICE", help="throughput: write it to experiments/benchmarks/throughput.json")
    return parser


def run_subject(arguments: argparse.Namespace) -> None:
    """Call the benchmark of the subject with its options and their defaults."""
    subject, run_rounds, epochs = arguments.subject, arguments.rounds or 25, arguments.epochs
    if arguments.torch and subject not in ("table", *pytorch.TORCH_NETWORKS):
        names = ", ".join(pytorch.TORCH_NETWORKS)
        raise UserError(f"--torch is for table, {names}; there is no {subject} in PyTorch")
    forwarded = ("repeats", "steps", "dtype", "execution", "members", "batch_size")
    options = [f"--{name}={value}" for name in forwarded if (value := getattr(arguments, name))]
    match subject:
        case "lenet":
            rounds.benchmark_rounds(arguments.rounds or 8, epochs, arguments.torch)
        case "midi":
            midi.benchmark_midi(arguments.rounds or 2, arguments.repeats or 2, arguments.base, epochs)
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
        case "load":
            load.benchmark_load(options)
        case "forms":
            members = [arguments.members] if arguments.members else (1, 3, 6)
            batch_sizes = [arguments.batch_size] if arguments.batch_size else (128, 512, 2048)
            forms.benchmark_forms("resnet20", members, batch_sizes, options)
        case _:
            names = steps.ROWS if subject == "table" else [subject]
            steps.benchmark_steps(names, options, arguments.torch, arguments.out, arguments.compare)


if __name__ == "__main__":
    main()
