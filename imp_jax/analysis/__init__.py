"""A finished run → tables, figures and a report: all the paper looks at (section 4, appendices B and E).

    python -m imp_jax.analysis --workdir=runs/mnist5k

computes what `analysis/*.csv` in the workdir lacks, as `imp_jax.main` does at the end of a run, and draws the
figures. To know what the run's config file registers, it executes that file, if it is still where it was;
--config names another one. No file of the workdir is executed. In a notebook, `load(workdir)` gives the tables,
and the networks of a round on request.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags
from jaxtyping import PyTree
from ml_collections import ConfigDict, config_flags
from rich.progress import track

from imp_jax import config_files, connectivity, errors, figures, masking, similarity, weights
from imp_jax.analysis import report
from imp_jax.arms import Member, members_of_rows, take_members
from imp_jax.errors import UnknownNameError, UserError, one_line
from imp_jax.experiment import Experiment, setup
from imp_jax.training import Variables
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError, RoundNetworks, move_aside
from imp_jax.workdir.execution import restore_execution
from imp_jax.workdir.files import write_atomically
from imp_jax.workdir.lock import CONFIG_COPY, open_workdir, require_same_dataset, stored_config_file
from imp_jax.workdir.progress import make_console
from imp_jax.workdir.results import Results, read_results, recorded_rounds, with_columns

INITIALISATION = -1  # the "round" of the weights that survivors are reset to, in distances.csv
KINDS = ("successive", "instability")  # of paths
BINS = 101  # of a histogram; an odd number, so that one is centred on 0

# The tables, a csv file each, with their columns.
TABLES = {
    # between the trained networks of two rounds, on the weights both keep
    "distances": ("replicate", "arm", "metric", "round_a", "round_b", "distance"),
    # kind successive: from the round before; instability: from imp to its twin. Error in [0, 1], loss in nats
    "paths": ("replicate", "kind", "round", "split", "alpha", "loss", "error", "batch_norm"),
    "barriers": ("replicate", "kind", "round", "split", "barrier", "loss_barrier"),  # of those paths
    # surviving weights in intervals from left to right, the same for all members of a round
    "histograms": ("replicate", "arm", "round", "left", "right", "count"),
    # Sarle's coefficient, and the share of survivors below half the round's own threshold
    "weights": ("replicate", "arm", "round", "survivors", "bimodality", "near_zero"),
    # of the mask, which all arms share; through a dead unit leads no path of surviving weights from input to
    # output; units and dead_units are empty where a model's paths are not known
    "layers": ("replicate", "round", "layer", "weights", "survivors", "units", "dead_units"),
}

# What the numbers of a table mean, where that has changed: an older table is computed anew.
DEFINITIONS = {
    "distances": similarity.DEFINITION,
    "layers": 2,  # 1 found dead units by activations: all of them in a network that normalises layers
}
_DEFINITIONS_FILE = "definitions.json"


# columns that say what a row is of
_KEYS = ("replicate", "arm", "kind", "metric", "round", "round_a", "round_b", "split", "alpha", "layer")


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir in a notebook: its config, results.csv, and the tables of `TABLES` as far as they are there."""

    workdir: Path
    config: ConfigDict
    results: pd.DataFrame
    distances: pd.DataFrame
    paths: pd.DataFrame
    barriers: pd.DataFrame
    histograms: pd.DataFrame
    weights: pd.DataFrame
    layers: pd.DataFrame

    def round(self, number: int) -> RoundNetworks:
        """The networks of round `number`: every leaf leads with the members, in the order of `members`."""
        with contextlib.closing(Checkpoints(self.workdir)) as checkpoints:
            if number not in checkpoints.rounds():
                raise UserError(f"{self.workdir} has no round {number}; it has {checkpoints.rounds()}")
            return checkpoints.restore(number)

    def members(self, number: int) -> tuple[Member, ...]:
        """The (arm, replicate) pairs that round `number` trained, but for those that diverged."""
        return members_of_rows(self.results.to_dict("records"), number)


