"""The state at the start and at the end of a round, and how all members start from imp's tickets and masks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from imp_jax import arms, masking, models, repulsion
from imp_jax.arms import ArmInputs, initializer, start_arm
from imp_jax.errors import UserError
from imp_jax.experiment import Experiment, spec_on_mesh
from imp_jax.masking import Mask
from imp_jax.members import (
    Member,
    add_scheduled_members,
    member_keys,
    replicate_keys,
    stream_number,
    take_members,
)
from imp_jax.permutations import Permutations, identity, match_weights
from imp_jax.repulsion import Optima
from imp_jax.runtime import devices
from imp_jax.scores import make_inputs
from imp_jax.training import Metrics, Variables
from imp_jax.workdir.checkpoints import MidRoundState, RoundNetworks
from imp_jax.workdir.results import Row


class RoundPlan(NamedTuple):
    """How the members of a round train."""

    short: bool = False  # with `Retraining.learning_rates`
    continues: bool = False  # from the trained weights of the round before, not from the ticket
    barrier: float | None = None  # between the last two solutions, if it decided this; error in [0, 1]


class EarlierNetworks(NamedTuple):
    """Networks of the imps in earlier rounds, on the host; each is None unless a setting needs it."""

    dense: Variables | None = None  # at the end of round 0, if `pruning.network` is dense
    tickets: Variables | None = None  # starting weights, not masked, if `retraining.policy` is evidence
    previous: Variables | None = None  # at the end of the round before, if `retraining.policy` is evidence


class RoundState(NamedTuple):
    """The state at the start of a round.

    Trees have a leading axis of `members`. `tickets` and `masks` are on the mesh, where the axis is padded to a
    multiple of its member axis.
    """

    members: tuple[Member, ...]
    tickets: Variables  # starting weights, not yet masked
    masks: Mask
    optima: Optima | None = None  # earlier optima for J_r, on the host; None without repulsion and in round 0
    earlier: EarlierNetworks = EarlierNetworks()
    permutations: Permutations | None = None  # of the imps, on the host; None unless an arm is `aligned`
    plan: RoundPlan = RoundPlan()


class EpochEnd(NamedTuple):
    """The argument of `on_epoch`: after every epoch, and wherever training pauses to save, rewind or check."""

    round: int
    members: tuple[Member, ...]
    progress: MidRoundState  # on the mesh; the next step donates its `states`, so copy what you keep
    metrics: Metrics  # of the steps since the last call, as NumPy arrays [steps, members]
    seconds: float  # of training since the last call, without compilation
    compile_seconds: float  # since the last call
    diverged: dict[Member, tuple[int, str]]  # members with a non-finite loss: step and description
    steps: int  # of the whole training
    rows: Sequence[Row] = ()  # of epochs.csv, one per member, if an epoch ends and its networks were evaluated


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
    next_plan: RoundPlan | None = None  # None unless evidence decides
    epoch_rows: Sequence[Row] = ()  # of epochs.csv; () unless all epochs were evaluated


ARM_IMAGES = "arm images"  # RNG stream of the images on which masks at initialisation are computed

Callbacks = Sequence[Callable[[Any], None]]


@functools.partial(jax.jit, static_argnames=("model", "image_shape"))
def init_variables(
    keys: Key[Array, " members"], *, model: nn.Module, image_shape: tuple[int, int, int]
) -> Variables:
    """Initialise the variables of one network for each key."""
    return jax.vmap(models.init_fn(model, image_shape))(keys)


def init_tickets(experiment: Experiment, imps: Sequence[Member]) -> Variables:
    """Initialise the networks of imps at random, from keys that depend only on the seed and the replicate."""
    keys = member_keys(imps, experiment.seed, lambda member: ["init"])
    image_shape = experiment.dataset.train.image_shape
    return init_variables(keys, model=experiment.spec.model, image_shape=image_shape)


def start_round(
    experiment: Experiment,
    number: int,
    members: Sequence[Member],
    tickets: Variables,
    masks: Mask,
    ticket_of: Sequence[int] | None = None,
    mask_of: Sequence[int] | None = None,
    *,
    trained: Variables | None = None,
    permutations: Permutations | None = None,
    plan: RoundPlan | None = None,
) -> RoundState:
    """Compute the state at the start of round `number` from imp's tickets and masks, without earlier optima.

    Args:
      members: the members that train in every round; those of single rounds, such as twins, are added.
      tickets, masks: of the imps of `members`, in their order; or of any networks, if `ticket_of` and `mask_of`
        give the index of each imp.
      trained: of the networks of `tickets`, at the end of the round before; None in round 0.
      permutations: of the imps of `members`, see `ArmInputs`.
      plan: of the round; None is `default_plan`.
    """
    plan = plan or default_plan(experiment, number)
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
    ticket_of, mask_of = (in_order if of is None else np.array(of) for of in (ticket_of, mask_of))
    imp_starts = (
        *_take_imps((tickets, tickets if trained is None else trained), ticket_of, mesh=mesh),
        _take_imps(masks, mask_of, mesh=mesh),
        permutations,
    )
    uses_images = tuple(name in experiment.arms_with_images for name in names)
    tickets, masks = _start_members(
        imp_starts,
        replicate_keys(imps, experiment.seed),
        [arm_keys(name) for name in names],
        take_images(experiment, ARM_IMAGES, 0, experiment.pruning.images) if any(uses_images) else (None, None),
        np.resize(start_of_member, slots),
        arms=tuple(arms.ARMS[name] for name in names),
        uses_images=uses_images,
        continues=plan.continues,
        exclude=experiment.pruning.exclude,
        image_shape=experiment.dataset.train.image_shape,
        spec=experiment.spec,
    )
    return RoundState(members, tickets, masks, permutations=permutations, plan=plan)


def default_plan(experiment: Experiment, number: int) -> RoundPlan:
    """Return the plan of round `number` that needs no evidence."""
    return RoundPlan(
        short=experiment.retraining.policy == "short" and number > 0, continues=experiment.rewind_step is None
    )


def take_images(experiment: Experiment, stream: str, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Take training images and labels on which scores or errors are computed; the same for all members.

    Args:
      stream: name of the RNG stream that draws the images.
      number: folded into its key, such as the number of the round.
      count: number of images.
    """
    key = jax.random.fold_in(jax.random.key(experiment.seed), stream_number(stream))
    examples = jax.random.permutation(jax.random.fold_in(key, number), experiment.dataset.train.examples)
    examples = np.asarray(examples[:count])
    return devices.gather_members(tuple(experiment.dataset.train.take(examples)), None)


