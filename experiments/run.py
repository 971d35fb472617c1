"""Every figure and table of the paper: `python -m experiments.run list | status | run | figure [fig14 …]`.

    list     what each is drawn of, and what that costs
    status   which of its runs are done, running, queued, failed or missing
    run      train what is missing, then draw
    figure   draw from what is there, and say what is lacking

Without names it is all of them; `claims` stands for what `python -m experiments.claims` looks at. The scale is
the paper's own, or `mini`, which two cores do in under a quarter of an hour a figure, or `smoke`, of seconds.
"""

import argparse
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from rich.markup import escape
from rich.table import Table

from experiments.paper import catalogue, networks
from experiments.paper.panels import PaperFigure, wide_console
from experiments.paper.scales import SCALES, Scale
from experiments.sweeps import cost, launchers
from experiments.sweeps.runs import Run
from experiments.sweeps.sweep import Sweep
from imp_jax import cli, data, figures
from imp_jax.errors import UserError, lookup, user_path
from imp_jax.runtime.signals import GracefulStop
from imp_jax.workdir.files import write_atomically

LAUNCHERS = ("local", "slurm")


def show_list(exhibits: Sequence[PaperFigure], scale: Scale) -> None:
    """A row an exhibit: network, data, trainings, and the estimated cost of all its runs on each device."""
    devices = cost.read_throughput()
    table = Table("figure", "shows", "network", "data", "runs", "trainings", *devices)

    def several(names):
        names = list(dict.fromkeys(names))
        return ", ".join(names) if 0 < len(names) <= 2 else "all"

    def row(name, shows, runs):
        configs = [run.config for run in runs]
        costs = []
        for device in devices.values():
            seconds = [cost.seconds(run, device) for run in runs]
            costs.append(cost.format_duration(None if None in seconds else sum(seconds)) if runs else "nothing")
        table.add_row(
            name,
            shows,
            several(networks.NAMES[c.model.name] for c in configs),
            several(c.dataset.name for c in configs),
            str(len(runs)),
            f"{sum(run.trainings for run in runs):,}",
            *costs,
        )

    for exhibit in exhibits:
        row(exhibit.id, exhibit.shows, exhibit.runs(scale))
    table.add_section()
    row("together", "each run once", catalogue.runs_of(exhibits, scale))
    wide_console().print(table)
    print(
        "Costs follow from images/s measured on such a device (experiments/benchmarks/throughput.json).\n"
        "Those of LeNet also include repulsion and everything besides training, as measured on mnist5k."
    )


def show_status(exhibits: Sequence[PaperFigure], scale: Scale, sweep: Sweep) -> None:
    """A line a run, and how many are in each state."""
    of = {exhibit.id: exhibit.runs(scale) for exhibit in exhibits}
    states = sweep.states(catalogue.runs_of(exhibits, scale))
    table = Table("run", "rounds", "state", "for")
    for run, state in states.items():
        words = escape(f"{state.status}: {state.why}" if state.why else state.status)
        for_ = ", ".join(name for name, runs in of.items() if run in runs)
        table.add_row(run.name, f"{state.rounds}/{run.config.rounds}", words, for_)
    wide_console().print(table)
    counts = Counter(state.status for state in states.values())
    print(", ".join(f"{count} {status}" for status, count in counts.items()) or "no runs are needed")


def train(exhibits: Sequence[PaperFigure], scale: Scale, sweep: Sweep, arguments: argparse.Namespace) -> int:
    """Train what is missing, by the launcher of `arguments`; returns how many runs failed.

    On this machine it also waits for runs that another process is training, and goes on with those it leaves.

    Raises:
      UserError: a data set is not prepared; see `launchers.slurm`.
    """
    asked = catalogue.runs_of(exhibits, scale)
    states = sweep.states(asked)
    runs = [run for run, state in states.items() if state.status in ("missing", "failed")]
    others = Counter(state.status for state in states.values() if state.status not in ("missing", "failed"))
    print(", ".join([f"{len(runs)} runs to train", *(f"{count} {status}" for status, count in others.items())]))
    with GracefulStop():  # a signal ends a download at once
        for name in dict.fromkeys(run.config.dataset.name for run in runs):
            data.prepared_builder(name, arguments.data_dir)
    if arguments.launcher == "slurm":
        jobs = launchers.slurm(sweep, runs, arguments.data_dir, _slurm_options(arguments)) if runs else []
        for run, job in zip(runs, jobs, strict=True):
            print(f"job {job}: {run.name}")
        return 0
    failed, tried = 0, set()
    runs = runs or _wait_for_other_processes(sweep, asked)
    while runs:
        failed += launchers.local(sweep, runs, arguments.data_dir, lambda line: print(line, flush=True))
        tried |= set(runs)
        runs = _wait_for_other_processes(sweep, [run for run in asked if run not in tried])
    return failed


def _wait_for_other_processes(sweep, runs):
    """Those of `runs` that are missing once no other process is training any."""
    told = False
    while True:
        states = sweep.states(runs)
        if not any(state.status == "running" for state in states.values()):
            return [run for run, state in states.items() if state.status == "missing"]
        if not told:
            names = [run.name for run, state in states.items() if state.status == "running"]
            print(f"waiting for another process, which trains {'; '.join(names)}", flush=True)
            told = True
        time.sleep(1)


