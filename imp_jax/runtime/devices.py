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
    """Return how many CPU cores this process may use, such as those that Slurm gives to a task."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_one_device_per_cpu_core() -> None:
    """Expose each CPU core as a JAX device, so that members run in parallel.

    Call it before the first JAX computation. LeNet trains in 0.8 of the time on two cores. A setting of the
    user takes precedence, and one of several processes remains one device.
    """
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not asked and jax.config.jax_num_cpu_devices < 0 and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has already been used, as in a notebook
            jax.config.update("jax_num_cpu_devices", available_cores())


def require_usable() -> None:
    """Check that JAX has a device and computes in single precision.

    Raises:
      UserError: the platform that JAX_PLATFORMS asks for is not there; JAX_ENABLE_X64 is set.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX knows of no such platform at all
        why = one_line(error)
        if asked := jax.config.jax_platforms:
            why = (
                f"JAX_PLATFORMS is {asked!r}, which cannot be used on this machine; it should be cpu, or unset"
            )
        raise UserError(f"JAX has no device: {why}") from error
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
    """Make the mesh of a run that begins with `members`; None is one device.

    A −1 is filled: `member` first, with as many devices as shorten the training, then `data`, with as many of
    the rest as divide the batch. If the members do not divide evenly over the devices, as with twins or once
    one has diverged, the remaining slots compute copies whose results are dropped.

    Raises:
      UserError: there are fewer devices; or a process would have none of the mesh, or parts of several rows;
        or the batch cannot be divided. The message lists sizes that fit.
    """
    there, processes, local = jax.device_count(), jax.process_count(), jax.local_device_count()
    parts = accumulate_steps

    def fits(data):
        in_rows = local % data == 0 or data % local == 0 or processes == 1
        return in_rows and batch_size % (data * parts) == 0 and (norm_parts % data == 0 or norm_parts == 1)

    sizes = ", ".join(f"{there // n} × {n}" for n in range(1, there + 1) if there % n == 0 and fits(n))
    if max(member, 1) * max(data, 1) > there:
        raise UserError(
            f"mesh.member × mesh.data is {member} × {data}, and there {'are' if there > 1 else 'is'} {there} "
            f"device{'s' * (there > 1)}; it should be at most that, such as {sizes}"
        )
    if member == -1:
        places = there // max(data, 1)
        # the fewest devices that are as fast; with several processes all take part
        member = places if processes > 1 and data != -1 else -(-members // -(-members // places))
    if data == -1:
        data = max(filter(fits, range(1, there // member + 1)), default=1)
    if batch_size % (share := data * parts):
        near = max(batch_size // share, 1) * share
        raise UserError(
            f"batch_size is {batch_size}; with mesh.data {data} and accumulate_steps {parts} it should "
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
    # the devices of a process are consecutive: they form whole rows of the mesh, or a part of one
    return Mesh(np.array(jax.devices()[: member * data]).reshape(member, data), (MEMBER, DATA))


def describe_mesh(mesh: Mesh | None, members: int) -> str:
    """Describe the mesh in one line; empty if there is one device."""
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


def shard_members(tree: PyTree[Array], mesh: Mesh | None) -> PyTree[Array]:
    """Put a tree of all members, equal on every process, on the mesh; remaining slots hold copies."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    sharding, member = NamedSharding(mesh, P(MEMBER)), mesh.shape[MEMBER]

    def of_leaf(leaf):
        members = len(leaf)
        places = -(-members // member) * member
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(leaf))[np.arange(places) % members]
            return jax.random.wrap_key_data(_put_sharded(data, sharding), impl=jax.random.key_impl(leaf))
        return _put_sharded(np.asarray(leaf)[np.arange(places) % members], sharding)

    return jax.tree.map(of_leaf, tree)


def constrain_members(tree: PyTree[Array], mesh: Mesh | None) -> PyTree[Array]:
    """Lay out a traced tree of all members as `shard_members` does; `mesh` None changes nothing."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(MEMBER)))


def constrain_whole(tree: PyTree[Array], mesh: Mesh | None) -> PyTree[Array]:
    """Lay out a traced tree whole on every device of the mesh; `mesh` None changes nothing."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Return the layout of batches with axes of members and of images; None is the default device."""
    return mesh and NamedSharding(mesh, P(MEMBER, DATA))


def count_places(members: int, mesh: Mesh | None) -> int:
    """Return the number of slots for so many members on a mesh: the next multiple of its member axis."""
    return members if mesh is None else -(-members // mesh.shape[MEMBER]) * mesh.shape[MEMBER]


def gather_members(tree: PyTree[Array], members: int | None, axis: int = 0) -> PyTree[np.ndarray]:
    """Copy the first `members` (None: all) along `axis` of a tree to the host, on every process."""

    def of_leaf(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.array(leaf)[(slice(None),) * axis + (slice(members),)]

    return jax.tree.map(of_leaf, tree)


def replicate(tree: PyTree[Array], mesh: Mesh) -> PyTree[Array]:
    """Put a whole tree, equal on every process, on every device of the mesh."""
    return jax.tree.map(lambda leaf: _put_sharded(np.asarray(leaf), NamedSharding(mesh, P())), tree)


def unreplicate(tree: PyTree[Array]) -> PyTree[Array]:
    """Return the first local copy of a replicated tree."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def shard_over_processes(tree: PyTree[np.ndarray]) -> PyTree[Array]:
    """Shard a tree, equal on every process, over the processes where an axis allows it.

    Each process then writes its part of a checkpoint.
    """
    processes = jax.process_count()
    if processes == 1:
        return tree
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[process] for process in range(processes)]), ("process",))

    def of_leaf(leaf):
        leaf = np.asarray(leaf)
        axes = [axis for axis, size in enumerate(leaf.shape) if size % processes == 0 and size]
        if not axes or leaf.dtype.itemsize > 4:  # JAX would convert 64 bits to 32
            return leaf
        return _put_sharded(leaf, NamedSharding(mesh, P(*[None] * axes[0], "process")))

    return jax.tree.map(of_leaf, tree)


def _put_sharded(leaf, sharding):
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
