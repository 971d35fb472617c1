"""What a run says of itself: config.json, results.csv, TensorBoard event files, and the terminal."""

import contextlib
import csv
import io
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from imp_jax import config as configs
from imp_jax.config import UserError

FIELDS = (
    "replicate",
    "arm",
    "round",
    "density",  # surviving fraction of the prunable weights
    "threshold",  # largest magnitude removed after the round
    "train_loss",  # nats
    "train_accuracy",  # in [0, 1]
    "test_loss",
    "test_accuracy",
    "repulsion",  # J_r at the end of training; empty without repulsion
    "cosine",  # the mean of those with earlier optima, on the round's mask; empty where there is none
    "seconds",  # wall time of the round's training, of all members together, without compilation
)
KEYS = ("replicate", "arm", "round")  # of a row
Row = dict[str, Any]
_DATASET_FILE = "dataset.json"
_CONFIG_PATH, CONFIG_COPY = "config_file.txt", "config_file.py"  # in a workdir: of the file given by --config
_LOCK_TIMEOUT_S = 1.0  # `experiments.run status` takes the lock for an instant, to see whether it is free


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike, config: ConfigDict) -> Iterator[Path]:
    """Hold `path` as this config's workdir, made now or found to be so; the hold ends with the process.

    Raises:
      UserError: it cannot be written, or not be read back; it holds a run of another config (the sentence has
        the difference) or results without a config, or another process holds it. Nothing that was there is
        changed then.
    """
    workdir = Path(path)
    refuse_unreadable_path(workdir)
    _refuse_other_run(workdir, config)
    try:
        for folder in ("figures", "checkpoints"):
            (workdir / folder).mkdir(parents=True, exist_ok=True)
        # the operating system's: it ends with the process, however that ends
        lock = FileLock(workdir / ".lock", thread_local=False)  # another thread may release it
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except Timeout as error:
        raise UserError(
            f"{holder(workdir)} is writing to {workdir}; wait for it to end, or give another --workdir"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror}") from error
    try:
        _refuse_other_run(workdir, config)  # another process may have come first
        _write(workdir / ".holder", f"process {os.getpid()} on {socket.gethostname()}")
        _write(workdir / "config.json", configs.to_json(config))
        yield workdir
    finally:
        with contextlib.suppress(OSError):
            (workdir / ".holder").unlink()
        lock.release()


def require_same_dataset(workdir: Path, identity: dict[str, Any]) -> None:
    """Refuse a data set that is not the one a workdir was begun with, as far as `Dataset.identity` tells.

    Raises:
      UserError: another number of images or other classes.
    """
    try:
        stored = json.loads((workdir / _DATASET_FILE).read_text())
    except (OSError, ValueError):  # a new workdir, or one of an earlier version
        return
    if stored == identity:
        return
    there, here = (
        "{train_examples:,} training and {test_examples:,} test images of {num_classes} classes".format(**one)
        for one in (stored, identity)
    )
    if there == here:
        other = next(name for name in identity["classes"] if name not in stored["classes"])
        here = f"as many of other classes, such as {other},"
    raise UserError(
        f"{workdir} was begun with another data set: {there} there, and {here} here; give another --workdir"
    )


def keep_dataset(workdir: Path, identity: dict[str, Any]) -> None:
    """Keep `Dataset.identity` in a workdir, for `require_same_dataset`."""
    _write(workdir / _DATASET_FILE, json.dumps(identity, indent=2) + "\n")


def keep_config_file(workdir: Path, config_file: str) -> None:
    """Keep the absolute path of the config file, as it was given by --config, and a copy of its text.

    `imp_jax.analysis` executes the file at that path, never the copy, which is for a reader. Once rounds are
    recorded the copy stays as it is; a file with another text is reported on stderr.
    """
    path, colon, argument = config_file.partition(":")
    _write(workdir / _CONFIG_PATH, f"{Path(path).absolute()}{colon}{argument}\n")
    copy = workdir / CONFIG_COPY
    try:
        text = Path(path).read_bytes()
    except OSError:  # it may have been moved since it was executed
        return
    if not copy.exists() or not recorded_rounds(workdir):
        _write(copy, text)
    elif copy.read_bytes() != text:
        print(
            f"{path} is another text than {workdir} was begun with, which {copy} keeps and the rounds on disk "
            f"are of; give another --workdir if its model or data set has changed",
            file=sys.stderr,
        )