def _slurm_options(arguments):
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


def draw(exhibits: Sequence[PaperFigure], scale: Scale, sweep: Sweep) -> None:
    """Draw each exhibit from what is there, into `figures/` of the sweep, and say what it lacks.

    Raises:
      UserError: of some exhibit nothing has been run yet; the others are drawn.
    """
    runs = catalogue.runs_of(exhibits, scale)
    finished, states, absent = sweep.finished(runs), sweep.states(runs), []
    folder = sweep.root / "figures"
    for exhibit in exhibits:
        of_exhibit = exhibit.runs(scale)
        lacking = [run for run in of_exhibit if states[run].status != "done"]
        if of_exhibit and not any(run in finished for run in of_exhibit):
            absent.append(exhibit.id)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        drawn = exhibit.draw(scale, finished)
        note = describe(exhibit, scale, lacking)
        if isinstance(drawn, str):
            path = folder / f"{exhibit.id}.md"
            write_atomically(path, "\n\n".join(part for part in (drawn, note) if part) + "\n")
            print(drawn)
        else:
            path = folder / f"{exhibit.id}.png"
            letters = int(18 * drawn.get_figwidth())  # of this size, to a line
            drawn.suptitle("\n".join(textwrap.wrap(note, letters)), fontsize=7, color="#666666")
            write_atomically(path, figures.to_bytes(drawn))
            write_atomically(path.with_suffix(".pdf"), figures.to_bytes(drawn, "pdf"))
        print(f"{exhibit.id}: {path}")
        for run in of_exhibit:
            if (state := states[run]).status != "done":
                print(f"  lacks {run.name}: {state.status}, {state.rounds} of {run.config.rounds} rounds")
            if behind := sweep.diverged(run):
                print(f"  without {behind} of {run.name}, which diverged")
    if absent:
        asked = ", ".join(absent)
        raise UserError(f"nothing of {asked} at scale {scale.name} has been run in {sweep.root} yet")


def describe(exhibit: PaperFigure, scale: Scale, lacking: Sequence[Run]) -> str:
    """What a figure is of, to be read on it; if that is not the paper's, what it stands for."""
    if not exhibit.runs(scale):
        return ""
    words = networks.describe_runs(exhibit.runs(scale))
    if scale.name != "paper":
        words = (
            f"{scale.name} scale: {words}; in the paper {networks.describe_runs(exhibit.runs(SCALES['paper']))}"
        )
    if lacking:
        words += f"; {len(lacking)} of {len(exhibit.runs(scale))} runs not finished"
    return words


def main() -> None:
    cli.replace_unprintable()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["list", "status", "run", "figure"])
    parser.add_argument("ids", nargs="*", metavar="figure", help="such as fig14, table1, claims (default: all)")
    parser.add_argument("--scale", default="paper", help="paper, mini or smoke (default: paper)")
    parser.add_argument("--root", help="folder of the runs (default: runs/SCALE)")
    parser.add_argument("--data_dir", help="where the data sets are (default: ~/tensorflow_datasets)")
    parser.add_argument("--launcher", default="local", help="local: a worker a GPU, or one; or slurm")
    slurm = parser.add_argument_group("Slurm, for each job")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--constraint", help="features of the node, such as h100")
    slurm.add_argument("--gpus", type=int, default=1, help="(default: 1)")
    slurm.add_argument("--cpus", type=int, help="cores")
    slurm.add_argument("--mem_gb", type=float)
    slurm.add_argument(
        "--timeout_min", type=int, default=240, help="when it is requeued, to go on (default: 240)"
    )
    arguments = parser.parse_intermixed_args()  # figures may be named before the flags or after
    logging.set_verbosity(logging.FATAL)
    try:
        scale = lookup(SCALES, "--scale", arguments.scale)
        lookup(dict.fromkeys(LAUNCHERS), "--launcher", arguments.launcher)
        exhibits = catalogue.named(arguments.ids)
        for flag, least in {"gpus": 0, "cpus": 1, "timeout_min": 1}.items():
            value = getattr(arguments, flag)
            if value is not None and value < least:
                raise UserError(f"--{flag} is {value}; it should be at least {least}")
        if arguments.action == "list":
            return show_list(exhibits, scale)
        if arguments.data_dir is not None:
            arguments.data_dir = str(user_path(arguments.data_dir, "--data_dir").absolute())
        root = Path("runs") / scale.name if arguments.root is None else user_path(arguments.root, "--root")
        sweep = Sweep(root.absolute())
        sweep.check_configs_match(catalogue.runs_of(exhibits, scale))
        if arguments.action == "status":
            return show_status(exhibits, scale, sweep)
        failed = train(exhibits, scale, sweep, arguments) if arguments.action == "run" else 0
        if arguments.action == "run" and arguments.launcher == "slurm":
            return None
        try:
            draw(exhibits, scale, sweep)
        finally:
            if failed:
                raise UserError(f"{failed} runs failed; what they printed is in {sweep.logs}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # where this prints to is closed
        os._exit(1)
    except OSError as error:
        sys.exit(f"error: cannot use {error.filename}: {error.strerror}")
    except launchers.Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + interrupted.number)


if __name__ == "__main__":
    main()
