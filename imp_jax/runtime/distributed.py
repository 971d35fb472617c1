"""Several processes that train together: initialisation, collective checks and shutdown.

All processes run the same program, each with its own devices. Only the primary process prints and writes files
other than checkpoints. Values are exchanged by collective operations of the devices, like gradients, so all
processes must call the functions marked "Collective" in the same order.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import imp_jax
from imp_jax.errors import UserError, one_line

_HEARTBEAT_TIMEOUT_S = 30  # a process without a heartbeat for this long counts as dead
_SHUTDOWN_TIMEOUT_S = 7 * 24 * 3600  # the others wait this long for the primary process, which analyses the run
_INIT_TIMEOUT_S = 300  # until the other processes have started
ABORT_TIMEOUT_S = 10  # until the others have exited; JAX aborts them once process 0 has exited
_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_MAX_MESSAGE_BYTES = 4000  # longer error messages are truncated for the other processes
_FLAGS_HINT = "give each --coordinator=HOST:PORT of process 0, --processes=NUMBER and --process=0, 1, …"


class RemoteUserError(UserError):
    """A UserError that another process has raised and reports."""


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Connect this process to the others that train with it, if it was started as one of several.

    Call it before the first JAX computation. Under srun and mpirun, JAX finds the other processes itself; the
    arguments take precedence.

    Args:
      coordinator: host:port of process 0, reachable from all others.
      processes: number of processes.
      process: index of this process, from 0.

    Raises:
      UserError: the processes cannot find each other.
    """
    if processes == 1 or (
        (coordinator, processes, process) == (None, None, None) and count_tasks(os.environ) <= 1
    ):
        return
    if coordinator:
        _require_reachable(coordinator, seconds=_INIT_TIMEOUT_S if process else 0)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would intercept SIGTERM
    message = "waiting for the other processes to start"
    notice = threading.Timer(10, print, [message], {"file": sys.stderr, "flush": True})
    notice.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=local_gpus(os.environ),
            initialization_timeout=_INIT_TIMEOUT_S,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot find each other: {one_line(error)}; {_FLAGS_HINT}") from error
    finally:
        notice.cancel()


def shutdown(seconds: float = _SHUTDOWN_TIMEOUT_S) -> None:
    """Disconnect from the other processes, once all of them call this or `seconds` have passed."""

    def disconnect():
        # JAX's shutdown aborts a process that waits in it for 5 minutes, so all processes wait here first
        wait_for_all = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has died
            wait_for_all(key="leave", timeout_ms=int(1000 * seconds))
        jax.distributed.shutdown()

    if jax.distributed.is_initialized():
        thread = threading.Thread(target=disconnect, daemon=True)
        thread.start()
        thread.join(seconds)


@contextlib.contextmanager
def silence_other_processes() -> Iterator[None]:
    """Discard stdout of all processes but the primary one."""
    with contextlib.ExitStack() as stack:
        if not is_primary():
            devnull = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        yield


@contextlib.contextmanager
def exit_on_failure(debug: bool = False) -> Iterator[None]:
    """If this process fails, report the error and exit at once.

    The others may be blocked in a collective operation that this process will never join.

    Args:
      debug: also print the traceback of a UserError.
    """
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        process, processes = jax.process_index(), jax.process_count()
        if debug:
            traceback.print_exc()
        if isinstance(error, RemoteUserError):
            pass
        elif isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif is_disk_failure(error):
            print(f"error: cannot continue: {error}", file=sys.stderr, flush=True)
        elif is_failed_collective(error):
            print(
                f"error: process {process} of {processes} cannot continue, probably because another has died: "
                f"{one_line(error)}; the same command continues from what is on disk",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        elif not debug:
            traceback.print_exc()
        sys.stderr.flush()
        shutdown(ABORT_TIMEOUT_S)
        os._exit(1)


def is_failed_collective(error: BaseException | None) -> bool:
    """Return whether an exception is that of a failed collective; JAX raises some of Gloo's as ValueErrors."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)
    return isinstance(error, ValueError) and "Gloo" in str(error)


def is_disk_failure(error: Exception) -> bool:
    """Return whether an exception reports a full, failing or read-only disk; other OSErrors may be bugs."""
    return isinstance(error, OSError) and error.errno in _DISK_FAILURES


def count_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of processes that srun or mpirun started together; 1 without either of them."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(environment.get(name, 1)) for name in names)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the indices of the visible GPUs, without initialising CUDA."""
    if not {"cuda", "gpu"} & set((environment.get("JAX_PLATFORMS") or "cuda").split(",")):
        return []
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def local_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Return the visible GPUs if this process should use all of them; None leaves the choice to JAX.

    Under srun and mpirun, JAX expects one process per GPU. A task that is the only one on its node, or to which
    --gpus-per-task assigned its own GPUs, uses all visible GPUs.
    """
    nodes, tasks = (environment.get(f"SLURM_STEP_NUM_{name}") for name in ("NODES", "TASKS"))
    uses_all = nodes is not None and nodes == tasks
    uses_all |= environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or "SLURM_GPUS_PER_TASK" in environment
    return list(range(len(visible_gpus(environment)))) or None if uses_all else None


def check_same_everywhere(description: str) -> None:
    """Check that all processes would train the same. Collective.

    Args:
      description: identifies what is trained, such as the config.

    Raises:
      UserError: the descriptions, the versions of imp_jax or JAX, or the numbers of devices differ.
    """
    with raise_on_all_processes():
        versions = f"imp_jax {imp_jax.__version__}, jax {jax.__version__}"
        if not all_processes_equal(f"{description}, {versions}, {jax.local_device_count()} devices"):
            raise UserError(
                "the processes differ in their configs, in the versions of imp_jax or JAX, or in how many "
                "devices they have; they should have the same command and environment"
            )


def _require_reachable(coordinator, seconds):
    """Check that `coordinator` is a HOST:PORT that answers within `seconds`; with 0, do not connect."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}; it should be HOST:PORT, such as node1:12345")
    deadline = time.monotonic() + seconds
    while seconds:
        try:
            return socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 does not answer at {coordinator}: {error}; {_FLAGS_HINT}"
                ) from error
            time.sleep(0.2)
    return None


def is_primary() -> bool:
    """Return whether this is the primary process, which prints and writes files; True if there is only one."""
    return jax.process_index() == 0


def global_max(value: int) -> int:
    """Return the maximum of `value` over all processes. Collective."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def all_processes_equal(value: str) -> bool:
    """Return whether all processes have the same value. Collective."""
    checksum = zlib.crc32(value.encode()) >> 1  # fits into an int32
    highest, lowest = global_max(checksum), -global_max(-checksum)  # every process must make both calls
    return highest == lowest


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Raise a UserError of one process in all of them, at the end of the context. Collective.

    If several processes fail, all raise the error of the one with the lowest index.

    Raises:
      RemoteUserError: that process is another one.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        message = str(error).encode() if error else b""
        padded = message[:_MAX_MESSAGE_BYTES].ljust(_MAX_MESSAGE_BYTES, b"\0")
        gathered = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
        messages = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in gathered]
        failed = [process for process, message in enumerate(messages) if message]
        if failed and failed[0] != jax.process_index():
            raise RemoteUserError(f"process {failed[0]}: {messages[failed[0]]}")
    if error:
        raise error