def load(workdir: str | os.PathLike) -> Run:
    """All tables of a workdir; those that are not computed yet are empty.

    A column that a table lacks, as one of an earlier version does, is NaN, and a table that cannot be read is
    empty, both with a warning. Columns that are not in `TABLES` come last.

    Raises:
      UserError: a folder without a run.
    """
    workdir = errors.user_path(workdir, "the workdir")
    config = _stored_config(workdir)
    for name in outdated(workdir):
        warnings.warn(
            f"{workdir}/analysis/{name}.csv was computed by an earlier version, which defined it differently; "
            f"python -m imp_jax.analysis --workdir={workdir} computes it anew",
            stacklevel=2,
        )
    if _has_old_repulsion(workdir, config):
        warnings.warn(
            f"the columns repulsion and cosine of {workdir}/results.csv count biases too, as in the version "
            f"that trained the run; now J_r counts connections alone",
            stacklevel=2,
        )
    tables = {}
    for name in TABLES:
        path = workdir / "analysis" / f"{name}.csv"
        tables[name] = with_columns(_read(workdir, name), TABLES[name], path)
        if _is_unreadable(workdir, name):
            warnings.warn(f"{path} cannot be read; imp_jax.analysis.run computes it again", stacklevel=2)
    return Run(workdir, config, read_results(workdir), **tables)


