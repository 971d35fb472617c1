"""What keeps a run on disk and tells of it, in a thread of its own while the training goes on."""

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

from imp_jax import analysis, figures
from imp_jax.arms import Member, members_of_rows
from imp_jax.errors import UserError, one_line
from imp_jax.experiment import Experiment, put_on_one_device
from imp_jax.repulsion import Optima
from imp_jax.runtime import devices, distributed
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError, MidRoundState, RoundNetworks, is_os_error
from imp_jax.workdir.files import write_atomically
from imp_jax.workdir.lock import (
    lock_owner,
    open_workdir,
    require_same_dataset,
    store_config_file,
    store_dataset,
)
from imp_jax.workdir.progress import ProgressDisplay
from imp_jax.workdir.results import Results, Row, recorded_rounds
from imp_jax.workdir.tensorboard import TensorBoardWriter

_MAX_POLLS = 30  # at what the processes see of a workdir, 2 s apart: a file system on a network may be behind
_RECORDING_TIMEOUT_S = 300.0  # for what is being written when a device fails, as when it is out of memory


class Recorder(contextlib.AbstractContextManager):
    """Holds a workdir, takes in what a run comes to, and writes it in the order in which it came.

    Once something could not be written nothing else is: each call after it, and leaving, raise the UserError
    that says so, or the exception of a bug as it is. Figures, event files and the terminal are not needed to go
    on: what of them cannot be written is missing, with one sentence on stderr.

    Of several processes that train together all call the same, and save checkpoints together; all else is
    written and said by the first.
    """

    def __init__(self, experiment: Experiment, workdir: str | os.PathLike, config_file: str | None = None):
        """Open the workdir, and mend what a crash has left there.

        Args:
          config_file: see `keep_config_file`.

        Raises:
          UserError: see `open_workdir` and `Checkpoints.quarantine_damaged_rounds`.
        """
        self._experiment = experiment
        self._failure: BaseException | None = None
        self._without: set[str] = set()  # what could not be written and is not needed, said once
        self._saving: Future | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._first, self.workdir = distributed.is_primary(), Path(workdir)
        with contextlib.ExitStack() as stack:
            with distributed.raise_on_all_processes(), _reporting_write_errors(workdir):
                if self._first:
                    stack.enter_context(open_workdir(workdir, experiment.config))
                    require_same_dataset(self.workdir, experiment.dataset.identity())
                    store_dataset(self.workdir, experiment.dataset.identity())
                    if config_file:
                        store_config_file(self.workdir, config_file)
                    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
                        for sentence in checkpoints.quarantine_damaged_rounds():
                            print(sentence, file=sys.stderr)
            self._require_same(self._workdir_listing)
            with distributed.raise_on_all_processes(), _reporting_write_errors(workdir):
                self.checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
                self.finished = self.checkpoints.rounds()
                rows = self.checkpoints.rows(self.finished[-1]) if self.finished else []
                self.rows: list[Row] = list(rows)  # of results.csv
                if self._first:
                    self._refuse_or_tell_missing_rounds()
                    self._results = Results(self.workdir, rows)
                    if self.finished:
                        self._refresh_figure()  # a run that died may not have come to it
            self._stack = stack.pop_all()

    def _refuse_or_tell_missing_rounds(self):
        """Compare results.csv with the rounds on disk, before it is written anew from them."""
        recorded = recorded_rounds(self.workdir)
        missing = sorted(recorded - set(self.finished) - self.checkpoints.moved_rounds())
        if missing and not self.finished:
            raise UserError(
                f"{self.workdir} has results.csv and no rounds in its folder checkpoints; put those back, or "
                f"remove results.csv to train all rounds again, or give another --workdir"
            )
        last = max(self.finished, default=-1)
        if self._experiment.config.keep_checkpoints == "ends":
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

    def _require_same(self, seen: Callable[[], str]):
        """Refuse a workdir in which the processes do not all see the same, in the end."""
        with distributed.raise_on_all_processes():
            for _ in range(_MAX_POLLS):
                if distributed.all_processes_equal(seen()):
                    return
                time.sleep(2)
            raise UserError(
                f"the processes do not see the same in {self.workdir}; it should be a folder that all share"
            )

    def saved_progress(self, number: int, like: MidRoundState) -> MidRoundState | None:
        """Where round `number` stood when the run was stopped; None if nothing was saved of it."""
        progress, damage = None, None
        with distributed.raise_on_all_processes():
            try:
                progress = self.checkpoints.progress(number, like, self._experiment.learning_rates.size)
            except DamagedError as error:
                damage = error
        self._require_same(lambda: str(progress and progress.step))
        if progress is not None:
            return progress
        with distributed.raise_on_all_processes(), _reporting_write_errors(self.workdir):
            if self._first and damage:
                aside = self.checkpoints.set_progress_aside()
                print(f"{damage}; it is moved to {aside}, and round {number} begins anew", file=sys.stderr)
            elif self._first:
                self.checkpoints.discard_progress()  # of a finished round, or one that followed a damaged one
        return None

    def begin(self, number: int, step: int) -> None:
        """Be ready for a training that goes on with `step` of round `number`."""
        self._thread, self._analyses = (ThreadPoolExecutor(max_workers=1) for _ in range(2))
        if not self._first:
            return
        with _reporting_write_errors(self.workdir):
            analysis.drop_rounds_from(self.workdir, number)
        epochs, steps = self._experiment.learning_rates.shape
        total = epochs * steps
        self._events = TensorBoardWriter(self.workdir, first_epoch=number * epochs + step // steps + 1)
        self._stack.enter_context(contextlib.closing(self._events))
        display = ProgressDisplay(self._experiment.config.rounds, total, first_step=number * total + step)
        self._display = self._stack.enter_context(display)

    def finish_cleanup(self) -> None:
        """Do what a run that died after its last round had left to do."""
        if not self._first:
            return
        with _reporting_write_errors(self.workdir):
            self.checkpoints.discard_progress()
            if self._experiment.config.keep_checkpoints == "ends":
                self._analyse(self.finished[-1], self._results.table())

    def __exit__(self, *raised):
        device_failed = isinstance(raised[1], jax.errors.JaxRuntimeError)
        process_lost = jax.process_count() > 1 and distributed.is_failed_collective(raised[1])
        stopped = isinstance(raised[1], KeyboardInterrupt)  # the next process analyses what is left
        recorded = threading.Event()

        def release():
            if self._thread:
                self._thread.shutdown()
            recorded.set()
            if self._thread:
                self._analyses.shutdown(cancel_futures=stopped)
            self._stack.close()

        # the lock is released after the last write, even if nobody waits for it below
        releasing = threading.Thread(target=release, daemon=True)
        releasing.start()
        if stopped:
            recorded.wait()
            releasing.join(1)  # an analysis may take longer
        elif process_lost:
            pass  # to save with a process that has died would never end
        else:
            releasing.join(_RECORDING_TIMEOUT_S if device_failed else None)
        if raised[1] is None or isinstance(raised[1], UserError):
            self._raise_failure()  # the graver news

    def chunk(
        self,
        experiment: Experiment,
        number: int,
        progress: MidRoundState,
        images: int,
        seconds: float,
        compile_seconds: float = 0.0,
    ) -> None:
        """Round `number`, of the members of `experiment`, has come to `progress` by `images` in `seconds`."""
        self._raise_failure()
        if not self._first:
            return
        epochs, steps = experiment.learning_rates.shape
        self._display.chunk(number, progress.step, images, seconds, compile_seconds)
        if progress.step % steps == 0:
            scalars = {"epoch_loss": progress.seen.loss, "epoch_accuracy": progress.seen.accuracy}
            epoch = number * epochs + progress.step // steps
            self._write_events(epoch, experiment.members, scalars)

    def progress(self, number: int, progress: MidRoundState, at_once: bool = False) -> None:
        """Save where round `number` stands; not if the one before is still being saved, unless `at_once`.

        With `at_once` it is on disk when this returns.
        """
        self._raise_failure()
        saving = self._saving is not None and not self._saving.done()
        if distributed.global_max(saving) and not at_once:
            return
        members = len(progress.seen.loss)
        progress = progress._replace(
            states=devices.gather_members(progress.states, members)
        )  # the next donates them
        steps = self._experiment.learning_rates.size
        self._saving = self._submit(number, self.checkpoints.save_progress, number, progress, steps)
        if at_once:
            self._saving.result()

    def round(self, number: int, networks: RoundNetworks, rows: list[Row], optima: Optima | None) -> Future:
        """Record round `number`, and the `optima` of the next; the result is `rows`, once all is on disk."""
        return self._submit(number, self._round, number, networks, rows, optima)

    def divergence(self, number: int, member: Member, step: int, what: str) -> None:
        """Add a line to divergences.csv, unless it is there already."""
        row = {"replicate": member.replicate, "arm": member.arm, "round": number, "step": step, "what": what}
        if self._first:
            self._run_guarded(number, self._divergence, pd.DataFrame([row]))

    def _round(self, number, networks, rows, optima):
        config, here = self._experiment.config, members_of_rows(rows, number)
        ends = config.keep_checkpoints == "ends"
        # what a later process could not recall from the rounds before goes with this one
        dropped = not set(self._experiment.members) <= set(here)
        gap = self.finished != list(range(len(self.finished)))
        self.rows = [*self.rows, *rows]
        self.checkpoints.save(number, networks, self.rows, optima if ends or dropped or gap else None)
        if not self._first:
            return rows
        self._results.append(rows)
        self._refresh_figure()
        names = [name for name in rows[0] if name not in ("replicate", "arm", "round")]
        scalars = {name: [row[name] for row in rows] for name in names}
        self._write_events((number + 1) * config.epochs, here, scalars)
        if ends:
            self._analyses.submit(self._run_guarded, number, self._analyse, number, self._results.table())
        if number + 1 == config.rounds:
            self.checkpoints.discard_progress()
        images = len(rows) * self._experiment.learning_rates.size * config.batch_size
        self._display.round(number, rows, images)
        return rows

    def _analyse(self, number, results):
        """What the analyses need of rounds that go; in a thread of its own, as it may take long."""
        config = self._experiment.config
        # the other thread saves with its own
        with contextlib.closing(Checkpoints(self.workdir)) as checkpoints:
            analysis.compute(
                checkpoints, config, lambda: put_on_one_device(self._experiment), self.workdir, results
            )
            # a round that has no optima would lead nowhere without those before it
            if not config.repulsion.strength or (number and checkpoints.optima(number - 1)):
                checkpoints.delete_intermediate_rounds(number)

    def _refresh_figure(self):
        with self._optional("figures/accuracy.png"):
            figure = figures.to_bytes(figures.accuracy(self._results.table()))
            write_atomically(self.workdir / "figures" / "accuracy.png", figure)

    def _write_events(self, epoch, members, scalars):
        if "event files" not in self._without:  # a record that is cut off hides those after it
            with self._optional("event files"):
                self._events.write(epoch, members, scalars)
                self._events.flush()

    @contextlib.contextmanager
    def _optional(self, what):
        """Go on without `what` if it cannot be written."""
        try:
            yield
        except Exception as error:
            if what not in self._without:
                cause = one_line(error)
                print(f"{self.workdir} is without {what}, which cannot be written: {cause}", file=sys.stderr)
            self._without.add(what)

    def _divergence(self, line):
        path = self.workdir / "divergences.csv"
        before = pd.read_csv(path) if path.exists() else line[:0]
        after = pd.concat([before, line]).drop_duplicates(["replicate", "arm", "round"])
        if len(after) > len(before):
            write_atomically(path, after.to_csv(index=False))

    def _submit(self, number, task: Callable, *arguments: Any) -> Future:
        return self._thread.submit(self._run_guarded, number, task, *arguments)

    def _run_guarded(self, number, task, *arguments):
        self._raise_failure()
        try:
            return task(*arguments)
        except (Exception, SystemExit) as error:  # SystemExit would end the main thread without a word
            cause, kept = one_line(error), "the rounds before it are kept"
            if is_os_error(error) and not _concerns_other_files(error, self.workdir):
                self._failure = UserError(
                    f"cannot record round {number} in {self.workdir}: {cause}; {kept}, and once that is mended "
                    f"the same command goes on"
                )
            else:
                self._failure = error if isinstance(error, Exception) else RuntimeError(cause)
                self._failure.add_note(f"while recording round {number} in {self.workdir}; {kept}")
            raise self._failure from (error if self._failure is not error else error.__cause__)

    def _raise_failure(self):
        if self._failure:
            raise self._failure


def _concerns_other_files(error, workdir):
    """Whether an OSError names a file outside of the workdir, as a bug's does."""
    if not isinstance(error, OSError) or error.filename is None or distributed.is_disk_failure(error):
        return False
    return not Path(os.fsdecode(error.filename)).absolute().is_relative_to(workdir.absolute())


@contextlib.contextmanager
def _reporting_write_errors(workdir):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error}") from error
