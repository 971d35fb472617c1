"""Members: one arm of one replicate each, trained together as the leading axis of all batched trees."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, PyTree

_RNG_STREAMS = {"init": 0, "reinit": 1, "data": 2, "score": 3, "arm": 4, "rngs": 5}  # must never change


class Member(NamedTuple):
    arm: str
    replicate: int


class BranchMember(NamedTuple):
    """A member of a branch, which trains members of many rounds together."""

    arm: str
    replicate: int
    round: int


def round_of(member: Member | BranchMember, number: int) -> int:
    """Return the round on whose mask a member trains: `number`, unless it is the member of a branch."""
    return getattr(member, "round", number)


def members_of_rows(rows: Iterable[dict[str, Any]], number: int) -> tuple[Member, ...]:
    """Return the members that finished round `number`, from rows of results.csv."""
    return tuple(Member(row["arm"], row["replicate"]) for row in rows if row["round"] == number)


def members_for_next_round(members: Sequence[Member], arms: Sequence[str]) -> tuple[Member, ...]:
    """Return the members that also train in the next round: of `arms`, in replicates whose imp remains."""
    return tuple(m for m in members if m.arm in arms and Member("imp", m.replicate) in members)


def add_scheduled_members(
    members: Sequence[Member], rounds_by_arm: dict[str, frozenset[int]], number: int
) -> tuple[Member, ...]:
    """Append the members of arms that train only in some rounds, such as `twin`: one for each imp."""
    scheduled = (arm for arm, rounds in rounds_by_arm.items() if number in rounds)
    return (*members, *(Member(arm, m.replicate) for arm in scheduled for m in members if m.arm == "imp"))


def take_members(tree: PyTree[Array], members: Sequence[Member], wanted: Sequence[Member]) -> PyTree[Array]:
    """Take the entries of the members `wanted` from a tree whose leading axis is `members`."""
    if tuple(members) == tuple(wanted):
        return tree
    source = np.array([members.index(member) for member in wanted])
    return jax.tree.map(lambda leaf: leaf[source], tree)


def imp_of_each(members: Sequence[Member]) -> np.ndarray:
    """Return, for each member, the index of its replicate's imp."""
    return np.array([members.index(Member("imp", member.replicate)) for member in members])


def member_keys(
    members: Sequence[Member], seed: int, path: Callable[[Member], list[Any]]
) -> Key[Array, " members"]:
    """Make one PRNG key per member: fold_in(seed, replicate, stream, *numbers).

    A key does not depend on which other members exist.

    Args:
      path: returns the name of a member's RNG stream, followed by the numbers to fold in.
    """

    def fold(member):
        stream, *numbers = path(member)
        key = _replicate_key(seed, member.replicate)
        for number in (stream_number(stream), *numbers):
            key = jax.random.fold_in(key, number)
        return key

    return jnp.stack([fold(member) for member in members])


def replicate_keys(members: Sequence[Member], seed: int) -> Key[Array, " members"]:
    """Make the PRNG keys of the members' replicates, fold_in(seed, replicate)."""
    return jnp.stack([_replicate_key(seed, member.replicate) for member in members])


def _replicate_key(seed, replicate):
    return jax.random.fold_in(jax.random.key(seed), replicate)


def stream_number(stream: str) -> int:
    """Return the number that is folded into keys for an RNG stream; for a user's stream, a CRC of its name."""
    return _RNG_STREAMS.get(stream, zlib.crc32(stream.encode()))


def where_members(chosen: Bool[Array, " members"], one: PyTree[Array], other: PyTree[Array]) -> PyTree[Array]:
    """Return the entries of `one` for the chosen members and those of `other` for the rest."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), one, other)
