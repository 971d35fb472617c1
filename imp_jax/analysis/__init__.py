"""Tables, figures and a report of a run: the analyses of the paper (section 4, appendices B and E).

    python -m imp_jax.analysis --workdir=runs/mnist5k

computes the rows missing from `analysis/*.csv` in the workdir and draws the figures, as `imp_jax.main` does at
the end of a run. It first executes the config file of the run, which may register models, data sets and
analyses, if the file is still at its path; --config gives another path. No file of the workdir is executed. In
a notebook, `load(workdir)` returns the tables, and the networks of a round on request.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from ml_collections import ConfigDict

from imp_jax import config as configs
from imp_jax import config_files, errors, figures, similarity
from imp_jax.analysis import paper, report  # first, so that its figures come first in the report

# isort: split
from imp_jax.analysis import agreement, learning, overlap, permuted_paths, sublevel  # noqa: F401
from imp_jax.analysis.computation import compute
from imp_jax.analysis.registry import (
    ANALYSES,
    FIGURES,
    check_requests,
    protect_names,
    register,
    register_figure,
)
from imp_jax.analysis.tables import (
    drop_rounds_from,
    is_unreadable,
    outdated,
    read_other_tables,
    read_table,
    reporting_write_errors,
    save_file,
    table_path,
)
from imp_jax.errors import UnknownNameError, UserError, one_line
from imp_jax.experiment import setup
from imp_jax.members import Member, members_of_rows
from imp_jax.workdir.checkpoints import Checkpoints, RoundNetworks
from imp_jax.workdir.epochs import EpochResults, read_epochs
from imp_jax.workdir.execution import restore_execution
from imp_jax.workdir.lock import (
    CONFIG_COPY,
    open_workdir,
    require_same_dataset,
    stored_config,
    stored_config_file,
)
from imp_jax.workdir.results import Results, read_results, recorded_rounds, with_columns

# isort: split
from imp_jax.analysis import instability, noise, sharpness  # noqa: F401 (registers them, after those of paper)

protect_names()  # after the imports of the modules that register the analyses of imp_jax

__all__ = [
    "ANALYSES",
    "FIGURES",
    "Run",
    "check_requests",
    "compute",
    "draw",
    "drop_rounds_from",
    "load",
    "outdated",
    "paper",
    "register",
    "register_figure",
    "run",
]


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir in a notebook: its config, results.csv, epochs.csv, and the tables of its analyses.

    Attributes:
      epochs: epochs.csv; empty unless the run has `evaluate_epochs`.
      tables: the csv files in the folder analysis, by name; a registered analysis that has not been computed
        yet has an empty table. Each is an attribute too: `run.distances` is `run.tables["distances"]`.
    """

    workdir: Path
    config: ConfigDict
    results: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    epochs: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    def __getattr__(self, name: str) -> pd.DataFrame:
        tables = self.__dict__.get("tables", {})  # not set yet while the object is copied
        if name in tables:
            return tables[name]
        raise AttributeError(f"a run has no table {name!r}; it has {', '.join(tables)}")

    def round(self, number: int) -> RoundNetworks:
        """Return the networks of round `number`, with a leading axis in the order of `members(number)`."""
        with contextlib.closing(Checkpoints(self.workdir)) as checkpoints:
            if number not in checkpoints.rounds():
                raise UserError(f"{self.workdir} has no round {number}; it has {checkpoints.rounds()}")
            return checkpoints.restore(number)

    @property
    def branches(self) -> "dict[str, Run]":
        """The branches of the run by name, each a run of its own; see `imp_jax.branch`."""
        folders = sorted(path.parent for path in self.workdir.glob("branches/*/config.json"))
        return {folder.name: load(folder) for folder in folders}

    def members(self, number: int) -> tuple[Member, ...]:
        """Return the (arm, replicate) pairs that round `number` trained, without those that diverged."""
        return members_of_rows(self.results.to_dict("records"), number)


