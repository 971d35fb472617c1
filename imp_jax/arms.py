"""Members: the (arm, replicate) pairs that a round trains side by side, and their random keys.

Members lead every batched tree, arm by arm, the twins of a round last: they share imp's ticket and mask (and
its earlier optima), and no later round knows of them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, PyTree
from ml_collections import ConfigDict

# What an arm's keys fold in; the numbers are part of a run's randomness, so they never change.
ARMS = {"imp": 0, "reinit": 1, "twin": 2}
_RNG_STREAMS = {"init": 0, "reinit": 1, "data": 2, "score": 3}


class Member(NamedTuple):
    arm: str
    replicate: int


def members_of(config: ConfigDict) -> tuple[Member, ...]:
    """The members that a run starts with; twins are of single rounds."""
    return tuple(Member(arm, replicate) for arm in config.arms for replicate in range(config.replicates))


def with_twins(members: Sequence[Member], config: ConfigDict, number: int) -> tuple[Member, ...]:
    """`members` in round `number`: last among them, where the config asks, a twin of each imp."""
    asked = number in config.instability.rounds
    return (*members, *(Member("twin", m.replicate) for m in members if asked and m.arm == "imp"))


def members_of_rows(rows: Iterable[dict[str, Any]], number: int) -> tuple[Member, ...]:
    """The members whose networks round `number` left, of rows of results.csv."""
    return tuple(Member(row["arm"], row["replicate"]) for row in rows if row["round"] == number)


def members_for_next_round(members: Sequence[Member]) -> tuple[Member, ...]:
    """Those of a round's members that the next one trains: with an imp, whose mask they use, and no twins."""
    return tuple(m for m in members if m.arm != "twin" and Member("imp", m.replicate) in members)


def take_members(tree: PyTree[Array], members: Sequence[Member], wanted: Sequence[Member]) -> PyTree[Array]:
    """`tree`, whose leaves lead with `members`, with the leaves of those `wanted` only."""
    if tuple(members) == tuple(wanted):
        return tree
    source = np.array([members.index(member) for member in wanted])
    return jax.tree.map(lambda leaf: leaf[source], tree)


def member_keys(
    members: Sequence[Member], seed: int, path: Callable[[Member], list[Any]]
) -> Key[Array, " members"]:
    """One key a member, folded from seed → replicate → a named draw → numbers, whatever the other members."""

    def key(member):
        draw, *numbers = path(member)
        key = jax.random.key(seed)
        for number in (member.replicate, _RNG_STREAMS[draw], *numbers):
            key = jax.random.fold_in(key, number)
        return key

    return jnp.stack([key(member) for member in members])


@jax.jit
def where_members(chosen: Bool[Array, " members"], one: PyTree[Array], other: PyTree[Array]) -> PyTree[Array]:
    """`one` for the chosen members, `other` for the rest."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), one, other)


def repeat_imp_for_twins(members: Sequence[Member], tree: PyTree[Array]) -> PyTree[Array]:
    """`tree`, of all members or of all but twins, with imp's leaves for the twins."""
    if "twin" not in {member.arm for member in members}:
        return tree
    source = [members.index(m if m.arm != "twin" else Member("imp", m.replicate)) for m in members]
    return jax.tree.map(lambda leaf: leaf[np.array(source)], tree)


def without_twins(members: Sequence[Member], tree: PyTree[Array]) -> PyTree[Array]:
    """`tree`, of all members, without the leaves of the twins."""
    return take_members(tree, members, [member for member in members if member.arm != "twin"])
