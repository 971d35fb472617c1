"""Orbax checkpoints: one per round, and the state of the current round; each is written atomically."""

import contextlib
import functools
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

import imp_jax
from imp_jax import similarity
from imp_jax.divergence import TrainingHistory
from imp_jax.errors import UserError, one_line
from imp_jax.masking import Mask
from imp_jax.repulsion import Optima
from imp_jax.runtime import devices, distributed
from imp_jax.training import TrainState, Variables
from imp_jax.workdir.checksums import MANIFEST, compute_checksums, digest_tree, find_damage, is_os_error
from imp_jax.workdir.files import check_workdir_path, write_atomically

_JSON = ("rows", "epoch_rows", "next_plan", "version")  # items without arrays
# The format of checkpoints. Raise it only if earlier checkpoints can no longer be read, because workdirs should
# stay usable. Additional items, files and keys need no new format.
FORMAT = 2


class RoundNetworks(NamedTuple):
    """The networks of a round; every leaf has a leading member axis, sorted by arm as in `config.arms`."""

    initial: (
        Variables  # θ⊙m at the start of training; with rewind_step=k, θ is that of the dense network at step k
    )
    trained: Variables
    mask: Mask


class MidRoundState(NamedTuple):
    """The state of a training: all that is needed to continue with bitwise equal results."""

    step: int  # the next step of the training
    tickets: Variables  # replaced once, at the rewind step of round 0
    states: TrainState
    history: TrainingHistory
    seconds: float  # of training so far
    epoch_rows: Sequence[dict[str, Any]] = ()  # of epochs.csv, for the epochs so far


class DamagedError(UserError):
    """A checkpoint with a missing or truncated file, or with bits that differ from those written."""


