"""Repeats trainings of a finished round, for the states on the way, which checkpoints do not have."""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from imp_jax import imp, masking
from imp_jax.errors import UserError
from imp_jax.experiment import Experiment, put_on_one_device
from imp_jax.masking import Mask, Params
from imp_jax.members import BranchMember
from imp_jax.round_state import RoundState, init_tickets
from imp_jax.runtime import devices
from imp_jax.training import Variables
from imp_jax.workdir.checkpoints import MidRoundState


def replay(
    experiment: Experiment,
    number: int,
    replicates: Sequence[int],
    initial: Variables,
    masks: Mask,
    steps: Collection[int],
) -> dict[int, MidRoundState]:
    """Repeat imp's training of round `number`; return its states at `steps`, on the host.

    Trains on one device. The states have the same bits as in a run on one device of the same machine; those of
    other runs differ by rounding, which a training amplifies. With `rewind_step=k`, later rounds start from
    their tickets at step k.

    Args:
      replicates: the replicates whose imp is trained.
      initial: starting variables of these, `RoundNetworks.initial` of their checkpoint; [replicates, …].
      masks: of these, [replicates, …].
      steps: of the training, from 0 to its number of steps; states before the rewind step are not computed in
        later rounds.

    Raises:
      UserError: the run repels its optima: the earlier ones, which the training needs, are not at hand.
    """
    members = tuple(BranchMember("imp", replicate, number) for replicate in replicates)
    first_step = experiment.rewind_step or 0
    if first_step and number == 0:  # the stored ticket is that of step k
        initial, first_step = init_tickets(experiment, members), 0
    state = RoundState(members, initial, masks)
    start = imp.begin_training(put_on_one_device(experiment), state)._replace(step=first_step)
    return train_on(experiment, members, masks, start, steps)


def train_on(
    experiment: Experiment,
    members: Sequence[BranchMember],
    masks: Mask,
    start: MidRoundState,
    steps: Collection[int],
) -> dict[int, MidRoundState]:
    """Train members of one round on from `start`, each with its own random keys, up to the last of `steps`.

    A member whose loss becomes non-finite is trained to the end too.

    Returns: the states at `steps`, on the host.

    Raises:
      UserError: see `replay`.
    """
    if experiment.spec.repulsion_strength:
        raise UserError(
            f"repulsion.strength is {experiment.spec.repulsion_strength:g}; a training with J_r cannot be "
            f"repeated without the earlier optima, so it should be 0"
        )
    number, last = members[0].round, max(steps)
    learning_rates = experiment.learning_rates_in(number)
    experiment = put_on_one_device(experiment)._replace(
        learning_rates=learning_rates[: -(-last // learning_rates.shape[1])],
        finetunes=False,  # the learning rates are those of the round
        rewind_step=0,  # `start` is at or after the rewind step
        saved_steps=frozenset(steps),
        on_divergence="drop",
    )
    states = {}

    def copy(progress):
        if progress.step in steps:
            tickets, trained = devices.gather_members((progress.tickets, progress.states), len(members))
            states[progress.step] = progress._replace(tickets=tickets, states=trained)

    copy(start)
    if last > start.step:
        state = RoundState(tuple(members), start.tickets, jax.tree.map(jnp.asarray, masks))
        imp.train(experiment, number, state, start, on_epoch=[lambda end: copy(end.progress)])
    return states


def perturb(
    params: Params, mask: Mask, key: Key[Array, ""], size: float, exclude: str | Sequence[str] = ()
) -> Params:
    """Add Gaussian noise to the surviving weights of one network (ours).

    Args:
      size: norm of the noise of each layer, relative to the norm of the layer's surviving weights.
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = treedef.unflatten(jax.random.split(key, len(leaves)))

    def add(weights, kept, key, is_weight):
        if not is_weight:
            return weights
        noise = jnp.where(kept, jax.random.normal(key, weights.shape, weights.dtype), 0)
        norms = jnp.linalg.norm(jnp.where(kept, weights, 0)), jnp.linalg.norm(noise)
        return weights + size * noise * norms[0] / jnp.where(norms[1] == 0, 1, norms[1])

    return jax.tree.map(add, params, mask, keys, masking.prunable(params, exclude))
