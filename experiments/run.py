"""Figures and tables of the paper and the literature: `python -m experiments.run run fig14 controls`.

The actions are:

    list     the figures, the trainings that each needs, and what these cost
    status   which runs are done, running, queued, failed or missing
    run      train what is missing, then draw
    figure   draw from the finished rounds, and print what is missing

Without names, all figures are meant; `claims` is the table of `python -m experiments.claims`. The scale is the
paper's own; or `midi`, convolutional networks that take two cores about half an hour per run; or `mini`, which
takes two cores less than a quarter of an hour per figure; or `smoke`, which takes seconds.
"""

import argparse
import os
import sys
from pathlib import Path

from absl import logging

from experiments.paper import catalogue, commands
from experiments.paper.scales import SCALES
from experiments.sweeps import launchers
from experiments.sweeps.sweep import Sweep
from imp_jax import cli
from imp_jax.errors import UserError, lookup, user_path

LAUNCHERS = ("local", "slurm")
MINIMA = {"gpus": 0, "cpus": 1, "timeout_min": 1, "pack": 1}


def main() -> None:
    cli.replace_unprintable()
    arguments = make_parser().parse_intermixed_args()  # figures may be named before or after the flags
    logging.set_verbosity(logging.FATAL)
    try:
        run_action(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the reader of the output has ended
        os._exit(1)
    except OSError as error:
        sys.exit(f"error: cannot use {error.filename}: {error.strerror}")
    except launchers.Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + interrupted.number)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m experiments.run", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("action", choices=["list", "status", "run", "figure"])
    parser.add_argument(
        "names", nargs="*", metavar="figure", help="such as fig14, table1, claims (default: all)"
    )
    parser.add_argument("--scale", default="paper", help="paper, midi, mini or smoke (default: paper)")
    parser.add_argument("--root", help="folder of the runs (default: runs/SCALE)")
    parser.add_argument("--data_dir", help="folder of the data sets (default: ~/tensorflow_datasets)")
    parser.add_argument(
        "--launcher", default="local", help="local (one worker per GPU, or one on the CPU) or slurm"
    )
    parser.add_argument(
        "--pack",
        type=int,
        default=1,
        help="local: number of runs that train in one program, if they differ only in seed, learning rate, "
        "warm-up, weight decay or strength of repulsion, the last two not 0 in some of them (default: 1)",
    )
    slurm = parser.add_argument_group("Slurm, for each job")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--constraint", help="features of the node, such as h100")
    slurm.add_argument("--gpus", type=int, default=1, help="GPUs (default: 1)")
    slurm.add_argument("--cpus", type=int, help="cores")
    slurm.add_argument("--mem_gb", type=float, help="memory in GB")
    slurm.add_argument(
        "--timeout_min", type=int, default=240, help="time limit; the job is then requeued (default: 240)"
    )
    return parser


def run_action(arguments: argparse.Namespace) -> None:
    """Check the command line and call the command."""
    scale = lookup(SCALES, "--scale", arguments.scale)
    launcher = lookup({name: name for name in LAUNCHERS}, "--launcher", arguments.launcher)
    figures = catalogue.select_figures(arguments.names)
    for flag, minimum in MINIMA.items():
        value = getattr(arguments, flag)
        if value is not None and value < minimum:
            raise UserError(f"--{flag} is {value}; it should be at least {minimum}")
    if arguments.pack > 1 and (arguments.action != "run" or launcher != "local"):
        raise UserError(
            f"--pack is {arguments.pack}; it is for run with --launcher=local, so it should be left out"
        )
    if arguments.action == "list":
        return commands.print_list(figures, scale)
    data_dir = arguments.data_dir
    if data_dir is not None:
        data_dir = str(user_path(data_dir, "--data_dir").absolute())
    root = Path("runs") / scale.name if arguments.root is None else user_path(arguments.root, "--root")
    sweep, failed = Sweep(root.absolute()), 0
    runs = catalogue.list_runs(figures, scale)
    sweep.check_configs_match(runs)
    if arguments.action == "status":
        return commands.print_status(figures, scale, sweep)
    if arguments.action == "run" and launcher == "slurm":
        return commands.submit_to_slurm(runs, sweep, data_dir, make_slurm_options(arguments))
    if arguments.action == "run":
        failed = commands.train_locally(runs, sweep, data_dir, arguments.pack)
    try:
        return commands.draw(figures, scale, sweep)
    finally:
        if failed:
            raise UserError(f"{failed} runs failed; what they printed is in {sweep.logs}")


def make_slurm_options(arguments: argparse.Namespace) -> dict:
    """Return the flags for Slurm that are set, as parameters of submitit."""
    options = {
        "timeout_min": arguments.timeout_min,
        "cpus_per_task": arguments.cpus,
        "gpus_per_node": arguments.gpus or None,
        "mem_gb": arguments.mem_gb,
        "slurm_partition": arguments.partition,
        "slurm_account": arguments.account,
        "slurm_constraint": arguments.constraint,
    }
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