def run(
    workdir: str | os.PathLike, data_dir: str | os.PathLike | None = None, config_file: str | None = None
) -> None:
    """Compute what the tables of a workdir lack, draw all figures, and write report.html.

    Args:
      data_dir: where the data set is, if not where the config says.
      config_file: executed if something is to be computed, as --config of imp_jax.main is, for the models and
        data sets that it registers; not needed where they are registered already.

    Raises:
      UserError: a folder without a run or without a finished round, or that cannot be written; another process
        at work there; the data set is absent; a name that is not registered.
    """
    workdir = errors.user_path(workdir, "the workdir")
    config = _stored_config(workdir)
    setting = config.copy_and_resolve_references()
    if data_dir is not None:
        setting.dataset.data_dir = str(errors.user_path(data_dir, "--data_dir"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_workdir(workdir, config))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
        finished = checkpoints.rounds()
        if not finished:
            raise UserError(f"{workdir} has no finished round to analyse")
        rows = checkpoints.rows(finished[-1])
        if max(recorded_rounds(workdir), default=0) <= finished[-1]:
            with _writing(workdir):  # a run that died may have left it behind its checkpoints
                Results(workdir, rows)
        results = read_results(workdir)
        experiment = functools.cache(lambda: restore_execution(_setup(setting, workdir, config_file), workdir))
        compute(checkpoints, config, experiment, workdir, results, shown=True)
        done = load(workdir)
        _save(workdir, workdir / "report.html", report.html(done, draw(done)))
    print(
        f"tables:  {workdir / 'analysis'}\nfigures: {workdir / 'figures'}\nreport:  {workdir / 'report.html'}"
    )


def compute(
    checkpoints: Checkpoints,
    config: ConfigDict,
    experiment: Callable[[], Experiment],
    workdir: Path,
    results: pd.DataFrame,
    shown: bool = False,
) -> None:
    """Bring the tables up to the rounds of `checkpoints` that are in `results`, one by one.

    What is there already stays, also of rounds that were not kept. A table that cannot be read is moved into
    the folder `set-aside`, a round that is damaged or missing is left out, each with a sentence on stderr.

    Args:
      experiment: called if needed.
      shown: as a bar on the terminal.
    """
    with _writing(workdir):
        (workdir / "analysis").mkdir(exist_ok=True)
    finished = [number for number in checkpoints.rounds() if (results["round"] == number).any()]
    members = {number: members_of_rows(results.to_dict("records"), number) for number in finished}
    with _writing(workdir):
        _set_aside_outdated(workdir)
        _set_aside_unreadable(workdir)
    drop_rounds_from(workdir, int(results["round"].max()) + 1)
    tables = {name: _without_incomplete_rows(name, _read(workdir, name), finished) for name in TABLES}
    missing = sorted({*results["round"]} - {*checkpoints.rounds(), *tables["weights"]["round"]})
    if missing:
        numbers = ", ".join(map(str, missing))
        print(f"{workdir} has no checkpoint of round {numbers}; the analyses leave it out", file=sys.stderr)
    tables["paths"] = _drop_stale_paths(tables["paths"], config.analysis, finished)

    there = _keys(tables["paths"], "kind", "round", "replicate", "split")
    paths = [
        (kind, number)
        for number, kind in itertools.product(finished, KINDS)
        for replicate, split in itertools.product(_replicates(kind, number, members), ("train", "test"))
        if (kind, number, replicate, split) not in there
    ]
    of_weights = _incomplete_rounds(tables, members)
    there = _keys(tables["distances"], "arm", "replicate", "metric", "round_a", "round_b")
    of_distances = not there.issuperset(
        (*member, metric, a, b)
        for member in {member for of_round in members.values() for member in of_round if member.arm != "twin"}
        for a, b in itertools.product([n for n in finished if member in members[n]], repeat=2)
        if _pair_on_disk(config, a, b)
        for metric in similarity.METRICS
    )
    needed = {number for _, number in paths} | of_weights | (set(finished) if of_distances else set())
    needed |= {number - 1 for kind, number in paths if kind == "successive"}

    networks, before = {}, None
    console = make_console()
    disable = not (shown and console.is_interactive)
    progress = {"description": "analysing", "console": console, "disable": disable}
    for number in track(sorted(needed), transient=True, **progress):
        try:
            now = _Networks(members[number], checkpoints.restore(number))
        except DamagedError as error:
            print(f"{error}; it is left out of the analyses", file=sys.stderr)
            before = None
            continue
        if number in of_weights:
            new = _weights(experiment(), number, now, results[results["round"] == number])
            for name, rows in new.items():
                tables[name] = _with_rows(name, tables[name][tables[name]["round"] != number], rows)
        for kind in KINDS:
            if (kind, number) not in paths or (kind == "successive" and before is None):
                continue
            other = tables["paths"][(tables["paths"]["round"] != number) | (tables["paths"]["kind"] != kind)]
            tables["paths"] = _with_rows(
                "paths", other, list(_paths(experiment(), config.analysis, number, kind, before, now))
            )
            _write(workdir, "paths", tables["paths"])  # the one that takes long
        if of_distances:
            if number == 0:
                networks[INITIALISATION] = now.of_arms((now.round.initial["params"], now.round.mask))
            networks[number] = now.of_arms((now.round.trained["params"], now.round.mask))
        before = now

    if of_distances:
        old = tables["distances"]
        rows = _distances(networks, tuple(config.pruning.exclude))
        rows = (row for row in rows if _pair_on_disk(config, *row[3:5]))
        new = _table("distances", rows)
        keys = ["replicate", "arm", "metric", "round_a", "round_b"]
        tables["distances"] = (pd.concat([new, old]) if len(old) else new).drop_duplicates(keys)
    barriers = _barriers(tables["paths"], config.analysis.baseline)
    tables["barriers"] = _with_unknown_columns("barriers", barriers, tables["barriers"])
    for name, table in tables.items():
        _write(workdir, name, table)


def drop_rounds_from(workdir: Path, first: int) -> None:
    """Drop what the tables hold of the rounds from `first` on, which are to be trained, or trained again."""
    for name in TABLES:
        table = _read(workdir, name)
        numbers = table[[column for column in ("round", "round_a", "round_b") if column in table]]
        if not (known := (numbers < first).all(axis=1)).all():
            _write(workdir, name, table[known])


def outdated(workdir: Path) -> list[str]:
    """The tables of a workdir that an earlier version computed by other `DEFINITIONS`."""
    stored = {}
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads((workdir / "analysis" / _DEFINITIONS_FILE).read_text())
    return [
        name
        for name, definition in DEFINITIONS.items()
        if stored.get(name, 1) != definition and (workdir / "analysis" / f"{name}.csv").exists()
    ]


def draw(run: Run) -> dict[str, bytes]:
    """Write every figure that the tables give as PNG and PDF; returns the PNGs by name."""
    drawings = {
        "accuracy": lambda: figures.accuracy(run.results),
        "threshold": lambda: figures.threshold(run.results),
    }
    if len(run.distances):
        for metric in similarity.METRICS:
            drawings[f"distances_{metric}"] = functools.partial(figures.distances, run.distances, metric)
    if len(run.histograms):
        drawings["histograms"] = lambda: figures.histograms(run.histograms)
    if (run.barriers["kind"] == "successive").any():
        drawings["barriers"] = lambda: figures.barriers(run.paths, run.barriers, run.results)
    if (run.barriers["kind"] == "instability").any():
        drawings["instability"] = lambda: figures.instability(run.barriers, run.results)
    pngs = {}
    for name, draw_figure in drawings.items():
        path = run.workdir / "figures" / f"{name}.png"
        try:
            figure = draw_figure()
            png, pdf = figures.to_bytes(figure), figures.to_bytes(figure, "pdf")
        except Exception as error:  # as of a font or LaTeX that the user's settings ask for
            print(f"{path} is missing, as it cannot be drawn: {one_line(error)}", file=sys.stderr)
            continue
        _save(run.workdir, path, png)
        _save(run.workdir, path.with_suffix(".pdf"), pdf)
        pngs[name] = png
    return pngs


def _setup(config, workdir, config_file):
    """The experiment of a workdir, once its config file has registered what it registers."""
    if config_file:
        _execute_config_file(config_file)
    try:
        experiment = setup(config, use_mesh=False)
    except UnknownNameError as error:
        kept = stored_config_file(workdir)
        if config_file or not kept:
            raise
        raise UserError(
            f"{error}; if {kept}, the config file of the run, registers it: python -m imp_jax.analysis "
            f"--workdir={workdir} --config=PATH executes it, or the copy {workdir / CONFIG_COPY}"
        ) from error
    require_same_dataset(workdir, experiment.dataset.identity())
    return experiment


def _execute_config_file(config_file):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False)
    try:
        values(["imp_jax.analysis", f"--config={config_file}"])
        getattr(values.config, "items", None)  # a file that could not be read says so here
    except Exception as error:  # it is code, and may raise anything
        raise UserError(
            f"cannot execute the config file {config_file}: {one_line(error)}; mend it, or name another by "
            f"--config"
        ) from error