def versions(workdir: str | os.PathLike) -> set[str]:
    """Return the versions of this package that wrote the rounds of a workdir; unreadable ones are skipped."""
    found = set()
    for path in Path(workdir).glob("checkpoints/*/version/metadata"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.add(json.loads(path.read_text())["imp_jax"])
    return found


class Checkpoints:
    """The folders `checkpoints` and `progress` of a workdir.

    Step n of `checkpoints` contains the `RoundNetworks` of round n and the rows of results.csv up to it, so a
    crash between writing the two files loses neither. `progress` contains the latest `MidRoundState`. Each
    checkpoint has checksums of its content, its format and the version of the package that wrote it.

    With several processes: each reads on its own; `save*` is collective and every process must call it;
    deleting and moving rounds is done by the primary process only.
    """

    def __init__(self, workdir: str | os.PathLike):
        """Open the checkpoints of `workdir`, without creating folders.

        Raises:
          UserError: Orbax cannot read what it writes to such a path.
        """
        check_workdir_path(workdir)
        self._workdir = Path(workdir).absolute()
        self._rounds = _rounds_manager(self._workdir, {jax.process_index()})

    @functools.cached_property
    def _progress(self):  # opened lazily: another process may be replacing it while this one reads rounds
        return _progress_manager(self._workdir, {jax.process_index()})

    @functools.cached_property
    def _collective_rounds_manager(self):
        return self._rounds if jax.process_count() == 1 else _rounds_manager(self._workdir, _all_processes())

    @functools.cached_property
    def _collective_progress_manager(self):
        if jax.process_count() == 1:
            return self._progress
        return _progress_manager(self._workdir, _all_processes())

    def rounds(self) -> list[int]:
        """Return the rounds on disk, sorted."""
        return sorted(self._rounds.all_steps())

    def save(
        self,
        number: int,
        networks: RoundNetworks,
        rows: list[dict[str, Any]],
        optima: Optima | None = None,
        next_masks: Mask | None = None,
        next_plan: dict[str, Any] | None = None,
        epoch_rows: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write round `number`; on return, it is on disk under its final name.

        Args:
          rows: all of results.csv up to this round.
          optima: for the next round; None if they can be rebuilt from the checkpoints of earlier rounds.
          next_masks: imp's masks of the next round, so that resuming does not prune again.
          next_plan: how the next round trains, if evidence decided this.
          epoch_rows: those of epochs.csv of this round.
        """
        items = {"networks": networks._asdict(), "rows": rows}
        if next_masks is not None and jax.tree.leaves(next_masks)[0].size:
            items["next_masks"] = next_masks
        if next_plan is not None:
            items["next_plan"] = next_plan
        if optima is not None:
            items["optima"] = optima._asdict()
        if epoch_rows:
            items["epoch_rows"] = list(epoch_rows)
        _save(self._collective_rounds_manager, number, items)
        if self._rounds is not self._collective_rounds_manager:
            self._rounds.reload()

    def restore(self, number: int) -> RoundNetworks:
        """Return the networks of round `number`, on the default device.

        Raises:
          DamagedError: a file is missing or short, or a checksum fails.
          UserError: the file system cannot read it at the moment, or its format is unknown to this version.
        """
        networks = _restore(self._rounds, number, "networks")
        return RoundNetworks(**jax.tree.map(jax.numpy.asarray, networks))

    def rows(self, number: int) -> list[dict[str, Any]]:
        """Return the rows of results.csv up to round `number`. Raises: see `restore`."""
        return _restore(self._rounds, number, "rows")

    def epoch_rows(self, number: int) -> list[dict[str, Any]]:
        """Return the rows of epochs.csv of round `number`; [] if there are none. Raises: see `restore`."""
        return _restore(self._rounds, number, "epoch_rows") or []

    def next_masks(self, number: int) -> Mask | None:
        """Return imp's masks of the round after `number`, on the host, or None. Raises: see `restore`."""
        return _restore(self._rounds, number, "next_masks")

    def next_plan(self, number: int) -> dict[str, Any] | None:
        """Return the plan that was saved for the round after `number`, or None. Raises: see `restore`."""
        return _restore(self._rounds, number, "next_plan")

    def optima(self, number: int) -> Optima | None:
        """Return the optima saved for the round after `number`, on the host.

        Returns None if they were not saved, or with an older definition of J_r. Raises: see `restore`.
        """
        optima = _restore(self._rounds, number, "optima")
        is_current = optima and self.similarity_definition(number) == similarity.DEFINITION
        return Optima(**optima) if is_current else None

    def similarity_definition(self, number: int) -> int:
        """Return the `similarity.DEFINITION` of round `number`; checkpoints do not store definition 1."""
        return _read_json(_folder(self._rounds, number), "version").get("similarity", 1)

    def delete_intermediate_rounds(self, last: int) -> None:
        """Delete all rounds except the first and the last two, one of which may turn out damaged."""
        for number in self.rounds()[1:]:
            if number < last - 1:
                folder = self._workdir / "checkpoints" / str(number)
                renamed = folder.rename(f"{folder}.dropped")  # a rename is atomic; deleting is not
                shutil.rmtree(renamed)
        self._rounds.reload()

    def save_progress(self, number: int, progress: MidRoundState, steps: int) -> None:
        """Write the state of round `number`, which has `steps` steps; replaces the state saved before."""
        (self._workdir / "progress").mkdir(exist_ok=True)
        items = {"progress": _as_arrays(progress)}
        if progress.epoch_rows:
            items["epoch_rows"] = list(progress.epoch_rows)
        _save(self._collective_progress_manager, number * (steps + 1) + progress.step, items)

    def progress(self, number: int, like: MidRoundState, steps: int) -> MidRoundState | None:
        """Return the saved state of round `number`, which has `steps` steps; None if not saved.

        `like` is a state with the same tree structure and shapes. Raises: see `restore`.
        """
        latest = self._progress.latest_step()
        if latest is None or latest // (steps + 1) != number:
            return None
        arrays = _restore(self._progress, latest, "progress", _as_arrays(like))
        arrays["history"] = arrays.pop("seen")
        arrays |= {"step": int(arrays["step"]), "seconds": float(arrays["seconds"])}
        return MidRoundState(**arrays, epoch_rows=_restore(self._progress, latest, "epoch_rows") or ())

    def quarantine_damaged_rounds(self) -> list[str]:
        """Prepare a workdir for resuming; the caller must hold its lock. Returns a sentence per moved round.

        Moves damaged rounds after the last intact one to the folder `set-aside`, and removes partial files that
        a crash left. An exception that does not indicate damage is raised, and nothing is moved.

        Raises:
          UserError: there are several rounds and all are damaged; or the newest has an unknown format; or the
            file system cannot read it at the moment.
        """
        for folder in ("checkpoints", "progress"):
            for name in ("*.orbax-checkpoint-tmp*", "*.dropped"):
                for leftover in (self._workdir / folder).glob(name):
                    shutil.rmtree(leftover)
        for folder in (self._workdir, self._workdir / "analysis", self._workdir / "figures"):
            for leftover in folder.glob(".*.*"):
                if leftover.suffix[1:].isdigit():  # a temporary file of write_atomically
                    leftover.unlink()
        damaged = []
        for number in reversed(self.rounds()):
            try:
                for item in ("networks", "rows", "epoch_rows", "next_masks", "next_plan", "optima"):
                    _restore(self._rounds, number, item)
                break
            except DamagedError as error:
                damaged.append((number, error))
        else:
            if len(damaged) > 1:
                raise UserError(f"all {len(damaged)} rounds are damaged; {damaged[0][1]}")
        return [f"{error}; it is moved to {self._move_aside(self._rounds, n)}" for n, error in damaged]

    def moved_rounds(self) -> set[int]:
        """Return the rounds whose damaged checkpoints were moved to the folder `set-aside`."""
        names = (path.name.split("-") for path in self._workdir.glob("set-aside/checkpoints-*"))
        return {int(number) for _, number, *_ in names if number.isdigit()}

    def set_progress_aside(self) -> Path:
        """Move the saved state of a round to the folder `set-aside` and return its new path."""
        return self._move_aside(self._progress, self._progress.latest_step())

    def discard_progress(self) -> None:
        """Delete the saved state of the current round."""
        self._progress.reload()
        for step in self._progress.all_steps():
            self._progress.delete(step)

    def close(self) -> None:
        """Close the checkpoint managers."""
        for name in ("_rounds", "_progress", "_collective_rounds_manager", "_collective_progress_manager"):
            with contextlib.suppress(Exception):  # a failed save has been reported and is raised again
                self.__dict__[name].close()

    def _move_aside(self, manager, step):
        new_path = move_aside(_folder(manager, step), self._workdir)
        manager.reload()
        return new_path


def _all_processes():
    return set(range(jax.process_count()))


def _rounds_manager(workdir, processes):
    handlers = {
        "networks": ocp.PyTreeCheckpointHandler(),
        "next_masks": ocp.PyTreeCheckpointHandler(),
        "optima": ocp.PyTreeCheckpointHandler(),
        "rows": ocp.JsonCheckpointHandler(),
        "epoch_rows": ocp.JsonCheckpointHandler(),
        "next_plan": ocp.JsonCheckpointHandler(),
    }
    return _manager(workdir / "checkpoints", handlers, processes)


def _progress_manager(workdir, processes):
    handlers = {
        "progress": ocp.PyTreeCheckpointHandler(use_compression=False),  # written often
        "epoch_rows": ocp.JsonCheckpointHandler(),
    }
    return _manager(workdir / "progress", handlers, processes, max_to_keep=1)


def _manager(folder, handlers, processes, **options):
    # reading must not create folders; the recorder already writes on its own thread
    options |= {"create": False, "save_root_metadata": False, "enable_async_checkpointing": False}
    # naming the active processes makes Orbax synchronise without the devices, which are busy with training
    options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
        primary_host=min(processes), active_processes=processes
    )
    handlers = {**handlers, "version": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(**options)
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def move_aside(path: Path, workdir: Path) -> Path:
    """Move a file or folder to the folder `set-aside` of a workdir and return its new path."""
    folder = workdir / "set-aside"
    folder.mkdir(exist_ok=True)
    names = (f"{path.parent.name}-{path.name}{f'-{n}' * (n > 1)}" for n in itertools.count(1))
    return path.rename(next(folder / name for name in names if not (folder / name).exists()))


def _as_arrays(progress):
    arrays = progress._asdict()
    arrays["seen"] = arrays.pop("history")  # its name on disk
    del arrays["epoch_rows"]  # an item of its own, which earlier versions did not save
    return {**arrays, "step": np.asarray(progress.step), "seconds": np.asarray(progress.seconds)}


def _save(manager, step, items):
    version = {
        "format": FORMAT,
        "imp_jax": imp_jax.__version__,
        "similarity": similarity.DEFINITION,
        "sha256": {name: digest_tree(item) for name, item in items.items()},
    }
    version["digest"] = digest_tree(version)
    arguments = {
        name: ocp.args.JsonSave(item)
        if name in _JSON
        else ocp.args.PyTreeSave(devices.shard_over_processes(item))
        for name, item in {**items, "version": version}.items()
    }
    manager.save(step, args=ocp.args.Composite(**arguments))
    manager.wait_until_finished()
    if distributed.is_primary():
        # if the process dies before this, the checkpoint can still be read, without a manifest
        folder = _folder(manager, step)
        write_atomically(folder / MANIFEST, json.dumps(compute_checksums(folder)))


def _restore(manager, step, name, like=None):
    """Return an item of a step, with NumPy arrays; None if it was not saved.

    Args:
      like: a tree with the structure of the item; None for nested dicts.
    """
    folder = _folder(manager, step)
    try:
        return _read(manager, step, name, like)
    except UserError:
        raise
    except Exception as error:
        # Orbax raises the same types for a damaged file, a temporary file system error and a bug
        try:
            damage = find_damage(folder, error)
        except OSError as reading_error:
            error, damage = reading_error, ""
        if damage:
            raise DamagedError(f"the checkpoint {folder} is damaged: {damage}") from error
        if is_os_error(error):
            raise UserError(
                f"cannot read the checkpoint {folder}: {one_line(error)}; nothing is changed; "
                f"once this is fixed, the same command continues"
            ) from error
        raise


def _read(manager, step, name, like):
    folder = _folder(manager, step)
    version = _read_json(folder, "version")
    digest = version.pop("digest", None)
    intact = digest == digest_tree(version)
    if version.get("format") != FORMAT and (intact or digest is None):
        raise UserError(
            f"the checkpoint {folder} has format {version.get('format')}, of imp_jax {version.get('imp_jax')}; "
            f"this is imp_jax {imp_jax.__version__}, which reads format {FORMAT}"
        )
    if not intact:
        raise DamagedError(f"the checkpoint {folder} is damaged: its version differs from what was written")
    if name not in version["sha256"]:
        return None
    if name in _JSON:
        item = _read_json(folder, name)
    else:
        metadata = manager.item_metadata(step)[name]
        if metadata is None:  # Orbax hides the reason; this raises it
            (folder / name / "_METADATA").read_bytes()
        tree = metadata.tree if like is None else like
        tree = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)
        arguments = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
        item = manager.restore(step, args=ocp.args.Composite(**{name: arguments}))[name]
    if version["sha256"][name] != digest_tree(item):
        raise DamagedError(f"the checkpoint {folder} is damaged: the bits of {name} differ from those written")
    return item


def _folder(manager, step):
    return Path(manager.directory) / str(step)


def _read_json(folder, name):
    return json.loads((folder / name / "metadata").read_text())