def kept_config_file(workdir: Path, existing: bool = False) -> str | None:
    """What `keep_config_file` was given, absolute; None if nothing, or with `existing` if no file is there."""
    try:
        config_file = (workdir / _CONFIG_PATH).read_text().rstrip("\n")
    except OSError:
        return None
    return config_file if not existing or Path(config_file.partition(":")[0]).is_file() else None


def refuse_unreadable_path(workdir: str | os.PathLike) -> None:
    """Refuse a workdir whose checkpoints could not be read back, as Orbax takes its path for another one.

    Raises:
      UserError: the absolute path has a sign of glob patterns, a backslash or gs:/, or is not UTF-8.
    """
    path = str(Path(workdir).absolute())
    wrong = [part for part in ("*", "?", "[", "\\", "gs:/") if part in path]
    if wrong or not _is_utf8(path):
        what = wrong[0] if wrong else "bytes that are not UTF-8"
        raise UserError(
            f"the workdir is {path!r}, with {what} in it, which Orbax cannot read back; give a --workdir on "
            f"this machine without any of * ? [ \\ in its path"
        )


def _is_utf8(path):
    try:
        return bool(path.encode())
    except UnicodeEncodeError:  # other bytes, as Python's surrogates
        return False


def holder(workdir: Path) -> str:
    """The process that holds a workdir, in words."""
    try:
        return (workdir / ".holder").read_text()
    except OSError:  # it has only just come, or is about to leave
        return "another process"


def _write(path, content):
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write to workdir {path.parent}: {error.strerror}") from error