class _Networks(NamedTuple):
    """The networks of a round, and the members that they lead with."""

    members: tuple[Member, ...]
    round: RoundNetworks

    def trained(self, arm: str, replicate: int) -> Variables:
        index = self.members.index(Member(arm, replicate))
        return jax.tree.map(lambda leaf: leaf[index], self.round.trained)

    def of_arms(self, tree: PyTree) -> dict[Member, PyTree]:
        """The part of each member but the twins in `tree`, which leads with all."""
        return {
            member: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: B023
            for i, member in enumerate(self.members)
            if member.arm != "twin"
        }


def _pair_on_disk(config, one, other):
    """Whether two rounds are compared: with `ends`, if they are on disk together in every run."""
    return config.keep_checkpoints == "all" or min(one, other) <= 0 or abs(one - other) <= 1


def _keys(table, *columns):
    return set(table[list(columns)].itertuples(index=False, name=None))


def _replicates(kind, number, members):
    """Those of which the paths of a kind that end in round `number` have both ends."""
    if kind == "successive":
        ends = set(members.get(number - 1, ())) & set(members[number])
        return [replicate for arm, replicate in ends if arm == "imp"]
    twins = [replicate for arm, replicate in members[number] if arm == "twin"]
    return [replicate for replicate in twins if Member("imp", replicate) in members[number]]


def _incomplete_rounds(tables, members):
    """The rounds of which a table of weights has not as many rows of each member as it should."""
    layers = tables["layers"].groupby(["round", "replicate"]).size()
    layers, expected = layers.to_dict(), layers.max() if len(layers) else 1
    histograms, weights_ = (
        tables[name].groupby(["round", "arm", "replicate"]).size().to_dict()
        for name in ("histograms", "weights")
    )
    return {
        number
        for number, of_round in members.items()
        for arm, replicate in of_round
        if arm != "twin"
        and (
            histograms.get((number, arm, replicate)) != BINS
            or weights_.get((number, arm, replicate)) != 1
            or (arm == "imp" and layers.get((number, replicate)) != expected)
        )
    }


