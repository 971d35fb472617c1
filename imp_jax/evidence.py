"""Evidence of connectivity, which decides how much a round prunes and trains (the outlook of section 6).

With `pruning.policy` evidence, a round prunes as many weights as keep the projected network close to its
solution. With `retraining.policy` evidence, a round is short and starts from the trained weights while the
last two solutions are connected. Both policies measure the training error of imp on linear paths. A decision
holds for all replicates, so the largest of their barriers counts (ours).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from imp_jax import connectivity, masking
from imp_jax.data import InMemory
from imp_jax.experiment import Experiment, spec_on_mesh
from imp_jax.masking import Mask
from imp_jax.members import take_members
from imp_jax.next_masks import prune
from imp_jax.round_state import RoundPlan, RoundState, default_plan, take_images
from imp_jax.runtime import devices, distributed
from imp_jax.training import Variables
from imp_jax.workdir.checkpoints import MidRoundState, RoundNetworks

_PATH_POINTS = 11  # ours; enough, because a barrier is highest near the middle of a path


def choose_masks(
    experiment: Experiment,
    number: int,
    state: RoundState,
    progress: MidRoundState,
    networks: RoundNetworks,
) -> tuple[Mask, Float[np.ndarray, " members"], float | None]:
    """Compute imp's masks for the round after `number`, by `pruning.policy`; see `next_masks.prune`.

    Args:
      progress, networks: at the end of the training, on the mesh and on the host.

    Returns: the next masks of the imps, the pruning threshold of every member, and the largest increase of the
      training error, in [0, 1], on the paths from imp to its projection on the next mask; None if not computed.
    """

    def prune_by(fraction):
        return prune(
            experiment._replace(pruning=experiment.pruning._replace(fraction=fraction)),
            number,
            state.members,
            progress.states.variables,
            state.masks,
            progress.tickets["params"],
            state.earlier.dense,
        )

    if experiment.pruning.policy == "fixed":
        return *prune_by(experiment.pruning.fraction), None
    imps = [member for member in state.members if member.arm == "imp"]
    solutions = take_members(networks.trained, state.members, imps)
    for fraction in reversed(experiment.pruning.fractions):
        masks, thresholds = prune_by(fraction)
        params = masking.apply(solutions["params"], devices.gather_members(masks, None))
        errors = _errors_on_paths(experiment, solutions, {**solutions, "params": params})
        barrier = float(np.max(errors.max(1) - errors[:, 0]))
        exceeds = distributed.global_max(barrier > experiment.pruning.barrier)  # all processes decide alike
        if not exceeds:
            break
    return masks, thresholds, barrier


def plan_next_round(
    experiment: Experiment, number: int, state: RoundState, networks: RoundNetworks
) -> RoundPlan:
    """Decide how the round after `number` trains, by `retraining.policy`.

    Args:
      networks: at the end of the training, on the host.
    """
    plan = default_plan(experiment, number + 1)
    if experiment.retraining.policy != "evidence" or state.earlier.previous is None:
        return plan
    imps = [member for member in state.members if member.arm == "imp"]
    trained = take_members(networks.trained, state.members, imps)
    errors = _errors_on_paths(experiment, state.earlier.previous, trained)
    barrier = float(np.max(connectivity.error_barrier(errors)))
    exceeds = distributed.global_max(barrier > experiment.retraining.barrier)  # all processes decide alike
    return RoundPlan(short=not exceeds, continues=not exceeds or plan.continues, barrier=barrier)


def _errors_on_paths(
    experiment: Experiment, starts: Variables, ends: Variables
) -> Float[np.ndarray, "imps points"]:
    """Compute the training error, in [0, 1], on the linear path between two networks of each imp."""
    images_and_labels = take_images(experiment, "evidence images", 0, experiment.evidence_images)
    split = InMemory(*map(jnp.asarray, images_and_labels))
    spec = spec_on_mesh(experiment.spec, None)
    errors = []
    for replicate in range(len(jax.tree.leaves(starts)[0])):
        pair = (jax.tree.map(lambda leaf: leaf[replicate], tree) for tree in (starts, ends))  # noqa: B023
        errors.append(connectivity.path_metrics(*pair, split, spec=spec, num_points=_PATH_POINTS)[1])
    return np.stack(errors)
