"""What `python -m experiments.run` does with figures: list them, show their runs, train, and draw."""

import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from experiments.paper import catalogue, networks
from experiments.paper.panels import PaperFigure, make_wide_console
from experiments.paper.scales import SCALES, Scale
from experiments.sweeps import cost, launchers
from experiments.sweeps.runs import AnyRun
from experiments.sweeps.sweep import Sweep
from imp_jax import data
from imp_jax import figures as drawings
from imp_jax.errors import UserError
from imp_jax.runtime.signals import GracefulStop
from imp_jax.workdir.files import write_atomically

POLL_S = 1.0  # interval at which runs that another process trains are checked
LETTERS_PER_INCH = 18  # of the note on a figure


def print_list(figures: Sequence[PaperFigure], scale: Scale) -> None:
    """Print one row per figure: networks, data, trainings, and the estimated cost of its runs per device."""
    devices = cost.read_throughput()
    table = Table("figure", "shows", "network", "data", "runs", "trainings", *devices)

    def add_row(name, shows, runs):
        configs = [run.config for run in runs]
        costs = []
        for device in devices.values():
            seconds = [cost.estimate_seconds(run, device) for run in runs]
            costs.append(cost.format_duration(None if None in seconds else sum(seconds)) if runs else "nothing")
        table.add_row(
            name,
            shows,
            _join_few(map(networks.name_network, configs)),
            _join_few(config.dataset.name for config in configs),
            str(len(runs)),
            f"{sum(run.trainings for run in runs):,}",
            *costs,
        )

    for figure in figures:
        add_row(figure.name, figure.shows, figure.runs(scale))
    table.add_section()
    add_row("together", "each run once", catalogue.list_runs(figures, scale))
    make_wide_console().print(table)
    print(
        "Costs are estimated from images/s measured on each device (experiments/benchmarks/throughput.json).\n"
        "Those of LeNet-300-100 also include repulsion and everything outside training, as measured on mnist5k."
    )


def _join_few(names):
    names = list(dict.fromkeys(names))
    return ", ".join(names) if 0 < len(names) <= 2 else "all"


def print_status(figures: Sequence[PaperFigure], scale: Scale, sweep: Sweep) -> None:
    """Print one line per run, and the number of runs in each state."""
    runs_by_figure = {figure.name: figure.runs(scale) for figure in figures}
    states = sweep.read_states(catalogue.list_runs(figures, scale))
    table = Table("run", "rounds", "state", "for")
    for run, state in states.items():
        words = escape(f"{state.status}: {state.why}" if state.why else state.status)
        names = ", ".join(name for name, runs in runs_by_figure.items() if run in runs)
        table.add_row(run.name, f"{state.rounds}/{run.rounds}", words, names)
    make_wide_console().print(table)
    counts = Counter(state.status for state in states.values())
    print(", ".join(f"{count} {status}" for status, count in counts.items()) or "no runs are needed")


def select_runs_to_train(runs: Sequence[AnyRun], sweep: Sweep) -> list[AnyRun]:
    """Return the runs that are missing or have failed, and print how many runs are in which state.

    Leave out branches of runs that another process trains, or that are queued.
    """
    states = sweep.read_states(runs)
    counts = Counter(state.status for state in states.values() if state.status not in ("missing", "failed"))
    to_train = _select_missing(states, ("missing", "failed"))
    words = [f"{len(to_train)} runs to train", *(f"{count} {status}" for status, count in counts.items())]
    print(", ".join(words))
    return to_train


def _select_missing(states, statuses):
    busy = {run for run, state in states.items() if state.status in ("running", "queued")}
    return [run for run, state in states.items() if state.status in statuses and not busy & set(run.needs)]


def check_data(runs: Sequence[AnyRun], data_dir: str | None) -> None:
    """Check that the data sets of `runs` are prepared; download those that can be downloaded.

    Raises:
      UserError: a data set is not prepared.
    """
    with GracefulStop():  # a signal ends a download at once
        for name in dict.fromkeys(run.config.dataset.name for run in runs):
            data.prepared_builder(name, data_dir)


def train_locally(all_runs: Sequence[AnyRun], sweep: Sweep, data_dir: str | None, pack: int = 1) -> int:
    """Train what is missing on this machine, and return the number of runs that failed.

    Also wait for the runs that another process is training, and train those that it leaves unfinished.

    Args:
      pack: see `launchers.train_locally`.

    Raises:
      UserError: a data set is not prepared.
    """
    runs = select_runs_to_train(all_runs, sweep)
    check_data(runs, data_dir)
    failed, tried = 0, set()
    runs = runs or _wait_for_other_processes(sweep, all_runs)
    while runs:
        failed += launchers.train_locally(sweep, runs, data_dir, lambda line: print(line, flush=True), pack)
        tried |= set(runs)
        runs = _wait_for_other_processes(sweep, [run for run in all_runs if run not in tried])
    return failed