def _paths(experiment, settings, number, kind, before, now):
    """Rows of the paths of one kind that end in round `number`, of every replicate on both splits."""
    dataset = experiment.dataset
    options = {
        "spec": experiment.spec,
        "num_points": settings.path_points,
        "batch_norm": settings.batch_norm,
        "train": dataset.train,
    }
    other, other_arm = (before, "imp") if kind == "successive" else (now, "twin")
    for arm, replicate in now.members:
        if arm != "imp" or Member(other_arm, replicate) not in other.members:
            continue
        ends = now.trained("imp", replicate), other.trained(other_arm, replicate)
        if kind == "successive":
            ends = ends[::-1]
        for split in ("train", "test"):
            losses, errors = connectivity.path_metrics(*ends, getattr(dataset, split), **options)
            alphas = np.linspace(0, 1, len(losses))
            for alpha, loss, error in zip(alphas, losses, errors, strict=True):
                yield replicate, kind, number, split, alpha, float(loss), float(error), options["batch_norm"]


def _drop_stale_paths(paths, settings, finished):
    """The rows of paths with such points and statistics as the config asks for, or whose ends are gone."""
    points = paths.groupby(["replicate", "kind", "round", "split"])["alpha"].transform("size")
    configured = (points == settings.path_points) & (paths["batch_norm"] == settings.batch_norm)
    before = paths["round"] - (paths["kind"] == "successive")
    return paths[configured | ~paths["round"].isin(finished) | ~before.isin(finished)]


def _barriers(paths, baseline):
    rows = []
    for key, points in paths.groupby(["replicate", "kind", "round", "split"], sort=False):
        points = points.sort_values("alpha")
        barriers = (connectivity.error_barrier(points[of].to_numpy(), baseline) for of in ("error", "loss"))
        rows.append((*key, *map(float, barriers)))
    return _table("barriers", rows)


def _distances(networks, exclude):
    """Rows of the matrix of every member, over the initialisation and the rounds in which it was trained."""
    matrices = jax.jit(functools.partial(similarity.distance_matrices, exclude=exclude))
    for member in dict.fromkeys(member for of_round in networks.values() for member in of_round):
        rounds = [number for number, of_round in networks.items() if member in of_round]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(networks[n][member] for n in rounds))
        for metric, matrix in matrices(*stacked).items():
            for (a, b), distance in np.ndenumerate(np.asarray(matrix)):
                yield member.replicate, member.arm, metric, rounds[a], rounds[b], float(distance)


def _weights(experiment, number, networks, results):
    """Rows of the tables histograms, weights and layers of one round."""
    members = [member for member in networks.members if member.arm != "twin"]
    trained, mask = networks.round.trained, networks.round.mask
    params, masks = take_members((trained["params"], mask), networks.members, members)
    by_member = results.set_index(["arm", "replicate"])["threshold"]
    thresholds = np.array([by_member[member] for member in members], np.float32)
    exclude = experiment.pruning.exclude
    counts, limit, bimodality, near_zero, survivors = _weights_of_members(
        params, masks, thresholds, exclude=exclude
    )
    edges = np.linspace(-float(limit), float(limit), BINS + 1)
    rows = {"histograms": [], "weights": [], "layers": []}
    for i, (arm, replicate) in enumerate(members):
        of_member = (replicate, arm, number)
        rows["histograms"] += [
            (*of_member, *bin) for bin in zip(edges[:-1], edges[1:], counts[i].tolist(), strict=True)
        ]
        rows["weights"].append((*of_member, int(survivors[i]), float(bimodality[i]), float(near_zero[i])))
        if arm == "imp":
            variables, mask = jax.tree.map(lambda leaf: leaf[i], networks.round[1:])  # noqa: B023
            rows["layers"] += [(replicate, number, *row) for row in _layers(experiment, variables, mask)]
    return rows


@functools.partial(jax.jit, static_argnames="exclude")
def _weights_of_members(params, masks, thresholds, *, exclude):
    limit = jnp.max(jnp.stack([jnp.abs(leaf).max() for leaf in masking.prunable_leaves(params, exclude)]))

    def of_member(params, mask, threshold):
        return (
            weights.histogram(params, mask, limit, BINS, exclude),
            weights.bimodality(params, mask, exclude),
            weights.share_near_zero(params, mask, threshold, exclude),
            masking.survivors(mask, exclude),
        )

    counts, *scalars = jax.vmap(of_member)(params, masks, thresholds)
    return counts, limit, *scalars


