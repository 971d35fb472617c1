"""The end of a round: dropping diverged members, and the state at the start of the next round."""

import jax
import numpy as np

from imp_jax.experiment import Experiment
from imp_jax.masking import Mask
from imp_jax.members import Member, members_for_next_round, take_members
from imp_jax.round_state import (
    EarlierNetworks,
    RoundEnd,
    RoundPlan,
    RoundState,
    add_optimum,
    align_networks,
    repeat_optima,
    start_round,
)
from imp_jax.runtime import devices
from imp_jax.training import Variables
from imp_jax.workdir.checkpoints import MidRoundState, RoundNetworks
from imp_jax.workdir.results import Row


def reset(state: RoundState, progress: MidRoundState, plan: RoundPlan) -> Variables:
    """Return the weights, not yet masked, from which the round with this `plan` takes imp's tickets.

    They are the tickets of this round; or the trained weights, if the next round continues from them.
    """
    if plan.continues:
        return progress.states.variables
    if state.plan.continues:  # the tickets of this round are trained weights
        imps = [Member("imp", member.replicate) for member in state.members]
        return take_members(state.earlier.tickets, [m for m in state.members if m.arm == "imp"], imps)
    return progress.tickets


def end_round(
    experiment: Experiment,
    number: int,
    state: RoundState,
    progress: MidRoundState,
    diverged: dict[Member, tuple[int, str]],
    networks: RoundNetworks,
    rows: list[Row],
    masks: Mask,
    plan: RoundPlan,
) -> tuple[RoundEnd, RoundState]:
    """Drop the members that diverged; return the `RoundEnd` of the round and the state of the next one.

    Args:
      progress: at the end of the training.
      networks, rows: of all members of the round.
      masks: for the next round, of all imps of this one.
      plan: of the next round.
    """
    kept = tuple(member for member in state.members if member not in diverged)
    members = members_for_next_round(kept, experiment.arms)
    imps = [member for member in members if member.arm == "imp"]
    all_imps = [member for member in state.members if member.arm == "imp"]
    mask_indices = [all_imps.index(imp) for imp in imps]
    ticket_indices = [state.members.index(imp) for imp in imps]
    earlier = _keep_networks(experiment, number, state, networks)
    if number == 0:
        permutations = align_networks(experiment, imps, (kept, take_members(networks, state.members, kept)))
    else:
        permutations = take_members(state.permutations, all_imps, imps)
    next_state = start_round(
        experiment,
        number + 1,
        members,
        reset(state, progress, plan),
        masks,
        ticket_indices,
        mask_indices,
        trained=progress.states.variables,
        permutations=permutations,
        plan=plan,
    )._replace(earlier=take_members(earlier, all_imps, imps))
    optima = None
    if experiment.spec.repulsion_strength:
        earlier = state.optima and take_members(state.optima, state.members, members)
        next_masks = take_members(
            devices.gather_members(next_state.masks, len(next_state.members)), next_state.members, members
        )
        # after the last round too, because a resumed run may have more rounds
        optima = add_optimum(experiment, earlier, take_members(networks, state.members, members), next_masks)
        next_state = next_state._replace(optima=repeat_optima(optima, members, next_state.members))
    imp_masks = jax.tree.map(lambda leaf: leaf[np.array(mask_indices)], devices.gather_members(masks, None))
    end = RoundEnd(
        number,
        kept,
        take_members(networks, state.members, kept),
        [row for row in rows if Member(row["arm"], row["replicate"]) in kept],
        imp_masks,
        members,
        optima,
        diverged,
        plan if experiment.retraining.policy == "evidence" else None,
        [row for row in progress.epoch_rows if Member(row["arm"], row["replicate"]) in kept],
    )
    return end, next_state


def _keep_networks(experiment, number, state, networks) -> EarlierNetworks:
    """Return the networks of all imps of a finished round that later rounds need."""
    imps = [member for member in state.members if member.arm == "imp"]
    initial, trained = (
        take_members(tree, state.members, imps) for tree in (networks.initial, networks.trained)
    )
    earlier = state.earlier
    if number == 0 and experiment.pruning.network == "dense":
        earlier = earlier._replace(dense=trained)
    if experiment.retraining.policy == "evidence":
        tickets = initial if number == 0 else earlier.tickets
        earlier = earlier._replace(tickets=tickets, previous=trained)
    return earlier
