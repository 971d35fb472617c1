"""Devices: the mesh of a training, and the placement of arrays on it.

The mesh has two axes. Members are sharded along "member" and never communicate. The batch of a member is
sharded along "data": the devices of this axis average gradients and normalisation statistics in every step.
Networks, masks and earlier optima are sharded along "member" and replicated along "data".
"""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from imp_jax.errors import UserError, one_line

MEMBER, DATA = "member", "data"


def available_cores() -> int:
    """Return the number of CPU cores that this process may use, such as those that Slurm gives to a task."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_one_device_per_cpu_core() -> None:
    """Expose each CPU core as a JAX device, so that members run in parallel.

    Call it before the first JAX computation. On two cores, LeNet then trains in 0.8 of the time. A number of
    devices set by the user takes precedence. If several processes train together, each remains one device.
    """
    is_set_by_user = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not is_set_by_user and jax.config.jax_num_cpu_devices < 0 and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has already been used, as in a notebook
            jax.config.update("jax_num_cpu_devices", available_cores())


def require_usable() -> None:
    """Check that JAX has a device and computes in single precision.

    Raises:
      UserError: the platform that JAX_PLATFORMS names is not available; or JAX_ENABLE_X64 is set.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX does not know the platform at all
        cause = one_line(error)
        if platforms := jax.config.jax_platforms:
            cause = f"JAX_PLATFORMS is {platforms!r}, which cannot be used on this machine"
            cause += "; it should be cpu, or unset"
        raise UserError(f"JAX has no device: {cause}") from error
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 is set; training is in single precision, so it should be unset")