def _layers(experiment, variables, mask):
    """Weights, survivors, units and dead units of each layer with weights; nan where units are not known."""
    survivors = weights.survivors_by_layer(mask)
    image_shape = experiment.dataset.train.image_shape
    alive = _connectivity_of_units(experiment.spec.model, variables, mask, image_shape)
    for layer, kernel in weights.kernels(mask).items():
        units = np.asarray(alive[layer]) if layer in alive else None
        counts = (np.nan, np.nan) if units is None else (units.size, int((~units).sum()))
        yield layer, kernel.size, int(survivors[layer]), *counts


_connectivity_of_units = jax.jit(weights.connectivity_of_units, static_argnums=(0, 3))


def _has_old_repulsion(workdir, config):
    """Whether the last round on disk was trained with an earlier definition of J_r."""
    if not config.repulsion.strength:
        return False
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        finished = checkpoints.rounds()
        return bool(finished) and checkpoints.similarity_definition(finished[-1]) != similarity.DEFINITION


def _stored_config(workdir):
    path = workdir / "config.json"
    try:
        return config_files.from_json(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {path} as a config: {error}") from error


def _table(name, rows: Iterable):
    return pd.DataFrame(list(rows), columns=list(TABLES[name]))


def _with_rows(name, table, rows):
    new = _table(name, rows)
    return pd.concat([table, new]) if len(table) else new.reindex(columns=table.columns)


def _with_unknown_columns(name, table, old):
    """`table` with the columns of `old` that `TABLES` does not have."""
    keys = [column for column in TABLES[name] if column in _KEYS]
    unknown = [column for column in old if column not in TABLES[name]]
    return table.merge(old[keys + unknown], on=keys, how="left") if unknown else table


def _read(workdir, name):
    """A table as it is on disk, with the columns that it has; empty where there is none that can be read."""
    path = workdir / "analysis" / f"{name}.csv"
    with contextlib.suppress(FileNotFoundError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError):
        table = pd.read_csv(path)
        keys = [column for column in TABLES[name] if column in _KEYS]
        if set(keys) <= set(table) and path.read_bytes().endswith(b"\n"):
            return table
    return _table(name, [])


def _set_aside_outdated(workdir):
    for name in outdated(workdir):
        path = workdir / "analysis" / f"{name}.csv"
        place = move_aside(path, workdir)
        print(
            f"{path} was computed by an earlier version, which defined it differently; it is moved to {place} "
            f"and computed anew, for the rounds whose checkpoints are still on disk",
            file=sys.stderr,
        )
    write_atomically(workdir / "analysis" / _DEFINITIONS_FILE, json.dumps(DEFINITIONS))


def _is_unreadable(workdir, name):
    path = workdir / "analysis" / f"{name}.csv"
    return path.exists() and not len(_read(workdir, name)) and path.read_bytes() != _to_csv(_table(name, []))


def _without_incomplete_rows(name, table, finished):
    """The table with all columns, without rows that lack some and can be computed again from rounds on disk."""
    rounds = table[[column for column in ("round", "round_a", "round_b") if column in table]]
    if "kind" in table:
        rounds = rounds.assign(before=table["round"] - (table["kind"] == "successive"))
    if not set(TABLES[name]) <= set(table):
        table = table[~rounds.isin([INITIALISATION, *finished]).all(axis=1)]
    return table.reindex(columns=[*TABLES[name], *(column for column in table if column not in TABLES[name])])


def _set_aside_unreadable(workdir):
    for name in TABLES:
        path = workdir / "analysis" / f"{name}.csv"
        if _is_unreadable(workdir, name):
            with _writing(workdir):
                place = move_aside(path, workdir)
            print(f"{path} cannot be read; it is moved to {place}, and computed again", file=sys.stderr)


@contextlib.contextmanager
def _writing(workdir):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the analyses of {workdir}: {error}") from error


def _save(workdir, path, content):
    with _writing(workdir):
        write_atomically(path, content)


def _write(workdir, name, table):
    names = ("replicate", "arm", "kind", "metric", "round", "round_a", "round_b")
    table = table.sort_values([name for name in names if name in table], kind="stable")
    content = _to_csv(table)
    path = workdir / "analysis" / f"{name}.csv"
    if not path.exists() or path.read_bytes() != content:
        _save(workdir, path, content)


def _to_csv(table):
    return table.to_csv(index=False, float_format="%.9g").encode()