def _refuse_other_run(workdir, config):
    stored = workdir / "config.json"
    if stored.exists():
        try:
            differences = configs.differences(config, json.loads(stored.read_text()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read {stored} as a config; mend it, or give another --workdir") from error
        if differences:
            raise UserError(
                f"{workdir} holds a run of another config: {'; '.join(differences)}; give another --workdir"
            )
    elif (workdir / "results.csv").exists() or any(workdir.glob("checkpoints/*")):
        raise UserError(f"{workdir} holds results but no config.json to tell whose; give another --workdir")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write aside, then rename: a reader, or a crash, finds the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class Results:
    """results.csv: appended to once a round, after the round's checkpoint is on disk."""

    def __init__(self, workdir: Path, rows: Iterable[Row]):
        """Start from `rows`, those of the rounds on disk, mending a file that was cut off short of them."""
        self._path = workdir / "results.csv"
        self.rows = _with_unknown_columns(rows, self._path)
        self._columns = list(dict.fromkeys([*FIELDS, *(name for row in self.rows for name in row)]))
        content = self._to_csv(self.rows, header=True)
        if not self._path.exists() or self._path.read_bytes() != content.encode():
            write_atomically(self._path, content)

    def append(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        with open(self._path, "a", newline="") as file:
            file.write(self._to_csv(rows))
            file.flush()
            os.fsync(file.fileno())

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=self._columns)

    def _to_csv(self, rows, header=False):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if header:
            writer.writeheader()
        for row in rows:  # nine digits tell any two float32 apart
            writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
        return text.getvalue()


def recorded_rounds(workdir: Path) -> set[int]:
    """The rounds in results.csv, as far as it can be read."""
    try:
        return set(pd.read_csv(workdir / "results.csv")["round"].dropna().astype(int))
    except (FileNotFoundError, ValueError, KeyError):  # there is none, or it is torn
        return set()


def read_results(workdir: Path) -> pd.DataFrame:
    """results.csv of a workdir, empty where there is none.

    A column of `FIELDS` that it lacks, as a file of an earlier version does, is NaN, with a warning. Columns
    that are not in `FIELDS` come last.
    """
    path = workdir / "results.csv"
    if not path.exists():
        return pd.DataFrame(columns=list(FIELDS))
    return with_columns(pd.read_csv(path), FIELDS, path)


def with_columns(table: pd.DataFrame, columns: Sequence[str], path: Path) -> pd.DataFrame:
    """`table`, read from `path`, with `columns` first: those that it lacks as NaN, with a warning."""
    if missing := [name for name in columns if name not in table]:
        warnings.warn(f"{path} has no column {', '.join(missing)}; NaN stands there", stacklevel=4)
    return table.reindex(columns=[*columns, *(name for name in table if name not in columns)])


def _with_unknown_columns(rows, path):
    """Copies of `rows` with the values of columns that only the file has, as one added by hand."""
    rows = [dict(row) for row in rows]
    try:
        table = pd.read_csv(path).set_index(list(KEYS))
    except (OSError, ValueError, KeyError):  # there is none, or it is torn
        return rows
    unknown = table[[name for name in table if name not in FIELDS]]
    if not len(unknown.columns) or not unknown.index.is_unique:
        return rows
    for row in rows:
        key = tuple(row.get(name) for name in KEYS)
        if key in unknown.index:
            row.update({k: None if pd.isna(v) else v for k, v in unknown.loc[key].items()})
    return rows


class Events:
    """TensorBoard event files, a folder a member under `events`; the step is the epoch since the run began.

    Written where it is called: tensorboardX's own thread dies of a full disk, and its queue then blocks.
    """

    def __init__(self, workdir: Path, first_epoch: int):
        """`first_epoch`: TensorBoard forgets what a run that was cut off had written from there on."""
        self._folder, self._first_epoch = workdir / "events", first_epoch
        self._writers: dict[tuple[str, int], EventsWriter] = {}

    def write(
        self, epoch: int, members: Sequence[tuple[str, int]], scalars: Mapping[str, Sequence[float]]
    ) -> None:
        """Write each named scalar of each member at the end of `epoch`; twins have no file."""
        for i, (arm, replicate) in enumerate(members):
            if arm != "twin":
                values = [Summary.Value(tag=name, simple_value=of[i]) for name, of in scalars.items()]
                event = Event(wall_time=time.time(), step=epoch, summary=Summary(value=values))
                self._writer(arm, replicate).write_event(event)

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # of a full disk the run has said already
                writer.close()

    def _writer(self, *member):
        if member not in self._writers:
            folder = self._folder / "{}-{}".format(*member)
            folder.mkdir(parents=True, exist_ok=True)
            writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
            writer.write_event(Event(step=self._first_epoch, session_log=SessionLog(status=SessionLog.START)))
            self._writers[member] = writer
        return self._writers[member]


def make_console() -> Console:
    """Make a console for stdout: with colours and bars on a terminal, plain lines elsewhere.

    FORCE_COLOR does not count, and a notebook is no terminal: rich would show each line twice there.
    """
    try:
        terminal = sys.stdout.isatty()
    except (AttributeError, ValueError):  # no stdout, or a closed one
        terminal = False
    return Console(soft_wrap=True, force_terminal=terminal, force_jupyter=False)


class Display:
    """Progress: a line for each round, and on a terminal a bar below them. Use as a context manager.

    What it cannot print it drops: the results are on disk.
    """

    def __init__(self, rounds: int, steps: int, first_step: int):
        """`steps` a round; the run goes on from `first_step`, counted from its beginning."""
        self._console = make_console()
        self._rounds, self._steps, self._first_step = rounds, steps, first_step
        self._accuracies = ""
        self._compile_seconds: dict[int, float] = {}  # by round
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[speed]:,.0f} images/s"),
            TextColumn("{task.fields[left]} left"),
            TextColumn("{task.fields[accuracies]}"),
            console=self._console,
            disable=not self._console.is_interactive,
        )

    def __enter__(self):
        with _suppress_print_errors():
            self._progress.start()
        self._task = self._progress.add_task(
            "compiling",
            total=self._rounds * self._steps,
            completed=self._first_step,
            speed=0.0,
            left="–",
            accuracies="",
        )
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        with _suppress_print_errors():
            self._progress.stop()

    def chunk(self, number: int, step: int, images: int, seconds: float, compile_seconds: float = 0.0) -> None:
        """Round `number` has come to `step`, the last `images` images, of all members, in `seconds`.

        Programs were compiled for `compile_seconds` before.
        """
        self._compile_seconds[number] = self._compile_seconds.get(number, 0.0) + compile_seconds
        self._start += compile_seconds  # or the time left would contain it again and again
        with _suppress_print_errors():
            self._progress.update(
                self._task,
                completed=number * self._steps + step,
                description=f"round {number}/{self._rounds - 1} {step / self._steps:4.0%}",
                speed=images / seconds,
                left=self._left(number * self._steps + step),
                accuracies=self._accuracies,
            )

    def round(self, number: int, rows: Sequence[Row], images: int) -> None:
        """Round `number`, which trained on `images` images of all members, is on disk with `rows`."""
        means = pd.DataFrame(rows).query("arm != 'twin'").groupby("arm", sort=False)["test_accuracy"].mean()
        self._accuracies = " ".join(f"{arm} {mean:.2%}" for arm, mean in means.items())
        compiled = self._compile_seconds.pop(number, 0.0)
        line = (
            f"round {number}/{self._rounds - 1}  density {rows[0]['density']:.2%}  "
            f"test accuracy {self._accuracies}  {images / rows[0]['seconds']:,.0f} images/s  "
            f"{rows[0]['seconds']:.1f} s  {self._left((number + 1) * self._steps)} left"
        )
        if compiled >= 0.1:
            line += f"  compiled in {compiled:.1f} s"
        with _suppress_print_errors():
            self._progress.update(self._task, accuracies=self._accuracies)
            self._console.print(line, highlight=False)
            sys.stdout.flush()

    def _left(self, step):
        rate = (time.perf_counter() - self._start) / max(step - self._first_step, 1)
        minutes, seconds = divmod(round(rate * (self._rounds * self._steps - step)), 60)
        return f"{minutes}:{seconds:02}"


