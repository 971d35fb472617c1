"""Devices: the mesh that a training is spread over, and what several processes tell each other.

The mesh has two axes. Members lie beside each other along "member": they never talk. A member's batch is
divided along "data": the devices there agree on gradients, and on normalisation statistics, in every step.
Networks, masks and earlier optima lie with their members and are the same along "data".

Between trainings every process has all networks in its own memory, as NumPy arrays.
"""

import contextlib
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
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from imp_jax.config import UserError, in_one_line

MEMBER, DATA = "member", "data"

_HEARTBEAT = 30  # seconds without a word, after which a process counts as dead
_WEEK = 7 * 24 * 3600  # seconds that the others wait, at the end, for the one that analyses the run
_PATIENCE = 300  # seconds, for the others to begin
PARTING = 10  # seconds, for the others to end too: if process 0 is gone they would die of that
_LONGEST_SENTENCE = 4000  # bytes of an error that one process tells the others
_GIVE = "give each --coordinator=HOST:PORT of process 0, --processes=NUMBER and --process=0, 1, …"


class SaidElsewhereError(UserError):
    """What another process cannot do; it says so itself."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Make this process one of several that train together, if it was started as one; before JAX computes.

    With srun and mpirun JAX finds the others by itself: what is given comes before what it finds.

    Args:
      coordinator: host:port of process 0, that all others reach.
      processes: their number.
      process: which of them this is, from 0.

    Raises:
      UserError: the processes cannot find each other.
    """
    if processes == 1 or ((coordinator, processes, process) == (None, None, None) and tasks(os.environ) <= 1):
        return
    if coordinator:
        _require_reachable(coordinator, seconds=_PATIENCE if process else 0)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from us
    waiting = "waiting for the other processes, to begin with all of them"
    told = threading.Timer(10, print, [waiting], {"file": sys.stderr, "flush": True})
    told.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=local_gpus(os.environ),
            initialization_timeout=_PATIENCE,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_WEEK,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot find each other: {in_one_line(error)}; {_GIVE}") from error
    finally:
        told.cancel()


def leave(seconds: float = _WEEK) -> None:
    """Part from the other processes, once all of them leave or so much time has gone by."""
    if jax.distributed.is_initialized():
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(seconds)


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Of several processes, only the first one's stdout is seen."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


@contextlib.contextmanager
def ends_alone() -> Iterator[None]:
    """Of several processes one that fails ends, and does not wait for those that wait for it."""
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        process, processes = jax.process_index(), jax.process_count()
        if isinstance(error, SaidElsewhereError):
            pass
        elif isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, OSError):
            print(f"error: cannot go on: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            print(
                f"error: process {process} of {processes} cannot go on, as when another has died: "
                f"{in_one_line(error)}; the same command goes on after what is on disk",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        else:
            traceback.print_exc()
            sys.stderr.flush()
        leave(PARTING)
        os._exit(1)


def tasks(environment: Mapping[str, str]) -> int:
    """How many processes srun or mpirun has started as one program; 1 if neither has."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(environment.get(name, 1)) for name in names)


def gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs of this machine that JAX may use, without waking them."""
    if not {"cuda", "gpu"} & set(environment.get("JAX_PLATFORMS", "cuda").split(",")):
        return []
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def local_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Those of the visible GPUs that are this process's, where JAX would take one of them and should take all.

    JAX expects a process a GPU under srun and mpirun. A task that is alone on its node, or was given GPUs of
    its own by --gpus-per-task, has all that it sees.
    """
    of_slurm = [environment.get(f"SLURM_STEP_NUM_{name}") for name in ("NODES", "TASKS")]
    alone = None not in of_slurm and of_slurm[0] == of_slurm[1]
    alone |= environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or "SLURM_GPUS_PER_TASK" in environment
    return list(range(len(gpus(environment)))) or None if alone else None


def _require_reachable(coordinator, seconds):
    """Refuse what is no HOST:PORT, or does not answer within so many seconds; 0 does not ask."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}; it should be HOST:PORT, such as node1:12345")
    end = time.monotonic() + seconds
    while seconds:
        try:
            return socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(f"process 0 does not answer at {coordinator}: {error}; {_GIVE}") from error
            time.sleep(0.2)
    return None


def is_first() -> bool:
    """Whether this is the process that writes and speaks; it is where there is only one."""
    return jax.process_index() == 0


