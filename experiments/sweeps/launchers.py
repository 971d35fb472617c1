"""Train runs: concurrently on this machine, or as jobs of a Slurm cluster."""

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

from experiments.sweeps.runs import REPOSITORY, AnyRun, RunPack, pack_runs
from experiments.sweeps.sweep import Sweep
from imp_jax.errors import UserError, one_line
from imp_jax.runtime.distributed import visible_gpus
from imp_jax.runtime.signals import SIGNALS
from imp_jax.workdir.files import write_atomically

PROMPT = "$ "  # precedes the command in a log
MAX_TRIES = 2  # of a run on this machine
POLL_S = 0.2  # interval at which the processes are polled
# exit statuses of a training that a signal stopped, after it saved its state or while it was starting
STOPPED = {128 + number for number in SIGNALS} | {-number for number in SIGNALS}
SIGNAL_DELAY_S = 120  # a Slurm job is signalled this long before its time limit, or at half of a short limit


def start_training(
    sweep: Sweep, run: AnyRun | RunPack, data_dir: str | None, env: dict[str, str] | None = None
) -> subprocess.Popen:
    """Start or resume a run in a process of its own, and write its command to the log."""
    sweep.logs.mkdir(parents=True, exist_ok=True)
    for one in run.runs:
        sweep.log_path(one, "failed").unlink(missing_ok=True)
    command = run.command(sweep.workdir(run).absolute(), data_dir)
    with open(sweep.log_path(run), "a") as log:
        print(f"{PROMPT}{shlex.join(command)}", file=log, flush=True)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=REPOSITORY, env=env, **pipes)


def note_failure(sweep: Sweep, run: AnyRun | RunPack, status: int) -> str:
    """Write down why a run, or each run of a pack, ended with exit status `status`, and return it."""
    lines = sweep.log_path(run).read_text(errors="replace").strip().splitlines()
    command_index = max(index for index, line in enumerate(lines) if line.startswith(PROMPT))
    lines = lines[command_index + 1 :] or ["it printed nothing"]
    errors = [line for line in lines if line.startswith("error: ")] or lines
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    why = f"{how}: {errors[-1].removeprefix('error: ')}"
    for one in run.runs:
        write_atomically(sweep.log_path(one, "failed"), why + "\n")
    return why


