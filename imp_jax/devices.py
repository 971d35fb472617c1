"""Devices: the mesh that a training is spread over, and what several processes tell each other.

The mesh has two axes. Members lie beside each other along "member": they never talk. A member's batch is
divided along "data": the devices there agree on gradients, and on normalisation statistics, in every step.
Networks, masks and earlier optima lie with their members and are the same along "data".

Between trainings every process has all networks in its own memory, as NumPy arrays.
"""

import contextlib
import os
import sys
import traceback
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
_LONGEST_SENTENCE = 4000  # bytes of an error that one process tells the others


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
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if not any(value is not None for value in given.values()) and tasks(os.environ) <= 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from us
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=local_gpus(os.environ),
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_WEEK,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes cannot find each other: {in_one_line(error)}; give each "
            f"--coordinator=HOST:PORT of process 0, --processes=NUMBER and --process=0, 1, …"
        ) from error


def leave() -> None:
    """Wait for the processes that still have something to do, and part from them."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Of several processes, only the first one's stdout is seen."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


@contextlib.contextmanager
def fails_alone() -> Iterator[None]:
    """Of several processes one that fails ends at once, and does not wait for those that wait for it."""
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        process, processes = jax.process_index(), jax.process_count()
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(
                f"error: process {process} of {processes} cannot go on, as when another has died: "
                f"{in_one_line(error)}; the same command goes on after what is on disk",
                file=sys.stderr,
            )
        elif not isinstance(error, UserError):
            traceback.print_exc()
        elif not isinstance(error, SaidElsewhereError):
            print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def tasks(environment: Mapping[str, str]) -> int:
    """How many processes srun or mpirun has started as one program; 1 if neither has."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(environment.get(name, 1)) for name in names)


def local_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Those of the visible GPUs that are this process's, where JAX would take one of them and should take all.

    JAX expects a process a GPU under srun. A task that is alone on its node, or was given GPUs of its own by
    --gpus-per-task, has all that it sees.
    """
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    nodes, alone = environment.get("SLURM_STEP_NUM_NODES"), environment.get("SLURM_STEP_NUM_TASKS")
    if visible and nodes and (nodes == alone or "SLURM_GPUS_PER_TASK" in environment):
        return list(range(len(visible)))
    return None


def is_first() -> bool:
    """Whether this is the process that writes and speaks; it is where there is only one."""
    return jax.process_index() == 0


def most(value: int) -> int:
    """The largest of the processes' values. All have to ask, in the same order."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.process_allgather(np.int32(value)).max())


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
