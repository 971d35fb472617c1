"""The state at the start and at the end of a round, and how all members start from imp's tickets and masks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from imp_jax import arms, masking, repulsion
from imp_jax.arms import (
    Member,
    add_scheduled_members,
    member_keys,
    replicate_keys,
    start_arm,
    take_members,
)
from imp_jax.errors import UserError
from imp_jax.experiment import Experiment, init_fn
from imp_jax.masking import Mask
from imp_jax.repulsion import Optima
from imp_jax.runtime import devices
from imp_jax.training import Metrics, Variables
from imp_jax.workdir.checkpoints import MidRoundState, RoundNetworks
from imp_jax.workdir.results import Row


class RoundState(NamedTuple):
    """The state at the start of a round.

    Trees have a leading axis of `members`. `tickets` and `masks` are on the mesh, where the axis is padded to a
    multiple of its member axis.
    """

    members: tuple[Member, ...]
    tickets: Variables  # starting weights, not yet masked
    masks: Mask
    optima: Optima | None = None  # earlier optima for J_r, on the host; None without repulsion and in round 0


class EpochEnd(NamedTuple):
    """The argument of `on_epoch`: after every epoch, and wherever training pauses to save, rewind or check."""

    round: int
    members: tuple[Member, ...]
    progress: MidRoundState  # on the mesh; the next step donates its `states`, so copy what you keep
    metrics: Metrics  # of the steps since the last call, as NumPy arrays [steps, members]
    seconds: float  # of training since the last call, without compilation
    compile_seconds: float  # since the last call
    diverged: dict[Member, tuple[int, str]]  # members with a non-finite loss: step and description


class RoundEnd(NamedTuple):
    """The argument of `on_round` after every round, and what `rounds` yields."""

    round: int
    members: tuple[Member, ...]  # without those that diverged
    networks: RoundNetworks  # of these members, on the host
    rows: list[Row]  # of results.csv
    next_masks: Mask  # of the imps among `next_members`, in their order; on the host
    next_members: tuple[Member, ...]  # that train in the next round, without those of single rounds
    next_optima: Optima | None  # of `next_members`; None without repulsion
    diverged: dict[Member, tuple[int, str]]  # members that were dropped: step and description


Callbacks = Sequence[Callable[[Any], None]]


@functools.partial(jax.jit, static_argnames=("model", "image_shape"))
def init_variables(
    keys: Key[Array, " members"], *, model: nn.Module, image_shape: tuple[int, int, int]
) -> Variables:
    """Initialise the variables of one network for each key."""
    return jax.vmap(init_fn(model, image_shape))(keys)


def start_round(
    experiment: Experiment,
    number: int,
    members: Sequence[Member],
    tickets: Variables,
    masks: Mask,
    ticket_of: Sequence[int] | None = None,
    mask_of: Sequence[int] | None = None,
) -> RoundState:
    """Compute the state at the start of round `number` from imp's tickets and masks, without earlier optima.

    Args:
      members: the members that train in every round; those of single rounds, such as twins, are added.
      tickets, masks: of the imps of `members`, in their order; or of any networks, if `ticket_of` and `mask_of`
        give the index of each imp.
    """
    imps = [member for member in members if member.arm == "imp"]
    members = add_scheduled_members(members, experiment.scheduled_arms, number)
    names = tuple(dict.fromkeys(member.arm for member in members))
    start_of_member = [
        names.index(arm) * len(imps) + imps.index(Member("imp", replicate)) for arm, replicate in members
    ]
    slots = devices.count_slots(len(members), experiment.spec.mesh)

    def arm_keys(arm):
        return member_keys(imps, experiment.seed, lambda member: ["arm", arms.ARMS[arm].number, number])

    in_order = np.arange(len(imps))
    mesh = experiment.spec.mesh
    tickets, masks = _start_members(
        _take_imps(tickets, in_order if ticket_of is None else np.array(ticket_of), mesh=mesh),
        _take_imps(masks, in_order if mask_of is None else np.array(mask_of), mesh=mesh),
        replicate_keys(imps, experiment.seed),
        [arm_keys(name) for name in names],
        np.resize(start_of_member, slots),
        arms=tuple(arms.ARMS[name] for name in names),
        image_shape=experiment.dataset.train.image_shape,
        spec=experiment.spec,
    )
    return RoundState(members, tickets, masks)


@functools.partial(jax.jit, static_argnames="mesh")
def _take_imps(tree, imps, *, mesh):
    """Take the imps of a tree; always in one layout, so that `_start_members` is compiled once."""
    return devices.constrain_whole(jax.tree.map(lambda leaf: leaf[imps], tree), mesh)


@functools.partial(jax.jit, static_argnames=("arms", "image_shape", "spec"))
def _start_members(tickets, masks, replicate_keys, keys, start_of_place, *, arms, image_shape, spec):
    """Start all arms from imp's tickets and masks of all replicates; then take the one of each place."""
    init = init_fn(spec.model, image_shape)
    starts = [
        start_arm(arm, tickets, masks, arm_keys, replicate_keys, init)
        for arm, arm_keys in zip(arms, keys, strict=True)
    ]
    starts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[start_of_place], *starts)
    return devices.constrain_members(starts, spec.mesh)


def copy_networks(state: RoundState, progress: MidRoundState) -> RoundNetworks:
    """Copy the initial and trained networks of a round to the host, for its checkpoint; done once per round."""
    params = _apply_masks(progress.tickets["params"], state.masks)
    initial = {**progress.tickets, "params": params}
    networks = (initial, progress.states.variables, state.masks)
    return RoundNetworks(*devices.gather_members(networks, len(state.members)))


_apply_masks = jax.jit(masking.apply)


def repeat_optima(optima, members, next_members):
    """Return the optima of `next_members`: those of single rounds take the optima of their imp."""
    source = [m if m in members else Member("imp", m.replicate) for m in next_members]
    return take_members(optima, members, source)


def add_optimum(
    experiment: Experiment, optima: Optima | None, networks: RoundNetworks, masks: Mask
) -> Optima | None:
    """Add the networks of a finished round to the earlier optima, for the next round under `masks`.

    All trees have a leading axis of the members that train in every round. Each arm has its own optima (ours
    for the control). Returns None without repulsion.

    Raises:
      UserError: the mask of an arm keeps a weight that the arm's mask of the finished round pruned.
    """
    if not experiment.spec.repulsion_strength:
        return None
    known = 0 if optima is None else int(np.max(optima.count))
    last_only = experiment.optima_store.memory == "last"
    # after the last round there is one more, for a run whose number of rounds grows
    max_optima = 1 if last_only else max(experiment.rounds - 1, known + 1)
    options = {"dtype": experiment.optima_store.dtype, "exclude": experiment.pruning.exclude}
    try:
        return repulsion.add_optimum(
            optima, networks.trained["params"], masks, max_optima=max_optima, **options
        )
    except repulsion.GrownMaskError as error:
        raise UserError(
            f"{error}; repulsion needs arms whose masks only shrink, so repulsion.strength should be 0"
        ) from error