def train_locally(
    sweep: Sweep, runs: Sequence[AnyRun], data_dir: str | None, report: Callable[[str], None], pack: int = 1
) -> int:
    """Train `runs` on this machine, with one worker per GPU, or one on the CPU.

    A branch starts after the runs that it needs have ended. A failed run is tried once more, and the runs of a
    failed pack one by one. The first signal lets all trainings save their state and stop; a second one stops
    them at once.

    Args:
      pack: the number of runs, if they can train in one program, that a process trains.

    Returns: the number of runs that failed.

    Raises:
      Interrupted: a signal arrived; all trainings have ended.
    """
    workers = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible_gpus(os.environ)] or [{}]  # idle ones
    waiting, tries, training, failed = deque(pack_runs(runs, pack)), Counter(), {}, 0
    with tempfile.TemporaryDirectory() as cache_dir, forward_signals(training) as received:
        cache = {  # programs that several runs need are compiled once
            "JAX_COMPILATION_CACHE_DIR": cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:
            cache = {}
        while training or (waiting and not received):
            while workers and not received and (run := _find_ready(waiting, training)):
                waiting.remove(run)
                worker = workers.pop()
                tries[run] += 1
                for one in run.runs:
                    sweep.log_path(one, "job").unlink(missing_ok=True)  # from an earlier submission to Slurm
                process = start_training(sweep, run, data_dir, env=os.environ | cache | worker)
                training[run] = process, worker, time.monotonic()
                if received:  # after the check above: `forward_signals` did not know this process yet
                    process.send_signal(received[0])
                report(f"started {run.name}" + _list_packed(run))
            time.sleep(POLL_S)
            for run, (process, worker, start) in list(training.items()):
                if process.poll() is None:
                    continue
                del training[run]
                workers.append(worker)
                minutes, seconds = divmod(round(time.monotonic() - start), 60)
                duration = f"after {minutes}:{seconds:02} min"
                if process.returncode == 0:
                    report(f"done    {run.name} {duration}")
                elif received and process.returncode in STOPPED:
                    report(f"stopped {run.name} {duration}")
                else:
                    why = note_failure(sweep, run, process.returncode)
                    states = sweep.read_states(run.runs)
                    unfinished = [one for one in run.runs if states[one].status != "done"]
                    try_again = not received and (isinstance(run, RunPack) or tries[run] < MAX_TRIES)
                    report(f"failed  {run.name} {duration}, {why}{'; trying again' if try_again else ''}")
                    if try_again:
                        waiting.extend(unfinished)
                    else:
                        failed += len(unfinished)
    if received:
        raise Interrupted(received[0])
    return failed


def _list_packed(run):
    return f": {'; '.join(one.name for one in run.runs)}" if isinstance(run, RunPack) else ""


def _find_ready(waiting, training):
    """Return the first waiting run for which nothing that it needs is still to be trained; None if none is."""
    unfinished = {run for job in (*waiting, *training) for run in job.runs}
    return next((run for run in waiting if not unfinished & set(run.needs)), None)


class Interrupted(KeyboardInterrupt):
    """Raised after a sweep was stopped by signal `number` and all its trainings have ended."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command continues")
        self.number = number


@contextlib.contextmanager
def forward_signals(training) -> Iterator[list[int]]:
    """Forward signals to the processes in `training`, a dict by run; yield the list of received signals.

    On exit, terminate the processes that are left, for instance if the launcher fails.
    """
    received = []

    def forward(number, _):
        received.append(number)
        for process, *_ in training.values():
            process.send_signal(number)

    caught = [
        number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    ]  # an ignored signal, as under nohup, stays ignored
    previous_handlers = {number: signal.signal(number, forward) for number in caught}
    try:
        yield received
    finally:
        for process, *_ in training.values():
            process.terminate()
        for process, *_ in training.values():
            process.wait()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


class Training:
    """The function of a Slurm job. submitit pickles it, and calls `checkpoint` to learn what to requeue."""

    def __init__(self, root: Path, run: AnyRun, data_dir: str | None):
        self._sweep, self._run, self._data_dir = Sweep(root), run, data_dir
        self._process = None

    def __call__(self) -> None:
        # Before the time limit some clusters send SIGUSR2 to this process only, others to all processes of the
        # job. The training ignores it, and is signalled by `checkpoint` in both cases.
        previous_handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # child processes inherit SIG_IGN
        self._process = start_training(self._sweep, self._run, self._data_dir)
        signal.signal(signal.SIGUSR2, previous_handler)
        status = self._process.wait()
        if status in STOPPED:
            raise RuntimeError("stopped by a signal; the same command continues")
        if status:
            raise RuntimeError(note_failure(self._sweep, self._run, status))

    def checkpoint(self):
        """Let the training save its state and end. Called by the handler of SIGUSR2, during `wait`."""
        import submitit

        if self._process:
            os.kill(self._process.pid, signal.SIGUSR1)
            # leave the exit status to `wait`, which holds the lock that the methods of Popen would need
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Training(self._sweep.root, self._run, self._data_dir))


def submit_to_slurm(sweep: Sweep, runs: Sequence[AnyRun], data_dir: str | None, options: dict) -> list[str]:
    """Submit `runs` to Slurm as an array of jobs, which are requeued and resume when their time is up.

    Args:
      options: parameters of submitit, such as timeout_min and slurm_partition.

    Returns: the ids of the jobs.

    Raises:
      UserError: Slurm or submitit is missing, or Slurm rejects the jobs, with its own message.
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
        slurm_signal_delay_s=min(SIGNAL_DELAY_S, 30 * options["timeout_min"]),
        slurm_additional_parameters={"requeue": True},  # not the default on some clusters
        **options,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            jobs = executor.submit_array([Training(sweep.root, run, data_dir) for run in runs])
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"Slurm rejects the jobs: {_extract_sbatch_errors(error)}") from error
    for run, job in zip(runs, jobs, strict=True):
        write_atomically(sweep.log_path(run, "job"), job.job_id)
    return [job.job_id for job in jobs]


def _extract_sbatch_errors(error):
    messages = re.findall(r"^.*sbatch: error: (.*)$", str(error), re.MULTILINE)
    return "; ".join(dict.fromkeys(messages)) or one_line(error)
