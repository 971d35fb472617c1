"""Several processes that train together: initialisation, collective checks and shutdown.

All processes run the same program, each with its own devices. Only the primary process prints and writes files
other than checkpoints. Values are exchanged over the devices, like gradients, so all processes must call the
collective functions of this module in the same order.
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

_HEARTBEAT_TIMEOUT_S = 30  # without a heartbeat, after which a process counts as dead
_SHUTDOWN_TIMEOUT_S = 7 * 24 * 3600  # the others wait this long for the process that analyses the run
_INIT_TIMEOUT_S = 300  # for the other processes to start
ABORT_TIMEOUT_S = 10  # for the others to end; without process 0 JAX would abort them
_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_MAX_MESSAGE_BYTES = 4000  # of an error that one process sends to the others
_FLAGS_HINT = "give each --coordinator=HOST:PORT of process 0, --processes=NUMBER and --process=0, 1, …"


class RemoteUserError(UserError):
    """A UserError of another process, which reports it itself."""


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Connect this process to the others that train with it, if it was started as one of several.

    Call it before the first JAX computation. Under srun and mpirun JAX finds the other processes; arguments
    take precedence over what it finds.

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
    waiting = "waiting for the other processes, to begin with all of them"
    told = threading.Timer(10, print, [waiting], {"file": sys.stderr, "flush": True})
    told.start()
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
        told.cancel()


def shutdown(seconds: float = _SHUTDOWN_TIMEOUT_S) -> None:
    """Disconnect from the other processes, once all of them do or `seconds` have passed."""

    def part():
        # JAX's shutdown aborts a process that waits in it for 5 minutes: no process enters it before all can
        everyone = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another has died
            everyone(key="leave", timeout_ms=int(1000 * seconds))
        jax.distributed.shutdown()

    if jax.distributed.is_initialized():
        parting = threading.Thread(target=part, daemon=True)
        parting.start()
        parting.join(seconds)


@contextlib.contextmanager
def silence_other_processes() -> Iterator[None]:
    """Discard stdout of all processes but the primary one."""
    with contextlib.ExitStack() as stack:
        if not is_primary():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


@contextlib.contextmanager
def exit_on_failure(debug: bool = False) -> Iterator[None]:
    """If this process fails, report the error and exit at once.

    The others may be blocked in a collective operation that this process will never join.

    Args:
      debug: show the traceback of a UserError too.
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
            print(f"error: cannot go on: {error}", file=sys.stderr, flush=True)
        elif is_failed_collective(error):
            print(
                f"error: process {process} of {processes} cannot go on, as when another has died: "
                f"{one_line(error)}; the same command goes on after what is on disk",
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
    """Return whether a collective operation failed; JAX raises some failures of Gloo as ValueErrors."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)
    return isinstance(error, ValueError) and "Gloo" in str(error)


def is_disk_failure(error: Exception) -> bool:
    """Return whether an exception reports a full, failing or read-only disk; other OSErrors may be bugs."""
    return isinstance(error, OSError) and error.errno in _DISK_FAILURES


def count_tasks(environment: Mapping[str, str]) -> int:
    """Return how many processes srun or mpirun started as one program; 1 if neither did."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(environment.get(name, 1)) for name in names)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the indices of the visible GPUs, without initialising CUDA."""
    if not {"cuda", "gpu"} & set(environment.get("JAX_PLATFORMS", "cuda").split(",")):
        return []
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def local_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Return the visible GPUs if this process should use all of them; None leaves the choice to JAX.

    Under srun and mpirun JAX expects one process per GPU. A task that is alone on its node, or that was given
    GPUs of its own by --gpus-per-task, uses all GPUs that it sees.
    """
    of_slurm = [environment.get(f"SLURM_STEP_NUM_{name}") for name in ("NODES", "TASKS")]
    alone = None not in of_slurm and of_slurm[0] == of_slurm[1]
    alone |= environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or "SLURM_GPUS_PER_TASK" in environment
    return list(range(len(visible_gpus(environment)))) or None if alone else None


def check_same_everywhere(description: str) -> None:
    """Check that all processes would train the same.

    Args:
      description: of what is trained; equal on all processes.

    Raises:
      UserError: another description here than elsewhere, other versions, or another number of devices.
    """
    with raise_on_all_processes():
        versions = f"imp_jax {imp_jax.__version__}, jax {jax.__version__}"
        if not all_processes_equal(f"{description}, {versions}, {jax.local_device_count()} devices"):
            raise UserError(
                "the processes differ in their configs, in the versions of imp_jax or JAX, or in how many "
                "devices they have; they should have the same command and environment"
            )


def _require_reachable(coordinator, seconds):
    """Check that `coordinator` is a HOST:PORT that answers within `seconds`; 0 does not connect."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}; it should be HOST:PORT, such as node1:12345")
    end = time.monotonic() + seconds
    while seconds:
        try:
            return socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"process 0 does not answer at {coordinator}: {error}; {_FLAGS_HINT}"
                ) from error
            time.sleep(0.2)
    return None


def is_primary() -> bool:
    """Return whether this is the process that prints and writes files; True if there is only one."""
    return jax.process_index() == 0


def global_max(value: int) -> int:
    """Return the largest value of all processes. Collective."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def all_processes_equal(value: str) -> bool:
    """Return whether all processes have the same value. Collective."""
    number = zlib.crc32(value.encode()) >> 1  # fits into an int32
    highest, lowest = global_max(number), -global_max(-number)  # both calls are made on every process
    return highest == lowest


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Raise a UserError of one process in all of them, at the end of the context. Collective.

    Raises:
      RemoteUserError: another process failed; if this one did too, one with a lower index.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        sentence = str(error).encode() if error else b""
        padded = sentence[:_MAX_MESSAGE_BYTES].ljust(_MAX_MESSAGE_BYTES, b"\0")
        sentences = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
        said = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in sentences]
        failed = [process for process, sentence in enumerate(said) if sentence]
        if failed and failed[0] != jax.process_index():
            raise RemoteUserError(f"process {failed[0]}: {said[failed[0]]}")
    if error:
        raise error