def _suppress_print_errors():
    return contextlib.suppress(OSError, SystemExit)  # rich raises SystemExit where a pipe is closed


@contextlib.contextmanager
def ignore_print_errors() -> Iterator[None]:
    """Drop what is printed once stdout or stderr is closed or full, as after `| head -1`.

    The results are on disk. A full stdout is mentioned on stderr; a closed pipe is not: its reader has ended.
    """
    with contextlib.ExitStack() as stack:
        for name, redirect in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr)):
            if (stream := getattr(sys, name)) is not None:
                lossy = _LossyStream(stream, name)
                stack.enter_context(redirect(lossy))
                stack.callback(lossy.flush)
        yield


class _LossyStream:
    """A text stream that drops what the stream below it cannot write."""

    def __init__(self, stream, name):
        self._stream, self._name, self._failed = stream, name, False

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error):
        if self._name == "stdout" and not isinstance(error, BrokenPipeError) and not self._failed:
            print(f"stdout cannot be written: {error}; the run goes on without it", file=sys.stderr)
        self._failed = True
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # for what is buffered, too
            os.dup2(nowhere.fileno(), self._stream.fileno())


def print_summary(results: pd.DataFrame) -> None:
    """The result on the terminal: test accuracy over density, a column an arm, mean (min to max)."""
    results = results[results["arm"] != "twin"]
    replicates = results["replicate"].nunique()
    title = "Test accuracy in %" + (f", mean (min to max) of {replicates} replicates" if replicates > 1 else "")
    table = Table("round", "density", *results["arm"].unique(), title=title, title_justify="left")
    for (number, density), rows in results.groupby(["round", "density"]):
        cells = []
        for _, of_arm in rows.groupby("arm", sort=False):
            accuracy = 100 * of_arm["test_accuracy"]
            spread = f" ({accuracy.min():.2f} to {accuracy.max():.2f})" if len(accuracy) > 1 else ""
            cells.append(f"{accuracy.mean():.2f}{spread}")
        table.add_row(str(number), f"{density:.2%}", *cells)
    make_console().print(table)
