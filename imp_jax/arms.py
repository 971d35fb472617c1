"""Arms: the ways of training on the mask of a round, such as the ticket itself and its control.

A member is one arm of one replicate. In every round the members are the leading axis of all batched trees,
sorted by arm. The starting weights and the mask of an arm are functions of imp's ticket and mask, see
`ArmInputs`. To add an arm, call `register`.
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

FIRST_USER_NUMBER = 100  # lower numbers are reserved for the arms of this package
_RNG_STREAMS = {"init": 0, "reinit": 1, "data": 2, "score": 3, "arm": 4, "rngs": 5}  # must never change


class ArmInputs(NamedTuple):
    """The inputs of an arm's functions, for one replicate; trees have no member axis."""

    ticket: Variables  # imp's starting variables of the round, not yet masked
    mask: Mask  # imp's mask of the round
    key: Key[Array, ""]  # of this arm, replicate and round
    initialize: Callable[[str], Variables]  # from the name of an RNG stream; the same in every round


def _imp_mask(inputs: ArmInputs) -> Mask:
    return inputs.mask


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training on a round's mask.

    Attributes:
      number: folded into the arm's random keys, so it must never change; at least 100 for arms of users.
      weights: returns the starting variables, a tree like `ArmInputs.ticket`; they are masked afterwards.
      mask: returns the mask, a tree like `ArmInputs.mask`.
      rewinds: with `rewind_step=k`, whether step k resets the arm to its starting weights, as it does imp.
        False for an arm that trains from a random initialisation, whose weights are those of step 0.
    """

    number: int
    weights: Callable[[ArmInputs], Variables]
    mask: Callable[[ArmInputs], Mask] = _imp_mask
    rewinds: bool = True


ARMS: dict[str, Arm] = {
    # the ticket itself; all arms derive their masks from its masks
    "imp": Arm(0, lambda inputs: inputs.ticket),
    # the control: another random initialisation, the same in all rounds (ours)
    "reinit": Arm(1, lambda inputs: inputs.initialize("reinit"), rewinds=False),
    # the ticket with other data order and augmentation, in the rounds of `instability.rounds` (section 2.1)
    "twin": Arm(2, lambda inputs: inputs.ticket),
}


def register(name: str, arm: Arm) -> None:
    """Make `config.arms = ("imp", name)` train `arm` in every round.

    Raises:
      UserError: `arm` is not an `Arm`, or its number is below 100 or taken; `name` is not an identifier, or is
        that of an arm of this package.
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
    taken = {other.number: other_name for other_name, other in ARMS.items() if other_name != name}
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


def start_arm(
    arm: Arm,
    tickets: Variables,
    masks: Mask,
    keys: Key[Array, " replicates"],
    replicate_keys: Key[Array, " replicates"],
    init: Callable[[Key[Array, ""]], Variables],
) -> tuple[Variables, Mask]:
    """Compute the starting weights and masks of an arm; all trees have a leading axis of replicates.

    Args:
      tickets, masks: imp's tickets, not yet masked, and imp's masks.
      keys: of this arm and round.
      replicate_keys: the same in all rounds and arms.
      init: returns random variables of the model for a key.

    Raises:
      ValueError: the arm returns a tree whose structure or shapes differ from those of the ticket or mask.
    """

    def start(ticket, mask, key, replicate_key):
        def initialize(stream):
            return init(jax.random.fold_in(replicate_key, stream_number(stream)))

        inputs = ArmInputs(ticket, mask, key, initialize)
        weights, arm_mask = arm.weights(inputs), arm.mask(inputs)
        masking.require_same_shapes(ticket, weights)
        masking.require_same_shapes(mask, arm_mask)
        return weights, jax.tree.map(lambda leaf: leaf.astype(bool), arm_mask)

    return jax.vmap(start)(tickets, masks, keys, replicate_keys)


def where_members(chosen: Bool[Array, " members"], one: PyTree[Array], other: PyTree[Array]) -> PyTree[Array]:
    """Return the entries of `one` for the chosen members and those of `other` for the rest."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), one, other)
