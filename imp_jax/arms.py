"""Arms: the networks trained on the mask of a round, such as the ticket itself and its control.

A member is one arm of one replicate. The members of a round are the leading axis of all batched trees, ordered
by arm. The starting weights and the mask of an arm are functions of imp's ticket and mask. To add an arm,
`register` one.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, PyTree

from imp_jax import masking
from imp_jax.errors import UserError
from imp_jax.masking import Mask
from imp_jax.training import Variables

FIRST_USER_NUMBER = 100  # smaller numbers are reserved for this package
_RNG_STREAMS = {
    "init": 0,
    "reinit": 1,
    "data": 2,
    "score": 3,
    "arm": 4,
    "rngs": 5,
}  # part of every key: never change them


class ArmInputs(NamedTuple):
    """Arguments of an arm's functions, for one replicate (without a member axis)."""

    ticket: Variables  # imp's starting variables of the round, not yet masked
    mask: Mask  # imp's mask of the round
    key: Key[Array, ""]  # of this arm, replicate and round
    initialize: Callable[[str], Variables]  # random initialisation of a named stream, the same in every round


def _imp_mask(inputs: ArmInputs) -> Mask:
    return inputs.mask


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training on a round's mask.

    Attributes:
      number: folded into the arm's random keys, so it never changes; from 100 on for arms of users.
      weights: returns the starting variables, a tree like `ArmInputs.ticket`; they are masked afterwards.
      mask: returns the mask, a tree like `ArmInputs.mask`.
      rewinds: whether, with `rewind_step=k`, the arm is reset at step k of the training as imp is. An arm that
        starts from a random initialisation is not.
    """

    number: int
    weights: Callable[[ArmInputs], Variables]
    mask: Callable[[ArmInputs], Mask] = _imp_mask
    rewinds: bool = True


ARMS: dict[str, Arm] = {
    # the ticket itself, whose mask all arms are given
    "imp": Arm(0, lambda inputs: inputs.ticket),
    # the control: another random initialisation, the same in all rounds (ours)
    "reinit": Arm(1, lambda inputs: inputs.initialize("reinit"), rewinds=False),
    # the ticket with other data order and augmentation, in the rounds of `instability.rounds` (section 2.1)
    "twin": Arm(2, lambda inputs: inputs.ticket),
}


def register(name: str, arm: Arm) -> None:
    """Make `config.arms = ("imp", name)` train `arm` in every round.

    Raises:
      UserError: not an `Arm`; a number below 100, or one of another arm; a name of this package.
    """
    if not isinstance(arm, Arm):
        raise UserError(f"the arm {name!r} is a {type(arm).__name__}; it should be an imp_jax.arms.Arm")
    if name in ARMS and ARMS[name].number < FIRST_USER_NUMBER:
        raise UserError(f"the arm {name!r} is one of imp_jax; it should have another name")
    if not name.isidentifier():
        raise UserError(f"the arm {name!r} should have a name of letters, digits and underscores")
    if type(arm.number) is not int or arm.number < FIRST_USER_NUMBER:
        raise UserError(
            f"the arm {name!r} has the number {arm.number}; it should be an integer from {FIRST_USER_NUMBER} on"
        )
    taken = {registered.number: known for known, registered in ARMS.items() if known != name}
    if arm.number in taken:
        raise UserError(
            f"the arm {name!r} has the number {arm.number}, which is that of {taken[arm.number]!r}; it should "
            f"have one of its own"
        )
    ARMS[name] = arm


class Member(NamedTuple):
    arm: str
    replicate: int


def members_of_rows(rows: Iterable[dict[str, Any]], number: int) -> tuple[Member, ...]:
    """Return the members that completed round `number`, from rows of results.csv."""
    return tuple(Member(row["arm"], row["replicate"]) for row in rows if row["round"] == number)


def members_for_next_round(members: Sequence[Member], arms: Sequence[str]) -> tuple[Member, ...]:
    """Return the members that also train in the next round.

    These are the members of `arms` whose replicate still has an imp, because all arms use its mask.
    """
    return tuple(m for m in members if m.arm in arms and Member("imp", m.replicate) in members)


def add_scheduled_members(
    members: Sequence[Member], rounds_by_arm: dict[str, frozenset[int]], number: int
) -> tuple[Member, ...]:
    """Append the members of arms that train in some rounds only, such as `twin`, one for each imp."""
    scheduled = (arm for arm, rounds in rounds_by_arm.items() if number in rounds)
    return (*members, *(Member(arm, m.replicate) for arm in scheduled for m in members if m.arm == "imp"))


def take_members(tree: PyTree[Array], members: Sequence[Member], wanted: Sequence[Member]) -> PyTree[Array]:
    """Take the leaves of the members `wanted` from a tree of all `members`."""
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
      path: returns the name of a stream and the numbers of a member.
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
    """Return the number that stands for a stream in keys; for a user's stream, a checksum of its name."""
    return _RNG_STREAMS.get(stream, zlib.crc32(stream.encode()))


def start_arm(
    arm: Arm,
    tickets: Variables,
    masks: Mask,
    keys: Key[Array, " replicates"],
    init_keys: Key[Array, " replicates"],
    init: Callable[[Key[Array, ""]], Variables],
) -> tuple[Variables, Mask]:
    """Compute the starting weights and masks of an arm; all trees have a leading axis of replicates.

    Args:
      keys: of this arm and round, for `ArmInputs.key`.
      init_keys: of the replicates, for `ArmInputs.initialize`.
      init: initialises the model from a key.

    Raises:
      ValueError: the arm returns a tree whose structure or shapes differ from those of the ticket or the mask.
    """

    def start(ticket, mask, key, init_key):
        def initialize(stream):
            return init(jax.random.fold_in(init_key, stream_number(stream)))

        inputs = ArmInputs(ticket, mask, key, initialize)
        weights, arm_mask = arm.weights(inputs), arm.mask(inputs)
        masking.require_same_shapes(ticket, weights)
        masking.require_same_shapes(mask, arm_mask)
        return weights, jax.tree.map(lambda leaf: leaf.astype(bool), arm_mask)

    return jax.vmap(start)(tickets, masks, keys, init_keys)


def where_members(
    chosen: Bool[Array, " members"], on_true: PyTree[Array], on_false: PyTree[Array]
) -> PyTree[Array]:
    """Take the leaves of `on_true` for the chosen members and those of `on_false` for the others."""
    return jax.tree.map(
        lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), on_true, on_false
    )