def submit_to_slurm(all_runs: Sequence[AnyRun], sweep: Sweep, data_dir: str | None, options: dict) -> None:
    """Submit what is missing to Slurm, except branches of runs that are not finished yet.

    Raises:
      UserError: a data set is not prepared; see `launchers.submit_to_slurm`.
    """
    runs = select_runs_to_train(all_runs, sweep)
    check_data(runs, data_dir)
    later = [run for run in runs if set(run.needs) & set(runs)]
    runs = [run for run in runs if run not in later]
    jobs = launchers.submit_to_slurm(sweep, runs, data_dir, options) if runs else []
    for run, job in zip(runs, jobs, strict=True):
        print(f"job {job}: {run.name}")
    for run in later:
        needs = " and ".join(need.name for need in run.needs if need in runs)
        print(f"not submitted: {run.name}, a branch; the same command submits it after {needs}")


def _wait_for_other_processes(sweep, runs):
    """Wait until no other process trains any of `runs`, and return those that are missing then."""
    announced = False
    while True:
        states = sweep.read_states(runs)
        if not any(state.status == "running" for state in states.values()):
            return _select_missing(states, ("missing",))
        if not announced:
            names = [run.name for run, state in states.items() if state.status == "running"]
            print(f"waiting for another process, which trains {'; '.join(names)}", flush=True)
            announced = True
        time.sleep(POLL_S)


def draw(figures: Sequence[PaperFigure], scale: Scale, sweep: Sweep) -> None:
    """Draw each figure from the finished rounds, into `figures/` of the sweep, and print what it lacks.

    Raises:
      UserError: some figures have no finished round at all; the others are drawn.
    """
    runs = catalogue.list_runs(figures, scale)
    finished, states, absent = sweep.load_finished(runs), sweep.read_states(runs), []
    folder = sweep.root / "figures"
    for figure in figures:
        figure_runs = figure.runs(scale)
        if figure_runs and not any(run in finished for run in figure_runs):
            absent.append(figure.name)
            continue
        unfinished = [run for run in figure_runs if states[run].status != "done"]
        folder.mkdir(parents=True, exist_ok=True)
        note = describe(figure, scale, unfinished)
        for draw_one in (figure.draw, figure.table):
            if draw_one:
                path = _write(draw_one(scale, finished), note, folder, figure.name)
                print(f"{figure.name}: {path}")
        for run in figure_runs:
            if (state := states[run]).status != "done":
                print(f"  lacks {run.name}: {state.status}, {state.rounds} of {run.rounds} rounds")
            if diverged := sweep.describe_diverged(run):
                print(f"  without {diverged} of {run.name}, which diverged")
    if absent:
        names = ", ".join(absent)
        raise UserError(f"nothing of {names} at scale {scale.name} has been run in {sweep.root} yet")


def _write(drawn, note: str, folder: Path, name: str) -> Path:
    """Write a figure as PNG and PDF, or write and print a table as Markdown; return the path."""
    if isinstance(drawn, str):
        path = folder / f"{name}.md"
        write_atomically(path, "\n\n".join(part for part in (drawn, note) if part) + "\n")
        print(drawn)
        return path
    path = folder / f"{name}.png"
    letters_per_line = int(LETTERS_PER_INCH * drawn.get_figwidth())
    drawn.suptitle("\n".join(textwrap.wrap(note, letters_per_line)), fontsize=7, color="#666666")
    write_atomically(path, drawings.to_bytes(drawn))
    write_atomically(folder / f"{name}.pdf", drawings.to_bytes(drawn, "pdf"))
    return path


def describe(figure: PaperFigure, scale: Scale, unfinished: Sequence[AnyRun]) -> str:
    """Return the note on a figure: which trainings it shows, and at a smaller scale also those of `paper`."""
    if not figure.runs(scale):
        return ""
    words = networks.describe_runs(figure.runs(scale))
    if scale.name != "paper":
        words = (
            f"scale {scale.name}: {words}; scale paper: {networks.describe_runs(figure.runs(SCALES['paper']))}"
        )
    if unfinished:
        words += f"; {len(unfinished)} of {len(figure.runs(scale))} runs not finished"
    return words