def most(value: int) -> int:
    """The largest of the processes' values. All have to ask, in the same order."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def is_same(value: str) -> bool:
    """Whether all processes have the same value. All have to ask, in the same order."""
    number = zlib.crc32(value.encode()) >> 1  # fits into an int32
    highest, lowest = most(number), -most(-number)  # both, whatever the first is
    return highest == lowest


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A step that all processes take or none does: a UserError in one of them ends it in all.

    Raises:
      SaidElsewhereError: another process, of a lower number if this one too, raises what went wrong.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        sentence = str(error).encode() if error else b""
        padded = sentence[:_LONGEST_SENTENCE].ljust(_LONGEST_SENTENCE, b"\0")
        sentences = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
        said = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in sentences]
        failed = [process for process, sentence in enumerate(said) if sentence]
        if failed and failed[0] != jax.process_index():
            raise SaidElsewhereError(f"process {failed[0]}: {said[failed[0]]}")
    if error:
        raise error


def make_mesh(config: ConfigDict, members: int) -> Mesh | None:
    """The mesh of `config.mesh` for a run that begins with `members`; None is one device.

    A −1 is filled: `member` first, with as many devices as shorten the training, then `data`, with as many of
    the rest as divide the batch. Where members do not fill their places, as with twins, or once one has
    diverged, the places left compute in vain.

    Raises:
      UserError: there are fewer devices; or, of several processes, one has none, or parts of many rows; the
        batch cannot be divided. The sentence has the sizes that fit.
    """
    there, processes, local = jax.device_count(), jax.process_count(), jax.local_device_count()
    member, data = config.mesh.member, config.mesh.data
    parts, norm_parts = config.accumulate_steps, config.model.norm_parts

    def fits(data):
        in_rows = local % data == 0 or data % local == 0 or processes == 1
        return (
            in_rows and config.batch_size % (data * parts) == 0 and (norm_parts % data == 0 or norm_parts == 1)
        )

    sizes = ", ".join(f"{there // n} × {n}" for n in range(1, there + 1) if there % n == 0 and fits(n))
    if max(member, 1) * max(data, 1) > there:
        raise UserError(
            f"mesh.member × mesh.data is {member} × {data}, and there {'are' if there > 1 else 'is'} {there} "
            f"device{'s' * (there > 1)}; it should be at most that, such as {sizes}"
        )
    if member == -1:
        places = there // max(data, 1)
        # the fewest devices that are as fast; of several processes none may be left out
        member = places if processes > 1 and data != -1 else -(-members // -(-members // places))
    if data == -1:
        data = max(filter(fits, range(1, there // member + 1)), default=1)
    if config.batch_size % (share := data * parts):
        near = max(config.batch_size // share, 1) * share
        raise UserError(
            f"batch_size is {config.batch_size}; with mesh.data {data} and accumulate_steps {parts} it should "
            f"be a multiple of {share}, such as {near} or {near + share}"
        )
    if norm_parts > 1 and norm_parts % data:
        raise UserError(
            f"model.norm_parts is {norm_parts} and mesh.data {data}; it should be a multiple of that, or 1"
        )
    if processes > 1 and (member * data != there or not fits(data)):
        raise UserError(
            f"mesh.member × mesh.data is {member} × {data}; {processes} processes of {local} devices have "
            f"{there}, all of which have to be in it, and of {local} and mesh.data one should divide the "
            f"other: such as {sizes}"
        )
    if member * data == 1:
        return None
    # a process's devices follow each other: they hold whole rows of the mesh, or a part of one
    return Mesh(np.array(jax.devices()[: member * data]).reshape(member, data), (MEMBER, DATA))


def in_words(mesh: Mesh | None, members: int) -> str:
    """The mesh and who lies on it, for the terminal; empty where there is one device."""
    there, processes = jax.device_count(), jax.process_count()
    if there == 1:
        return ""
    member, data = mesh.devices.shape if mesh else (1, 1)
    each = -(-members // member)
    words = f"mesh {member} × {data} (member × data) on {member * data} of {there} devices"
    words += f" of {processes} processes" * (processes > 1)
    words += f", {jax.devices()[0].device_kind}; {each} member{'s' * (each > 1)} a device"
    if empty := each * member - members:
        words += f", {empty} place{'s' * (empty > 1)} empty"
    return words


def spread(tree: PyTree[Array], mesh: Mesh | None) -> PyTree[Array]:
    """A tree that leads with members, the same in every process, on the mesh; copies fill places left over."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    sharding, member = NamedSharding(mesh, P(MEMBER)), mesh.shape[MEMBER]

    def of_leaf(leaf):
        members = len(leaf)
        places = -(-members // member) * member
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(leaf))[np.arange(places) % members]
            return jax.random.wrap_key_data(_put(data, sharding), impl=jax.random.key_impl(leaf))
        return _put(np.asarray(leaf)[np.arange(places) % members], sharding)

    return jax.tree.map(of_leaf, tree)


def gather(tree: PyTree[Array], members: int, axis: int = 0) -> PyTree[np.ndarray]:
    """The first `members` along `axis` of a tree on a mesh: copies of its own, in every process."""

    def of_leaf(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.array(leaf)[(slice(None),) * axis + (slice(members),)]

    return jax.tree.map(of_leaf, tree)


def replicate(tree: PyTree[Array], mesh: Mesh) -> PyTree[Array]:
    """A tree, the same in every process, whole on every device of the mesh."""
    return jax.tree.map(lambda leaf: _put(np.asarray(leaf), NamedSharding(mesh, P())), tree)


def on_one(tree: PyTree[Array]) -> PyTree[Array]:
    """A tree that is whole on every device, as this process's first one has it."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def over_processes(tree: PyTree[np.ndarray]) -> PyTree[Array]:
    """A tree that every process has, divided among them where an axis can be: for each to write its part."""
    processes = jax.process_count()
    if processes == 1:
        return tree
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[process] for process in range(processes)]), ("process",))

    def of_leaf(leaf):
        leaf = np.asarray(leaf)
        axes = [axis for axis, size in enumerate(leaf.shape) if size % processes == 0 and size]
        if not axes or leaf.dtype.itemsize > 4:  # JAX would make 64 bits 32
            return leaf
        return _put(leaf, NamedSharding(mesh, P(*[None] * axes[0], "process")))

    return jax.tree.map(of_leaf, tree)


def _put(leaf, sharding):
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
