"""Computes imp's masks of the next round from the trained networks, and every member's pruning threshold."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from imp_jax import layer_densities, masking, pruning, scores
from imp_jax.experiment import Experiment, spec_on_mesh
from imp_jax.masking import Mask, Params
from imp_jax.members import Member, member_keys, take_members
from imp_jax.round_state import init_tickets, take_images
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
    dense: Variables | None = None,
) -> tuple[Mask, Float[np.ndarray, " members"]]:
    """Compute imp's masks for the round after `number`, and the pruning threshold of every member.

    Args:
      variables, masks: of all members after training; on the mesh, padded to its slots, or on the host.
      initial: the parameters of all members at the start of the training, masked or not.
      dense: of the imps after round 0, if `pruning.network` is dense; None in round 0.

    Returns: the next masks of the imps, in their order; and for each member the threshold at which its own
      weights are, or would be, pruned. If another network is scored, it is that of pruning by magnitude.
    """
    pruning_spec = experiment.pruning
    if pruning_spec.network != "trained":
        by_magnitude = pruning_spec._replace(
            network="trained", score=scores.magnitude, score_uses_images=False, scope="global"
        )
        next_masks, thresholds = prune(
            experiment._replace(pruning=by_magnitude), number, members, variables, masks, initial
        )
        imps = [member for member in members if member.arm == "imp"]
        if not imps:  # in a branch
            return next_masks, thresholds
        imp_masks = take_members(devices.gather_members(masks, len(members)), members, imps)
        if pruning_spec.network == "initial":
            network = init_tickets(experiment, imps)
        else:
            network = dense or take_members(devices.gather_members(variables, len(members)), members, imps)
        return _prune_network(experiment, number, imps, network, imp_masks), thresholds
    spec = experiment.spec
    slots, image_shape = len(jax.tree.leaves(masks)[0]), experiment.dataset.train.image_shape
    keys = member_keys(members, experiment.seed, lambda member: ["score", number])
    uses_images = pruning_spec.score_uses_images
    images = pruning_spec.images
    batch = take_images(experiment, "score images", number, images) if uses_images else (None, None)
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


def _prune_network(experiment, number, imps, network, masks):
    """Prune networks with dense masks to the density of the round after `number`."""
    pruning_spec = experiment.pruning
    keys = member_keys(imps, experiment.seed, lambda member: ["score", number])
    # the same images in all rounds, so that the masks of SNIP and GraSP are parts of earlier ones
    uses_images, images = pruning_spec.score_uses_images, pruning_spec.images
    batch = take_images(experiment, "score images", 0, images) if uses_images else (None, None)
    return _prune_dense_networks(
        network,
        masks,
        keys,
        *batch,
        pruning_spec=pruning_spec,
        spec=spec_on_mesh(experiment.spec, None),
        image_shape=experiment.dataset.train.image_shape,
    )


@functools.partial(jax.jit, static_argnames=("pruning_spec", "spec", "image_shape"))
def _prune_dense_networks(networks, masks, keys, images, labels, *, pruning_spec, spec, image_shape):
    exclude = pruning_spec.exclude

    def prune_one(inputs):
        variables, mask, key = inputs
        alive = masking.survivors(mask, exclude)
        count = alive - pruning.rounded_share(alive, pruning_spec.fraction)
        dense = masking.ones_like(mask)

        def score(mask):
            params = masking.apply(variables["params"], mask)
            score_inputs = scores.make_inputs(
                {**variables, "params": params}, mask, key, images, labels, image_shape=image_shape, spec=spec
            )
            return pruning_spec.score(score_inputs)

        if pruning_spec.scope in layer_densities.COUNTS:
            counts = layer_densities.COUNTS[pruning_spec.scope]
            shapes = [leaf.shape for leaf in masking.prunable_leaves(mask, exclude)]
            return pruning.keep_highest_per_layer(score(dense), dense, counts(shapes, count), exclude)
        if pruning_spec.steps == 1:
            return pruning.keep_highest(score(dense), dense, count, exclude)
        return pruning.prune_in_steps(score, dense, count, pruning_spec.steps, exclude)

    return jax.lax.map(prune_one, (networks, masks, keys))