@functools.partial(jax.jit, static_argnames="mesh")
def _take_imps(tree, imps, *, mesh):
    """Take the imps of a tree; always in one layout, so that `_start_members` is compiled once."""
    return devices.constrain_whole(jax.tree.map(lambda leaf: leaf[imps], tree), mesh)


@functools.partial(
    jax.jit, static_argnames=("arms", "uses_images", "continues", "exclude", "image_shape", "spec")
)
def _start_members(
    imp_starts,
    replicate_keys,
    keys,
    images_and_labels,
    start_of_place,
    *,
    arms,
    uses_images,
    continues,
    exclude,
    image_shape,
    spec,
):
    """Start all arms from imp's tickets and masks of all replicates; then take the one of each place."""
    one_device = spec_on_mesh(spec, None)
    init = models.init_fn(one_device.model, image_shape)

    def start(arm, imp_start, replicate_key, key, images, labels):
        ticket, trained, mask, permutations = imp_start
        initialize = initializer(init, replicate_key)
        if continues:  # pruned weights are zero in the trained network, which other masks may keep
            whole = jax.tree.map(jnp.where, mask, ticket["params"], initialize("init")["params"])
            ticket = {**ticket, "params": whole}

        def score_inputs(variables, mask):
            return make_inputs(variables, mask, key, images, labels, image_shape=image_shape, spec=one_device)

        return start_arm(
            arm,
            ArmInputs(
                *(ticket, mask, key, initialize, trained if arm.uses_trained else None),
                *(score_inputs, permutations, exclude),
            ),
        )

    starts = []
    for arm, arm_keys, has_images in zip(arms, keys, uses_images, strict=True):
        each = (imp_starts, replicate_keys, arm_keys)
        if has_images:  # one replicate at a time: gradients of many images take memory
            starts.append(jax.lax.map(lambda i, arm=arm: start(arm, *i, *images_and_labels), each))
        else:
            starts.append(jax.vmap(lambda *i, arm=arm: start(arm, *i, None, None))(*each))
    starts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[start_of_place], *starts)
    return devices.constrain_members(starts, spec.mesh)


def align_networks(
    experiment: Experiment,
    imps: Sequence[Member],
    finished: tuple[Sequence[Member], RoundNetworks] | None,
) -> Permutations | None:
    """Compute the permutations of each imp that align its dense network with that of reinit, on the host.

    Args:
      imps: the members that the result has an entry of.
      finished: the members and networks of round 0; None before it ends, which gives identities.

    Returns: None if no arm of the experiment is `aligned`.

    Raises:
      UserError: a replicate of `imps` has no reinit.
    """
    if not any(arms.ARMS[name].aligned for name in experiment.arms):
        return None
    spec = experiment.spec.model.permutation_spec()
    params = models.shapes(experiment.spec.model, experiment.dataset.train.image_shape)["params"]

    def align(replicate):
        if finished is None:
            return identity(spec, params)
        members, networks = finished
        if Member("reinit", replicate) not in members:
            raise UserError(
                f"the arm permuted needs the dense network of reinit, and replicate {replicate} has none; "
                f"it should be left out of arms, or reinit be trained"
            )
        source, target = (
            jax.tree.map(lambda leaf, arm=arm: leaf[members.index(Member(arm, replicate))], networks.trained)
            for arm in ("imp", "reinit")
        )
        return match_weights(spec, target["params"], source["params"])

    return jax.tree.map(lambda *leaves: np.stack(leaves), *(align(imp.replicate) for imp in imps))


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
