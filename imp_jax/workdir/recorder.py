"""The recorder: writes a run to its workdir on a background thread, while training continues."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imp_jax import figures
from imp_jax.divergence import DivergedError
from imp_jax.errors import UserError, one_line
from imp_jax.experiment import Experiment, put_on_one_device
from imp_jax.members import Member, round_of
from imp_jax.runtime import devices, distributed
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError, MidRoundState
from imp_jax.workdir.checksums import is_os_error
from imp_jax.workdir.epochs import EpochResults
from imp_jax.workdir.files import write_atomically
from imp_jax.workdir.lock import (
    lock_owner,
    open_workdir,
    require_same_dataset,
    store_config_file,
    store_dataset,
)
from imp_jax.workdir.progress import ProgressDisplay
from imp_jax.workdir.results import Results, Row, recorded_rounds, value_columns
from imp_jax.workdir.tensorboard import TensorBoardWriter

_MAX_POLLS = 30  # of a workdir, 2 s apart: a network file system may show new files later on some processes
_RECORDING_TIMEOUT_S = (
    300.0  # for pending writes after a device has failed, for example by running out of memory
)


class Recorder(contextlib.AbstractContextManager):
    """Owns a workdir and writes results to it in order, on a background thread.

    `on_epoch`, `save_progress_if_due` and `on_round` are callbacks of `imp.rounds`. After a failed write, every
    later call and the exit of the context raise the same UserError; an exception that indicates a bug is raised
    unchanged. Figures, event files and terminal output are optional: a failure to write them is reported once
    on stderr.

    With several processes, all make the same calls and save checkpoints collectively; the primary process
    writes and prints everything else.
    """

    def __init__(
        self,
        experiment: Experiment,
        config: ConfigDict,
        workdir: str | os.PathLike,
        config_file: str | None = None,
        analyses: Any = None,
    ):
        """Open the workdir and repair what a crash has left in it.

        Args:
          config: the config from which `experiment` was set up.
          config_file: see `store_config_file`.
          analyses: an object with the functions `compute` and `drop_rounds_from` of `imp_jax.analysis`, called
            before rounds are deleted and before rounds are trained again; with None, no round is deleted.

        Raises:
          UserError: see `open_workdir` and `Checkpoints.quarantine_damaged_rounds`.
        """
        self._config, self._analyses = config, analyses
        self._deletes_rounds = config.keep_checkpoints == "ends" and analyses is not None
        self._experiment = experiment
        self._failure: BaseException | None = None
        self._missing: set[str] = set()  # optional parts that could not be written, each reported once
        self._saving: Future | None = None
        self._recording: Future | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._is_primary, self.workdir = distributed.is_primary(), Path(workdir)
        with contextlib.ExitStack() as stack:
            with distributed.raise_on_all_processes(), _reporting_write_errors(workdir):
                if self._is_primary:
                    stack.enter_context(open_workdir(workdir, config))
                    require_same_dataset(self.workdir, experiment.dataset.identity())
                    store_dataset(self.workdir, experiment.dataset.identity())
                    if config_file:
                        store_config_file(self.workdir, config_file)
                    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
                        for sentence in checkpoints.quarantine_damaged_rounds():
                            print(sentence, file=sys.stderr)
            self._wait_until_equal(self._workdir_listing)
            with distributed.raise_on_all_processes(), _reporting_write_errors(workdir):
                self.checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
                self.finished = self.checkpoints.rounds()
                rows = self.checkpoints.rows(self.finished[-1]) if self.finished else []
                self.rows: list[Row] = list(rows)  # of results.csv
                if self._is_primary:
                    self._check_missing_rounds()
                    self._results = Results(self.workdir, rows)
                    self._epochs = EpochResults(self.workdir, self.checkpoints, rows)
                    if self.finished:
                        self._refresh_figure()  # a run that died may not have drawn it
            self._stack = stack.pop_all()

    def _check_missing_rounds(self):
        """Report rounds of results.csv without a checkpoint; raise a UserError if none has one."""
        recorded = recorded_rounds(self.workdir)
        missing = sorted(recorded - set(self.finished) - self.checkpoints.moved_rounds())
        if missing and not self.finished:
            raise UserError(
                f"{self.workdir} has results.csv and no rounds in its folder checkpoints; put them back, or "
                f"remove results.csv to train all rounds again, or give another --workdir"
            )
        last = max(self.finished, default=-1)
        if self._config.keep_checkpoints == "ends":
            missing = [number for number in missing if not 0 < number < last - 1]
        if lost := [str(number) for number in missing if number < last]:
            print(
                f"{self.workdir} has no checkpoint of round {', '.join(lost)}, which is in results.csv; "
                f"analyses leave it out",
                file=sys.stderr,
            )
        if untrained := [str(number) for number in missing if number > last]:
            print(
                f"{self.workdir} has no checkpoint of round {', '.join(untrained)}, which is in results.csv; "
                f"it is trained again",
                file=sys.stderr,
            )

    def _workdir_listing(self):
        folders = [self.workdir / name for name in ("checkpoints", "progress")]
        listed = [sorted(path.name for path in folder.glob("*")) for folder in folders]
        return f"{lock_owner(self.workdir)}, {listed}"

    def _wait_until_equal(self, describe: Callable[[], str]):
        """Wait until `describe` returns the same on all processes; raise a UserError if it never does."""
        with distributed.raise_on_all_processes():
            for _ in range(_MAX_POLLS):
                if distributed.all_processes_equal(describe()):
                    return
                time.sleep(2)
            raise UserError(
                f"the processes see different files in {self.workdir}; it should be a folder that they share"
            )

    def saved_progress(self, number: int, like: MidRoundState, mesh: Mesh | None) -> MidRoundState | None:
        """Return the saved state of round `number`, on `mesh`; None if there is none.

        `like` is a state with the same tree structure, such as that of a training that has not begun.
        """
        progress, damage = None, None
        with distributed.raise_on_all_processes():
            members = len(like.history.loss)
            # states on the mesh may have more slots than members; saved states do not
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((members, *leaf.shape[1:]), leaf.dtype),
                (like.tickets, like.states),
            )
            like = like._replace(tickets=shapes[0], states=shapes[1])
            try:
                progress = self.checkpoints.progress(number, like, self._experiment.learning_rates.size)
            except DamagedError as error:
                damage = error
        self._wait_until_equal(lambda: str(progress and progress.step))
        if progress is not None:
            trees = (progress.tickets, progress.states)
            tickets, states = devices.shard_members(trees, mesh)
            return progress._replace(tickets=tickets, states=states)
        with distributed.raise_on_all_processes(), _reporting_write_errors(self.workdir):
            if self._is_primary and damage:
                new_path = self.checkpoints.set_progress_aside()
                print(f"{damage}; it is moved to {new_path}, and round {number} starts again", file=sys.stderr)
            elif self._is_primary:
                self.checkpoints.discard_progress()  # of a finished round, or one that followed a damaged one
        return None

    def begin(self, number: int, step: int, display: ProgressDisplay | None = None) -> None:
        """Start the threads, event files and display for a training that begins at `step` of round `number`.

        `display` is by default that of a run from this round to the last.
        """
        self._thread, self._analysis_thread = (ThreadPoolExecutor(max_workers=1) for _ in range(2))
        if not self._is_primary:
            return
        if self._analyses:
            with _reporting_write_errors(self.workdir):
                self._analyses.drop_rounds_from(self.workdir, number)
        epochs, steps = self._experiment.learning_rates.shape
        total = epochs * steps
        self._events = TensorBoardWriter(self.workdir, first_epoch=number * epochs + step // steps + 1)
        self._stack.enter_context(contextlib.closing(self._events))
        display = display or ProgressDisplay(self._experiment.rounds, total, first_step=number * total + step)
        self._display = self._stack.enter_context(display)

    def finish_cleanup(self) -> None:
        """Finish a run that died after its last round: delete the saved state and, if asked, rounds."""
        if not self._is_primary:
            return
        with _reporting_write_errors(self.workdir):
            self.checkpoints.discard_progress()
            if self._deletes_rounds:
                self._analyse_and_delete(self.finished[-1], self._results.table())

    def __exit__(self, *raised):
        if isinstance(raised[1], DivergedError):
            with contextlib.suppress(Exception):  # a failed write is raised below, after the lock is released
                self._record_diverged(raised[1].round, raised[1].diverged)
        device_failed = isinstance(raised[1], jax.errors.JaxRuntimeError)
        process_lost = jax.process_count() > 1 and distributed.is_failed_collective(raised[1])
        stopped = isinstance(raised[1], KeyboardInterrupt)  # the resumed run computes the remaining analyses
        recorded = threading.Event()

        def release():
            if self._thread:
                self._thread.shutdown()
            recorded.set()
            if self._thread:
                self._analysis_thread.shutdown(cancel_futures=stopped)
            self._stack.close()

        # the lock is released after the last write, even if nothing waits for it below
        releasing = threading.Thread(target=release, daemon=True)
        releasing.start()
        if stopped:
            recorded.wait()
            releasing.join(1)  # analyses may take longer
        elif process_lost:
            pass  # a collective save would wait forever for a process that has died
        else:
            releasing.join(_RECORDING_TIMEOUT_S if device_failed else None)
        if raised[1] is None or isinstance(raised[1], UserError):
            self._raise_failure()  # a failed write takes precedence over the error being raised

    def on_epoch(self, end: Any) -> None:
        """Report an `imp.EpochEnd` on the terminal and in the event files, and record new divergences."""
        self._raise_failure()
        self._record_diverged(end.round, end.diverged)
        if not self._is_primary:
            return
        epochs, steps = self._experiment.learning_rates.shape
        step, history = end.progress.step, end.progress.history
        images = end.metrics.loss.size * self._experiment.spec.batch_size
        self._display.chunk(end.round, step, images, end.seconds, end.compile_seconds, end.steps)
        if step % steps == 0 and not self._config.branch.name:  # the epochs of a branch belong to many rounds
            scalars = {"epoch_loss": history.loss, "epoch_accuracy": history.accuracy}
            scalars |= {f"epoch_{name}": values for name, values in value_columns(end.rows).items()}
            self._write_events(end.round * epochs + step // steps, end.members, scalars)

    def save_progress_if_due(self, end: Any) -> None:
        """Save the state of the round of an `imp.EpochEnd`, if its step is one of `Experiment.saved_steps`.

        A state that stops the run for divergence is not saved.
        """
        stops = end.diverged and self._experiment.on_divergence == "stop"
        if end.progress.step in self._experiment.saved_steps and not stops:
            self.save_progress(end.round, end.progress)

    def save_progress(self, number: int, progress: MidRoundState, wait: bool = False) -> None:
        """Save the state of round `number`.

        Args:
          wait: return when it is on disk. If False, skip this save while an earlier one is in progress.
        """
        self._raise_failure()
        saving = self._saving is not None and not self._saving.done()
        if distributed.global_max(saving) and not wait:
            return
        members = len(progress.history.loss)
        # copies: the next step donates the states
        tickets, states = devices.gather_members((progress.tickets, progress.states), members)
        progress = progress._replace(tickets=tickets, states=states)
        steps = self._experiment.learning_rates.size
        self._saving = self._submit(number, self.checkpoints.save_progress, number, progress, steps)
        if wait:
            self._saving.result()

    def on_round(self, end: Any) -> None:
        """Record an `imp.RoundEnd` while the next round trains."""
        self.wait()
        # before the round is on disk: afterwards it is not trained again, and the divergence would be lost
        self._record_diverged(end.round, end.diverged)
        self._recording = self._submit(end.round, self._record_round, end)

    def record_diverged(self, number: int, diverged: dict[Member, tuple[int, str]]) -> None:
        """Record members that diverged in round `number`, or in their own round, before it is on disk."""
        self.wait()
        self._record_diverged(number, diverged)

    def wait(self) -> None:
        """Wait until the last round is on disk; raise the exception of its recording, if any."""
        if self._recording is not None:
            self._recording.result()

    def _record_diverged(self, number: int, diverged: dict[Member, tuple[int, str]]) -> None:
        """Add a row to divergences.csv for each diverged member that has none for this round."""
        rows = [
            {
                "replicate": member.replicate,
                "arm": member.arm,
                "round": round_of(member, number),
                "step": step,
                "what": description,
            }
            for member, (step, description) in diverged.items()
        ]
        if rows and self._is_primary and self._failure is None:
            self._run_guarded(number, self._append_divergences, pd.DataFrame(rows))

    def _record_round(self, end):
        # save the optima if a resumed run could not rebuild them from the checkpoints of earlier rounds
        members_dropped = not set(self._experiment.members) <= set(end.members)
        rounds_missing = self.finished != list(range(len(self.finished)))
        keep_optima = self._config.keep_checkpoints == "ends" or members_dropped or rounds_missing
        self.rows = [*self.rows, *end.rows]
        optima = end.next_optima if keep_optima else None
        next_plan = end.next_plan and end.next_plan._asdict()
        items = (optima, end.next_masks, next_plan, end.epoch_rows)
        self.checkpoints.save(end.round, end.networks, self.rows, *items)
        if not self._is_primary:
            return
        self._results.append(end.rows)
        self._epochs.append(end.epoch_rows)
        self._refresh_figure()
        epochs, steps = self._experiment.learning_rates.shape
        self._write_events((end.round + 1) * epochs, end.members, value_columns(end.rows))
        if self._deletes_rounds:
            arguments = (end.round, self._analyse_and_delete, end.round, self._results.table())
            self._analysis_thread.submit(self._run_guarded, *arguments)
        if end.round + 1 == self._experiment.rounds:
            self.checkpoints.discard_progress()
        images = len(end.rows) * end.rows[0]["epochs"] * steps * self._experiment.spec.batch_size
        self._display.round(end.round, end.rows, images)

    def _analyse_and_delete(self, number, results):
        """Compute the analyses, then delete intermediate rounds; runs on its own thread, as it may be slow."""
        # own Checkpoints, because the recording thread uses self.checkpoints at the same time
        with contextlib.closing(Checkpoints(self.workdir)) as checkpoints:
            self._analyses.compute(
                checkpoints, self._config, lambda: put_on_one_device(self._experiment), self.workdir, results
            )
            # with repulsion, resuming after a round without saved optima needs all earlier rounds
            has_repulsion = self._experiment.spec.repulsion_strength
            if not has_repulsion or (number and checkpoints.optima(number - 1)):
                checkpoints.delete_intermediate_rounds(number)

    def _refresh_figure(self):
        with self._optional("figures/accuracy.png"):
            figure = figures.to_bytes(figures.accuracy(self._results.table()))
            write_atomically(self.workdir / "figures" / "accuracy.png", figure)

    def _write_events(self, epoch, members, scalars):
        if "event files" not in self._missing:  # a truncated record would hide all later records
            with self._optional("event files"):
                self._events.write(epoch, members, scalars)
                self._events.flush()

    @contextlib.contextmanager
    def _optional(self, part):
        """Report, once, that the optional `part` of the workdir cannot be written, and continue without it."""
        try:
            yield
        except Exception as error:
            if part not in self._missing:
                cause = one_line(error)
                print(f"{self.workdir} is without {part}, which cannot be written: {cause}", file=sys.stderr)
            self._missing.add(part)

    def _append_divergences(self, rows):
        path = self.workdir / "divergences.csv"
        known = pd.read_csv(path) if path.exists() else rows[:0]
        extended = pd.concat([known, rows]).drop_duplicates(["replicate", "arm", "round"])
        if len(extended) > len(known):
            write_atomically(path, extended.to_csv(index=False))

    def _submit(self, number, task: Callable, *arguments: Any) -> Future:
        return self._thread.submit(self._run_guarded, number, task, *arguments)

    def _run_guarded(self, number, task, *arguments):
        self._raise_failure()
        try:
            return task(*arguments)
        except (Exception, SystemExit) as error:  # SystemExit would end the main thread silently
            cause, consequence = one_line(error), "the rounds before it are kept"
            if is_os_error(error) and not _concerns_other_files(error, self.workdir):
                self._failure = UserError(
                    f"cannot record round {number} in {self.workdir}: {cause}; {consequence}; "
                    f"once this is fixed, the same command continues"
                )
            else:
                self._failure = error if isinstance(error, Exception) else RuntimeError(cause)
                self._failure.add_note(f"while recording round {number} in {self.workdir}; {consequence}")
            raise self._failure from (error if self._failure is not error else error.__cause__)

    def _raise_failure(self):
        if self._failure:
            raise self._failure


def _concerns_other_files(error, workdir):
    """Return whether an OSError names a file outside the workdir, which indicates a bug."""
    if not isinstance(error, OSError) or error.filename is None or distributed.is_disk_failure(error):
        return False
    return not Path(os.fsdecode(error.filename)).absolute().is_relative_to(workdir.absolute())


@contextlib.contextmanager
def _reporting_write_errors(workdir):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error}") from error
