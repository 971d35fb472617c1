"""Computes imp's masks of the next round from the trained networks, and every member's pruning threshold."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from imp_jax import pruning, scores
from imp_jax.experiment import Experiment
from imp_jax.masking import Mask, Params
from imp_jax.members import Member, member_keys
from imp_jax.round_state import take_images
from imp_jax.runtime import devices
from imp_jax.runtime.execution import shard_over_mesh
from imp_jax.training import Variables


def prune(
    experiment: Experiment,
    number: int,
    members: Sequence[Member],
    variables: Variables,
    masks: Mask,
    initial: Params,
) -> tuple[Mask, Float[np.ndarray, " members"]]:
    """Compute imp's masks for the round after `number`, and the pruning threshold of every member.

    Args:
      variables, masks: of all members after training; on the mesh, padded to its slots, or on the host.
      initial: the parameters of all members at the start of the training, masked or not.

    Returns: the next masks of the imps, in their order; and for each member the threshold at which its own
      weights are, or would be, pruned.
    """
    spec, pruning_spec = experiment.spec, experiment.pruning
    slots, image_shape = len(jax.tree.leaves(masks)[0]), experiment.dataset.train.image_shape
    keys = member_keys(members, experiment.seed, lambda member: ["score", number])
    uses_images = pruning_spec.score_uses_images
    batch = take_images(experiment, "score images", number) if uses_images else (None, None)
    imps = np.array([i for i, member in enumerate(members) if member.arm == "imp"], int)
    spec = spec if slots == devices.count_slots(len(members), spec.mesh) else spec._replace(mesh=None)
    keys = devices.shard_members(keys, spec.mesh)
    next_masks, thresholds = _prune_members(
        variables,
        masks,
        initial,
        keys,
        *batch,
        imps,
        pruning_spec=pruning_spec,
        spec=spec,
        image_shape=image_shape,
    )
    return next_masks, devices.gather_members(thresholds, len(members))


@functools.partial(jax.jit, static_argnames=("pruning_spec", "spec", "image_shape"))
def _prune_members(variables, masks, initial, keys, images, labels, imps, *, pruning_spec, spec, image_shape):
    def prune_member(inputs):
        variables, mask, initial, key, images, labels = inputs
        score_inputs = scores.make_inputs(
            variables, mask, key, images, labels, image_shape=image_shape, spec=spec, initial=initial
        )
        return pruning.prune_by_score(
            pruning_spec.score(score_inputs),
            variables["params"],
            mask,
            pruning_spec.fraction,
            pruning_spec.exclude,
            scope=pruning_spec.scope,
            layer_factors=pruning_spec.layer_factors,
        )

    def prune_all(variables, masks, initial, keys, images, labels):
        members = (variables, masks, initial, keys)
        if images is None:
            return jax.vmap(lambda *inputs: prune_member((*inputs, None, None)))(*members)
        # one member at a time: gradients of many images take memory
        return jax.lax.map(lambda inputs: prune_member((*inputs, images, labels)), members)

    member, whole = P(devices.MEMBER), P()
    prune_all = shard_over_mesh(prune_all, (member, member, member, member, whole, whole), spec.mesh)
    masks, thresholds = prune_all(variables, masks, initial, keys, images, labels)
    return jax.tree.map(lambda leaf: leaf[imps], masks), thresholds
