"""Where runs train: beside each other on this machine, or as jobs of a Slurm cluster."""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.sweeps.runs import REPOSITORY, Run
from experiments.sweeps.sweep import Sweep
from imp_jax.errors import UserError, one_line
from imp_jax.runtime.distributed import visible_gpus
from imp_jax.runtime.signals import SIGNALS
from imp_jax.workdir.files import write_atomically

PROMPT = "$ "  # ahead of the command in a log
TRIES = 2  # of a run on this machine
# exit statuses of a training that a signal ended, in good order or while it was starting
STOPPED = {128 + number for number in SIGNALS} | {-number for number in SIGNALS}
AHEAD = 120  # seconds before a Slurm job's time is up that it is told to stop, if that is not most of its time


def start(sweep: Sweep, run: Run, data_dir: str | None, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Train a run, or go on with it, in a process of its own; its log begins with the command."""
    sweep.logs.mkdir(parents=True, exist_ok=True)
    sweep.log(run, "failed").unlink(missing_ok=True)
    command = run.command(sweep.workdir(run).absolute(), data_dir)
    with open(sweep.log(run), "a") as log:
        print(f"{PROMPT}{shlex.join(command)}", file=log, flush=True)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=REPOSITORY, env=env, **pipes)


def note_failure(sweep: Sweep, run: Run, status: int) -> str:
    """Write down why a run ended with exit status `status`, and return it."""
    lines = sweep.log(run).read_text(errors="replace").strip().splitlines()
    begun = max(place for place, line in enumerate(lines) if line.startswith(PROMPT))
    lines = lines[begun + 1 :] or ["it said nothing"]
    said = [line for line in lines if line.startswith("error: ")] or lines
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    why = f"{how}: {said[-1].removeprefix('error: ')}"
    write_atomically(sweep.log(run, "failed"), why + "\n")
    return why


def local(sweep: Sweep, runs: Sequence[Run], data_dir: str | None, say: Callable[[str], None]) -> int:
    """Train `runs` on this machine: a worker a GPU, or one on the CPU. A failed run is tried once more.

    The first signal stops all in good order, a second at once.

    Returns: how many failed.

    Raises:
      Interrupted: after a signal, once all have ended.
    """
    places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible_gpus(os.environ)] or [{}]
    waiting, tries, training, failed = deque(runs), Counter(), {}, 0
    with tempfile.TemporaryDirectory() as compiled, forward_signals(training) as received:
        shared = {
            "JAX_COMPILATION_CACHE_DIR": compiled,  # what runs compile alike is compiled once
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:
            shared = {}
        while training or (waiting and not received):
            while places and waiting and not received:
                run, place = waiting.popleft(), places.pop()
                tries[run] += 1
                sweep.log(run, "job").unlink(missing_ok=True)  # of Slurm, before
                process = start(sweep, run, data_dir, env=os.environ | shared | place)
                training[run] = process, place, time.monotonic()
                if received:  # just now
                    process.send_signal(received[0])
                say(f"started {run.name}")
            time.sleep(0.2)
            for run, (process, place, since) in list(training.items()):
                if process.poll() is None:
                    continue
                del training[run]
                places.append(place)
                minutes, seconds = divmod(round(time.monotonic() - since), 60)
                took = f"after {minutes}:{seconds:02} min"
                if process.returncode == 0:
                    say(f"done    {run.name} {took}")
                elif received and process.returncode in STOPPED:
                    say(f"stopped {run.name} {took}")
                else:
                    why = note_failure(sweep, run, process.returncode)
                    again = tries[run] < TRIES and not received
                    say(f"failed  {run.name} {took}, {why}{'; trying again' if again else ''}")
                    if again:
                        waiting.append(run)
                    else:
                        failed += 1
    if received:
        raise Interrupted(received[0])
    return failed


class Interrupted(KeyboardInterrupt):
    """A sweep was stopped by signal `number`; all its runs have ended."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on")
        self.number = number


@contextlib.contextmanager
def forward_signals(training) -> Iterator[list[int]]:
    """Signals that come meanwhile, which are passed on to the `training` processes."""
    received = []

    def pass_on(number, _):
        received.append(number)
        for process, *_ in training.values():
            process.send_signal(number)

    caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup means it
    before = {number: signal.signal(number, pass_on) for number in caught}
    try:
        yield received
    finally:
        for process, *_ in training.values():  # if the launcher itself fails, none goes on unseen
            process.terminate()
        for process, *_ in training.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


class Training:
    """What a job on Slurm calls; submitit pickles it, and asks `checkpoint` what to requeue."""

    def __init__(self, root: Path, run: Run, data_dir: str | None):
        self._sweep, self._run, self._data_dir = Sweep(root), run, data_dir
        self._process = None

    def __call__(self) -> None:
        # some clusters send the SIGUSR2 that tells of the time limit to this process alone, others to all: the
        # training is to hear of it from here
        before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which a process inherits
        self._process = start(self._sweep, self._run, self._data_dir)
        signal.signal(signal.SIGUSR2, before)
        status = self._process.wait()
        if status in STOPPED:
            raise RuntimeError("stopped by a signal; the same command goes on")
        if status:
            raise RuntimeError(note_failure(self._sweep, self._run, status))

    def checkpoint(self):
        """Called by the handler of SIGUSR2, within `wait`: let the training save its state and end."""
        import submitit

        if self._process:
            os.kill(self._process.pid, signal.SIGUSR1)
            # its status is left for `wait`, which holds the lock that asking Popen would need
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Training(self._sweep.root, self._run, self._data_dir))


def slurm(sweep: Sweep, runs: Sequence[Run], data_dir: str | None, options: dict) -> list[str]:
    """Hand `runs` to Slurm as an array of jobs, which go on by themselves when their time is up.

    Args:
      options: parameters of submitit, such as timeout_min and slurm_partition.

    Returns: the numbers of the jobs.

    Raises:
      UserError: no Slurm or no submitit here; Slurm's own words, where it rejects the jobs.
    """
    if not shutil.which("sbatch"):
        raise UserError("there is no Slurm here: sbatch is not found; use --launcher=local")
    try:
        import submitit
    except ImportError as error:
        raise UserError('--launcher=slurm needs submitit: pip install -e ".[slurm]"') from error
    sweep.logs.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=sweep.root / "slurm", cluster="slurm", slurm_max_num_timeout=1000)
    executor.update_parameters(
        name="imp_jax",
        slurm_setup=[f"cd {shlex.quote(str(REPOSITORY))}"],
        slurm_signal_delay_s=min(AHEAD, 30 * options["timeout_min"]),
        slurm_additional_parameters={"requeue": True},  # some clusters do not by default
        **options,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            jobs = executor.submit_array([Training(sweep.root, run, data_dir) for run in runs])
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"Slurm rejects the jobs: {_of_sbatch(error)}") from error
    for run, job in zip(runs, jobs, strict=True):
        write_atomically(sweep.log(run, "job"), job.job_id)
    return [job.job_id for job in jobs]


def _of_sbatch(error):
    said = re.findall(r"^.*sbatch: error: (.*)$", str(error), re.MULTILINE)
    return "; ".join(dict.fromkeys(said)) or one_line(error)
