"""The starting weights and masks of a branch, read from the workdir of its run."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from imp_jax import arms as arm_registry
from imp_jax import masking, runs
from imp_jax.errors import UserError
from imp_jax.experiment import Experiment
from imp_jax.masking import Mask
from imp_jax.members import BranchMember, Member, take_members
from imp_jax.round_state import RoundState, align_networks, default_plan, start_round
from imp_jax.runtime import devices
from imp_jax.training import Variables
from imp_jax.workdir.checkpoints import Checkpoints, RoundNetworks
from imp_jax.workdir.lock import stored_config
from imp_jax.workdir.results import Row


class Source(NamedTuple):
    """A workdir from which a branch reads masks, tickets and trained networks."""

    workdir: Path
    checkpoints: Checkpoints
    rows: list[Row]

    def read(self, number: int) -> tuple[tuple[Member, ...], RoundNetworks]:
        """Read the networks of a round, with its members. Raises: see `runs.read_round`."""
        return runs.read_round(self.checkpoints, self.rows, number)


@contextlib.contextmanager
def open_source(workdir: Path) -> Iterator[Source]:
    """Open a workdir for reading; it may be growing. Raises a UserError if it has no masks of imp."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        finished = checkpoints.rounds()
        if not finished:
            raise UserError(f"{workdir} has no finished round, whose mask a branch could use")
        rows = checkpoints.rows(finished[-1])
        if not any(row["arm"] == "imp" for row in rows) or stored_config(workdir).branch.name:
            raise UserError(f"{workdir} is not the workdir of a run, which has the masks of imp")
        yield Source(workdir, checkpoints, rows)


def choose_rounds(experiment: Experiment, rounds: Sequence[int], trunk: Source, masks_of: Source) -> list[int]:
    """Return the rounds on which a branch trains, sorted; by default all that both workdirs have on disk.

    Raises:
      UserError: a round is not on disk, or cannot be trained later.
    """
    available = [n for n in masks_of.checkpoints.rounds() if _ticket_is_on_disk(experiment, trunk, n)]
    if experiment.rewind_step or experiment.finetunes or experiment.retraining.policy == "short":
        # round 0 differs: other arms take over imp's optimizer at the rewind step, or learning rates are others
        available = [number for number in available if number > 0]
    for number in rounds:
        if number not in available:
            raise UserError(
                f"--rounds has {number}; its mask or ticket is not on disk, or its mask is dense and the run "
                f"rewinds to a later step; there are {', '.join(map(str, available))}"
            )
    if not available:
        raise UserError(f"{masks_of.workdir} has no round on whose mask a branch could train")
    return sorted(rounds) or available


def _ticket_is_on_disk(experiment, trunk, number):
    """Return whether the starting weights of imp in a round can be read."""
    return _ticket_round(experiment, number) in trunk.checkpoints.rounds()


def _ticket_round(experiment, number):
    """Return the round whose checkpoint has the starting weights of imp in round `number`."""
    return max(number - 1, 0) if experiment.rewind_step is None else 0


def start(experiment: Experiment, rounds: Sequence[int], trunk: Source, masks_of: Source) -> RoundState:
    """Compute the starting weights and masks of all members of some rounds, on the host.

    The members are sorted by round, then by arm. Replicates whose imp diverged are left out.

    Raises:
      UserError: a round is damaged; masks have other shapes than the network; no replicate has both a mask and
        a ticket; an arm needs a round that is not on disk.
    """
    starts = [_start_one_round(experiment, number, trunk, masks_of) for number in rounds]
    members, tickets, masks = zip(*starts, strict=True)
    join = lambda *leaves: np.concatenate(leaves)  # noqa: E731
    return RoundState(
        tuple(member for group in members for member in group),
        jax.tree.map(join, *tickets),
        jax.tree.map(join, *masks),
        plan=default_plan(experiment, rounds[-1]),
    )


def _start_one_round(experiment, number, trunk, masks_of):
    mask_members, networks = masks_of.read(number)
    with_tickets, _ = trunk.read(_ticket_round(experiment, number))
    imps = [member for member in mask_members if member.arm == "imp" and member in with_tickets]
    if not imps:
        raise UserError(f"round {number} has no replicate with both a mask and a ticket; the others diverged")
    masks = take_members(networks.mask, mask_members, imps)
    tickets = _read_tickets(experiment, number, trunk, imps)
    _require_fitting_masks(tickets, masks, masks_of.workdir)
    trained = tickets
    if number > 0 and number - 1 in masks_of.checkpoints.rounds():
        members, networks = masks_of.read(number - 1)
        trained = take_members(networks.trained, members, imps)
    elif number > 0 and (names := [name for name in experiment.arms if arm_registry.ARMS[name].uses_trained]):
        raise UserError(f"{names[0]} needs round {number - 1}, which {masks_of.workdir} does not have on disk")
    permutations = None
    if any(arm_registry.ARMS[name].aligned for name in experiment.arms):
        if masks_of is not trunk:
            raise UserError("permuted needs imp and reinit of one run, so it should be without --mask_from")
        permutations = align_networks(experiment, imps, trunk.read(0) if number else None)
    members = tuple(Member(arm, m.replicate) for arm in ("imp", *experiment.arms) for m in imps)
    members = tuple(dict.fromkeys(members))
    state = start_round(experiment, number, members, tickets, masks, trained=trained, permutations=permutations)
    wanted = [member for member in members if member.arm in experiment.arms]
    wanted.sort(key=lambda member: experiment.arms.index(member.arm))
    starts = devices.gather_members((state.tickets, state.masks), len(members))
    starts = take_members(starts, members, wanted)
    return [BranchMember(*member, number) for member in wanted], *starts


def _read_tickets(experiment, number, trunk, imps) -> Variables:
    """Read imp's tickets of a round; with `rewind_step=None` its weights at the end of the round before."""
    if experiment.rewind_step is None and number > 0:
        members, networks = trunk.read(number - 1)
        return take_members(networks.trained, members, imps)
    members, networks = trunk.read(0)
    return take_members(networks.initial, members, imps)


def _require_fitting_masks(tickets, masks: Mask, workdir):
    try:
        masking.require_same_shapes(tickets["params"], masks)
    except ValueError as error:
        raise UserError(f"the masks of {workdir} do not fit the network of the branch: {error}") from error