def make_mesh(
    members: int,
    batch_size: int,
    *,
    member: int = -1,
    data: int = 1,
    accumulate_steps: int = 1,
    norm_parts: int = 1,
) -> Mesh | None:
    """Make the mesh of a run that begins with `members` members; return None if it uses one device only.

    −1 means as many devices as possible: for `member`, as many as shorten the training; then for `data`, as
    many of the remaining ones as divide the batch evenly. If the members do not divide evenly over the devices,
    as with twins or after one has diverged, the remaining slots compute copies whose results are dropped.

    Raises:
      UserError: the mesh needs more devices than there are; a process would have no device in the mesh, or
        parts of several of its rows; or the batch cannot be divided. The message lists sizes that fit.
    """
    available, processes, local = jax.device_count(), jax.process_count(), jax.local_device_count()
    parts = accumulate_steps

    def fits(data):
        in_rows = local % data == 0 or data % local == 0 or processes == 1
        return in_rows and batch_size % (data * parts) == 0 and (norm_parts % data == 0 or norm_parts == 1)

    divisors = (n for n in range(1, available + 1) if available % n == 0)
    sizes = ", ".join(f"{available // n} × {n}" for n in divisors if fits(n))
    if max(member, 1) * max(data, 1) > available:
        raise UserError(
            f"mesh.member × mesh.data is {member} × {data}, and there {'are' if available > 1 else 'is'} "
            f"{available} device{'s' * (available > 1)}; it should be at most that, such as {sizes}"
        )
    if member == -1:
        max_member = available // max(data, 1)
        # the fewest devices that are as fast as all; with several processes, all devices must take part
        member = max_member if processes > 1 and data != -1 else -(-members // -(-members // max_member))
    if data == -1:
        data = max(filter(fits, range(1, available // member + 1)), default=1)
    if batch_size % (share := data * parts):
        near = max(batch_size // share, 1) * share
        raise UserError(
            f"batch_size is {batch_size}; with mesh.data {data} and accumulate_steps {parts} it should "
            f"be a multiple of {share}, such as {near} or {near + share}"
        )
    if norm_parts > 1 and norm_parts % data:
        raise UserError(
            f"model.norm_parts is {norm_parts} and mesh.data {data}; the former should be a multiple "
            f"of the latter, or 1"
        )
    if processes > 1 and (member * data != available or not fits(data)):
        raise UserError(
            f"mesh.member × mesh.data is {member} × {data}; {processes} processes of {local} devices have "
            f"{available}; the mesh should contain all of them, and mesh.data should divide {local} or be a "
            f"multiple of it, such as {sizes}"
        )
    if member * data == 1:
        return None
    # the devices of a process are consecutive: they form whole rows of the mesh, or a part of one
    return Mesh(np.array(jax.devices()[: member * data]).reshape(member, data), (MEMBER, DATA))


def describe_mesh(mesh: Mesh | None, members: int) -> str:
    """Describe the mesh in one line; empty if there is one device."""
    available, processes = jax.device_count(), jax.process_count()
    if available == 1:
        return ""
    member, data = mesh.devices.shape if mesh else (1, 1)
    per_device = -(-members // member)
    text = f"mesh {member} × {data} (member × data) on {member * data} of {available} devices"
    text += f" of {processes} processes" * (processes > 1)
    text += f", {jax.devices()[0].device_kind}; {per_device} member{'s' * (per_device > 1)} per device"
    if empty := per_device * member - members:
        text += f", {empty} empty slot{'s' * (empty > 1)}"
    return text


def shard_members(tree: PyTree[Array], mesh: Mesh | None) -> PyTree[Array]:
    """Shard a tree of all members, equal on every process, along "member"; remaining slots hold copies."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    sharding, member = NamedSharding(mesh, P(MEMBER)), mesh.shape[MEMBER]

    def shard_leaf(leaf):
        members = len(leaf)
        slots = -(-members // member) * member
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(leaf))[np.arange(slots) % members]
            return jax.random.wrap_key_data(_put_sharded(data, sharding), impl=jax.random.key_impl(leaf))
        return _put_sharded(np.asarray(leaf)[np.arange(slots) % members], sharding)

    return jax.tree.map(shard_leaf, tree)


def constrain_members(tree: PyTree[Array], mesh: Mesh | None) -> PyTree[Array]:
    """Constrain a traced tree of all members to the sharding of `shard_members`; no-op without a mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(MEMBER)))


def constrain_whole(tree: PyTree[Array], mesh: Mesh | None) -> PyTree[Array]:
    """Constrain a traced tree to be replicated on every device of the mesh; no-op without a mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Return the sharding of batches [members, images, ...]; None, the default device, without a mesh."""
    return mesh and NamedSharding(mesh, P(MEMBER, DATA))


def count_slots(members: int, mesh: Mesh | None) -> int:
    """Return the number of slots for `members` on a mesh: the next multiple of the size of its member axis."""
    return members if mesh is None else -(-members // mesh.shape[MEMBER]) * mesh.shape[MEMBER]


def gather_members(tree: PyTree[Array], members: int | None, axis: int = 0) -> PyTree[np.ndarray]:
    """Copy a tree to the host of every process: the first `members` entries along `axis` (None: all)."""

    def gather_leaf(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.array(leaf)[(slice(None),) * axis + (slice(members),)]

    return jax.tree.map(gather_leaf, tree)


def replicate(tree: PyTree[Array], mesh: Mesh) -> PyTree[Array]:
    """Replicate a tree, equal on every process, on every device of the mesh."""
    return jax.tree.map(lambda leaf: _put_sharded(np.asarray(leaf), NamedSharding(mesh, P())), tree)


def unreplicate(tree: PyTree[Array]) -> PyTree[Array]:
    """Return the first local copy of a replicated tree."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def shard_over_processes(tree: PyTree[np.ndarray]) -> PyTree[Array]:
    """Shard each leaf of a tree, equal on every process, over the processes if one of its axes can be divided.

    Each process then writes only its part of a checkpoint.
    """
    processes = jax.process_count()
    if processes == 1:
        return tree
    first_devices = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first_devices[process] for process in range(processes)]), ("process",))

    def shard_leaf(leaf):
        leaf = np.asarray(leaf)
        axes = [axis for axis, size in enumerate(leaf.shape) if size % processes == 0 and size]
        if not axes or leaf.dtype.itemsize > 4:  # JAX would convert 64 bits to 32
            return leaf
        return _put_sharded(leaf, NamedSharding(mesh, P(*[None] * axes[0], "process")))

    return jax.tree.map(shard_leaf, tree)


def _put_sharded(leaf, sharding):
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