def load(workdir: str | os.PathLike) -> Run:
    """Load all tables of a workdir; those that are not computed yet are empty.

    A missing column, as in a table of an earlier version, is filled with NaN, and an unreadable table is empty;
    both with a warning. Columns that the analysis does not have come last.

    Raises:
      UserError: the folder is not the workdir of a run.
    """
    workdir = errors.user_path(workdir, "the workdir")
    config = stored_config(workdir)
    for name in outdated(workdir):
        warnings.warn(
            f"{workdir}/analysis/{name}.csv was computed by an earlier version, which defined it differently; "
            f"python -m imp_jax.analysis --workdir={workdir} computes it again",
            stacklevel=2,
        )
    if _has_old_repulsion(workdir, config):
        warnings.warn(
            f"the columns repulsion and cosine of {workdir}/results.csv count biases too, as in the version "
            f"that trained the run; this version counts only connections",
            stacklevel=2,
        )
    tables = {}
    for name, registered in ANALYSES.items():
        path = table_path(workdir, name)
        tables[name] = with_columns(read_table(workdir, registered), registered.columns, path)
        if is_unreadable(workdir, registered):
            warnings.warn(f"{path} cannot be read; imp_jax.analysis.run computes it again", stacklevel=2)
    tables |= read_other_tables(workdir)
    return Run(workdir, config, read_results(workdir), tables, read_epochs(workdir))


def run(
    workdir: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    config_file: str | None = None,
    also: Sequence[str] = (),
) -> None:
    """Compute the rows missing from the tables of a workdir, draw all figures, and write report.html.

    Args:
      data_dir: the folder of the data set; None for that of the config.
      config_file: executed, because it may register models, data sets and analyses; not needed if they are
        already registered.
      also: names of analyses on request to compute besides those of `config.analysis.also`.

    Raises:
      UserError: the folder is not the workdir of a run, has no finished round, or cannot be written; another
        process is writing to it; the data set is missing; a name is not registered.
    """
    workdir = errors.user_path(workdir, "the workdir")
    config = stored_config(workdir)
    config.analysis.also = tuple(dict.fromkeys((*config.analysis.also, *also)))
    setup_config = config.copy_and_resolve_references()
    if data_dir is not None:
        setup_config.dataset.data_dir = str(errors.user_path(data_dir, "--data_dir"))
    if config_file:  # it may register analyses
        config_files.execute(config_file)
    check_requests(config.analysis.also)
    if also:
        configs.validate(config)  # before it is stored
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_workdir(workdir, config))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
        finished = checkpoints.rounds()
        if not finished:
            raise UserError(f"{workdir} has no finished round to analyse")
        rows = checkpoints.rows(finished[-1])
        if max(recorded_rounds(workdir), default=0) <= finished[-1]:
            with reporting_write_errors(workdir):  # after a crash, results.csv may lack rows of the last round
                Results(workdir, rows)
                EpochResults(workdir, checkpoints, rows)
        results = read_results(workdir)
        experiment = functools.cache(
            lambda: restore_execution(_setup(setup_config, workdir, config_file), workdir)
        )
        compute(checkpoints, config, experiment, workdir, results, show_progress=True)
        finished_run = load(workdir)
        save_file(workdir, workdir / "report.html", report.html(finished_run, draw(finished_run)))
    print(
        f"tables:  {workdir / 'analysis'}\nfigures: {workdir / 'figures'}\nreport:  {workdir / 'report.html'}"
    )


def draw(run: Run) -> dict[str, bytes]:
    """Draw all registered figures as PNG and PDF, except those without data; return the PNGs by name."""
    pngs = {}
    for name, registered in FIGURES.items():
        path = run.workdir / "figures" / f"{name}.png"
        try:
            figure = registered.draw(run)
            if figure is None:
                continue
            png = figures.to_bytes(figure)
            figure.set_layout_engine("none")  # the PDF keeps the layout, which takes long to compute
            pdf = figures.to_bytes(figure, "pdf")
        except Exception as error:  # for example a font or LaTeX, which the user's settings ask for, is missing
            print(f"{path} is missing, as it cannot be drawn: {one_line(error)}", file=sys.stderr)
            continue
        save_file(run.workdir, path, png)
        save_file(run.workdir, path.with_suffix(".pdf"), pdf)
        pngs[name] = png
    return pngs


def _setup(config, workdir, config_file):
    """Set up the experiment of a workdir; its config file must have been executed before."""
    try:
        experiment = setup(config, use_mesh=False)
    except UnknownNameError as error:
        stored_file = stored_config_file(workdir)
        if config_file or not stored_file:
            raise
        raise UserError(
            f"{error}; if {stored_file}, the config file of the run, registers it: python -m imp_jax.analysis "
            f"--workdir={workdir} --config=PATH executes it, or the copy {workdir / CONFIG_COPY}"
        ) from error
    require_same_dataset(workdir, experiment.dataset.identity())
    return experiment


def _has_old_repulsion(workdir, config):
    """Return whether the newest round on disk was trained with an earlier definition of J_r."""
    if not config.repulsion.strength:
        return False
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        finished = checkpoints.rounds()
        return bool(finished) and checkpoints.similarity_definition(finished[-1]) != similarity.DEFINITION
