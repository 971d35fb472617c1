"""Terminal output of a run: a line per round, a progress bar, a summary."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from imp_jax.workdir.results import Row


def make_console() -> Console:
    """Make a console for stdout: with colours and progress bars on a terminal, with plain lines otherwise.

    FORCE_COLOR is ignored. A notebook does not count as a terminal, because rich would show each line twice.
    """
    try:
        terminal = sys.stdout.isatty()
    except (AttributeError, ValueError):  # no stdout, or a closed one
        terminal = False
    return Console(soft_wrap=True, force_terminal=terminal, force_jupyter=False)


class ProgressDisplay:
    """Prints a line for each round and, on a terminal, a progress bar. A context manager.

    Errors while printing are ignored, because the results are on disk.
    """

    def __init__(self, rounds: int, steps: int, first_step: int):
        """Set up a display for `rounds` of `steps` each; `first_step` is counted from the first round."""
        self._console = make_console()
        self._rounds, self._first_step = rounds, first_step
        self._steps = [steps] * rounds  # of each round
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
            total=sum(self._steps),
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

    def chunk(
        self,
        number: int,
        step: int,
        images: int,
        seconds: float,
        compile_seconds: float = 0.0,
        steps: int | None = None,
    ) -> None:
        """Show that round `number` has reached `step`.

        Args:
          images: number trained on since the last call, summed over members.
          seconds: time of training since the last call, without compilation.
          compile_seconds: time of compilation since the last call.
          steps: of this round, if it has another number; the rounds after it are taken to be like it.
        """
        if steps and steps != self._steps[number]:
            self._steps[number:] = [steps] * (self._rounds - number)
        self._compile_seconds[number] = self._compile_seconds.get(number, 0.0) + compile_seconds
        self._start += compile_seconds  # so that estimates of the time left do not include it
        with _suppress_print_errors():
            self._progress.update(
                self._task,
                completed=sum(self._steps[:number]) + step,
                total=sum(self._steps),
                description=self._describe(number, step),
                speed=images / seconds,
                left=self._left(sum(self._steps[:number]) + step),
                accuracies=self._accuracies,
            )

    def round(self, number: int, rows: Sequence[Row], images: int) -> None:
        """Print the line of round `number` with its `rows`; `images` is the total of all members."""
        means = pd.DataFrame(rows).query("arm != 'twin'").groupby("arm", sort=False)["test_accuracy"].mean()
        self._accuracies = " ".join(f"{arm} {mean:.2%}" for arm, mean in means.items())
        compiled = self._compile_seconds.pop(number, 0.0)
        line = (
            f"round {number}/{self._rounds - 1}  density {rows[0]['density']:.2%}  "
            f"test accuracy {self._accuracies}  {images / rows[0]['seconds']:,.0f} images/s  "
            f"{rows[0]['seconds']:.1f} s  {self._left(sum(self._steps[: number + 1]))} left"
        )
        if compiled >= 0.1:
            line += f"  compiled in {compiled:.1f} s"
        with _suppress_print_errors():
            self._progress.update(self._task, accuracies=self._accuracies)
            self._console.print(line, highlight=False)
            sys.stdout.flush()

    def _describe(self, number, step):
        return f"round {number}/{self._rounds - 1} {step / self._steps[number]:4.0%}"

    def _left(self, step):
        rate = (time.perf_counter() - self._start) / max(step - self._first_step, 1)
        minutes, seconds = divmod(round(rate * (sum(self._steps) - step)), 60)
        return f"{minutes}:{seconds:02}"


class BranchDisplay(ProgressDisplay):
    """A `ProgressDisplay` of a branch, which trains the members of many rounds in groups."""

    def __init__(self, groups: Sequence[int], steps: int, first_step: int):
        """Set up a display; `groups` are their numbers, in the order in which they train."""
        super().__init__(len(groups), steps, first_step)
        self._groups = list(groups)

    def chunk(self, number: int, *arguments: Any, **options: Any) -> None:
        super().chunk(self._groups.index(number), *arguments, **options)

    def round(self, number: int, rows: Sequence[Row], images: int) -> None:
        """Print the line of round `number` with its `rows`, after the group that trained it."""
        accuracies = pd.DataFrame(rows).groupby("arm", sort=False)["test_accuracy"].mean()
        text = " ".join(f"{arm} {mean:.2%}" for arm, mean in accuracies.items())
        with _suppress_print_errors():
            self._console.print(
                f"round {number}  density {rows[0]['density']:.2%}  test accuracy {text}", highlight=False
            )
            sys.stdout.flush()

    def _describe(self, number, step):
        return f"group {number + 1} of {self._rounds} {step / self._steps[number]:4.0%}"


def _suppress_print_errors():
    return contextlib.suppress(OSError, SystemExit)  # rich raises SystemExit if a pipe is closed


@contextlib.contextmanager
def ignore_print_errors() -> Iterator[None]:
    """Ignore print errors after stdout or stderr was closed or its disk is full, for example with `| head -1`.

    The results are on disk all the same. A stdout that cannot be written is reported on stderr, except for a
    closed pipe, whose reader has exited.
    """
    with contextlib.ExitStack() as stack:
        for name, redirect in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr)):
            if (stream := getattr(sys, name)) is not None:
                lossy = _LossyStream(stream, name)
                stack.enter_context(redirect(lossy))
                stack.callback(lossy.flush)
        yield


class _LossyStream:
    """A text stream that ignores write errors of the stream that it wraps."""

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
            print(f"stdout cannot be written: {error}; the run continues without it", file=sys.stderr)
        self._failed = True
        with contextlib.suppress(OSError), open(os.devnull, "wb") as devnull:  # also discards what is buffered
            os.dup2(devnull.fileno(), self._stream.fileno())


def print_summary(results: pd.DataFrame) -> None:
    """Print test accuracies, one row per round and one column per arm: mean (min to max) of the replicates.

    With more than four arms, prints only the means.
    """
    results = results[results["arm"] != "twin"]
    replicates = results["replicate"].nunique()
    arms = results["arm"].unique()
    shows_spread = replicates > 1 and len(arms) <= 4
    mean = "mean (min to max)" if shows_spread else "mean"
    title = "Test accuracy in %" + (f", {mean} of {replicates} replicates" if replicates > 1 else "")
    table = Table("round", "density", title=title, title_justify="left")
    for arm in arms:
        table.add_column(arm, no_wrap=len(arms) > 4)
    for (number, density), rows in results.groupby(["round", "density"]):
        cells = []
        for _, arm_rows in rows.groupby("arm", sort=False):
            accuracy = 100 * arm_rows["test_accuracy"]
            spread = (
                f" ({accuracy.min():.2f} to {accuracy.max():.2f})" if shows_spread and len(accuracy) > 1 else ""
            )
            cells.append(f"{accuracy.mean():.2f}{spread}")
        table.add_row(str(number), f"{density:.2%}", *cells)
    make_console().print(table, width=max(80, 12 * len(arms) + 20) if len(arms) > 4 else None)
