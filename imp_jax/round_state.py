"""The state at the start of a round and at its end, and how imp's tickets and masks start all members."""

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
    """The state at the start of a round. Trees have a leading member axis; all but `optima` are on the mesh."""

    members: tuple[Member, ...]
    tickets: Variables  # starting weights, not yet masked
    masks: Mask
    optima: Optima | None = None  # earlier optima for J_r, on the host; None without repulsion and in round 0


class EpochEnd(NamedTuple):
    """The argument of `on_epoch`, which is called after every epoch and at every pause within an epoch."""

    round: int
    members: tuple[Member, ...]
    progress: MidRoundState  # on the mesh; the next step donates its `states`, so copy what you keep
    metrics: Metrics  # of the steps since the last call, as NumPy arrays [steps, members]
    seconds: float  # of training since the last call
    compile_seconds: float
    diverged: dict[Member, tuple[int, str]]  # members with a non-finite loss: step and description


class RoundEnd(NamedTuple):
    """The results of a round: the argument of `on_round`, which `rounds` also yields."""

    round: int
    members: tuple[Member, ...]  # without those that diverged
    networks: RoundNetworks  # of these members, on the host
    rows: list[Row]  # of results.csv
    next_masks: Mask  # imp's in the next round, one per replicate that continues; on the host
    next_members: tuple[Member, ...]  # without those of `scheduled_arms`
    next_optima: Optima | None  # of `next_members`
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
    ticket_indices: Sequence[int] | None = None,
    mask_indices: Sequence[int] | None = None,
) -> RoundState:
    """Compute the state at the start of round `number` from imp's tickets and masks.

    Args:
      members: those that train in every round; the members of `scheduled_arms`, such as twins, are added.
      tickets, masks: of the imps of `members`, in this order, or of more networks.
      ticket_indices, mask_indices: for each imp, its index in `tickets` and in `masks`, if these have more
        networks.
    """
    imps = [member for member in members if member.arm == "imp"]
    members = add_scheduled_members(members, experiment.scheduled_arms, number)
    names = tuple(dict.fromkeys(member.arm for member in members))
    start_of_member = [
        names.index(arm) * len(imps) + imps.index(Member("imp", replicate)) for arm, replicate in members
    ]
    places = devices.count_places(len(members), experiment.spec.mesh)

    def arm_keys(arm):
        return member_keys(imps, experiment.seed, lambda member: ["arm", arms.ARMS[arm].number, number])

    all_imps = np.arange(len(imps))
    mesh = experiment.spec.mesh
    tickets, masks = _start_members(
        _take_networks(tickets, all_imps if ticket_indices is None else np.array(ticket_indices), mesh=mesh),
        _take_networks(masks, all_imps if mask_indices is None else np.array(mask_indices), mesh=mesh),
        replicate_keys(imps, experiment.seed),
        [arm_keys(name) for name in names],
        np.resize(start_of_member, places),
        arms=tuple(arms.ARMS[name] for name in names),
        image_shape=experiment.dataset.train.image_shape,
        spec=experiment.spec,
    )
    return RoundState(members, tickets, masks)


@functools.partial(jax.jit, static_argnames="mesh")
def _take_networks(tree, indices, *, mesh):
    """Take networks of a tree, always in the same layout, so that `_start_members` is compiled once."""
    return devices.constrain_whole(jax.tree.map(lambda leaf: leaf[indices], tree), mesh)


@functools.partial(jax.jit, static_argnames=("arms", "image_shape", "spec"))
def _start_members(tickets, masks, init_keys, keys, start_of_place, *, arms, image_shape, spec):
    """Start all arms from imp's tickets and masks, then take the start of each place on the mesh."""
    init = init_fn(spec.model, image_shape)
    starts = [
        start_arm(arm, tickets, masks, arm_keys, init_keys, init)
        for arm, arm_keys in zip(arms, keys, strict=True)
    ]
    starts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[start_of_place], *starts)
    return devices.constrain_members(starts, spec.mesh)


def copy_networks(state: RoundState, progress: MidRoundState) -> RoundNetworks:
    """Copy the networks of a trained round to the host, for its checkpoint; a round does this only once."""
    params = _apply_masks(progress.tickets["params"], state.masks)
    initial = {**progress.tickets, "params": params}
    networks = (initial, progress.states.variables, state.masks)
    return RoundNetworks(*devices.gather_members(networks, len(state.members)))


_apply_masks = jax.jit(masking.apply)


def repeat_optima(optima, members, next_members):
    """Return the earlier optima of `next_members`; those of `scheduled_arms` get the optima of their imp."""
    source = [m if m in members else Member("imp", m.replicate) for m in next_members]
    return take_members(optima, members, source)


def add_optimum(
    experiment: Experiment, optima: Optima | None, networks: RoundNetworks, masks: Mask
) -> Optima | None:
    """Add the networks of the last round to the earlier optima, for the round that trains under `masks`.

    All trees have a leading axis of the members that train in every round. Each arm has its own optima (ours
    for the control). Returns None without repulsion.

    Raises:
      UserError: the mask of an arm has a weight that an earlier round pruned.
    """
    if not experiment.spec.repulsion_strength:
        return None
    known = 0 if optima is None else int(np.max(optima.count))
    # `known + 1`: the last round adds an optimum too, in case `rounds` is increased
    last_only = experiment.optima_store.memory == "last"
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
