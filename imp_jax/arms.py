"""Arms: what is trained on the mask of a round, such as the ticket itself and its controls.

The starting weights and the mask of an arm are functions of imp's ticket and mask, see `ArmInputs`. An arm
trains beside imp, in every round, or later in a branch (`imp_jax.branch`). To add an arm, call `register`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from imp_jax import layer_densities, masking, pruning, scores
from imp_jax.errors import UserError
from imp_jax.masking import Mask
from imp_jax.members import stream_number
from imp_jax.permutations import Permutations, permute
from imp_jax.scores import Score, ScoreInputs
from imp_jax.training import Variables

FIRST_USER_NUMBER = 100  # lower numbers are reserved for the arms of this package
_SYNFLOW_STEPS = 100  # Tanaka et al. 2020


class ArmInputs(NamedTuple):
    """The inputs of an arm's functions, for one replicate; trees have no member axis.

    All weights are whole, and not yet masked: an arm may use weights that imp has pruned.
    """

    ticket: Variables  # imp's starting variables of the round
    mask: Mask  # imp's mask of the round
    key: Key[Array, ""]  # of this arm, replicate and round
    initialize: Callable[[str], Variables]  # from the name of an RNG stream; the same in every round
    # imp's variables at the end of the round before, masked; in round 0, the ticket; None unless
    # `Arm.uses_trained`
    trained: Variables | None = None
    score_inputs: Callable[[Variables, Mask], ScoreInputs] | None = None  # for scores of an untrained network
    permutations: Permutations | None = None  # of imp's units to those of reinit; None unless `Arm.aligned`
    exclude: tuple[str, ...] = ()  # patterns of layers that are never pruned

    @property
    def count(self) -> Int[Array, ""]:
        """The number of weights that survive in imp's mask."""
        return masking.survivors(self.mask, self.exclude)

    @property
    def dense_mask(self) -> Mask:
        """The mask that keeps every weight."""
        return masking.ones_like(self.mask)


def _imp_mask(inputs: ArmInputs) -> Mask:
    return inputs.mask


def _ticket(inputs: ArmInputs) -> Variables:
    return inputs.ticket


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training on a round's mask.

    Attributes:
      number: folded into the arm's random keys, so it must never change; at least 100 for arms of users.
      weights: returns the starting variables, a tree like `ArmInputs.ticket`; they are masked afterwards.
      mask: returns the mask, a tree like `ArmInputs.mask`.
      rewinds: with `rewind_step=k`, whether step k resets the arm to its starting weights, as it does imp.
        False for an arm that trains from a random initialisation, whose weights are those of step 0.
      nested: whether its mask of each round is part of that of the round before, as repulsion needs.
      aligned: whether it uses `ArmInputs.permutations`, which need imp and reinit after round 0.
      uses_trained: whether it uses `ArmInputs.trained`, which needs the round before on disk in a branch.
    """

    number: int
    weights: Callable[[ArmInputs], Variables] = _ticket
    mask: Callable[[ArmInputs], Mask] = _imp_mask
    rewinds: bool = True
    nested: bool = True
    aligned: bool = False
    uses_trained: bool = False


# --- starting weights ---


def _reinitialize(inputs: ArmInputs) -> Variables:
    return inputs.initialize("reinit")


def _map_weights(function: Callable, variables: Variables, *others: Variables) -> Variables:
    """Return `variables` with its kernels replaced by `function(kernel, *kernels of the others)`."""
    params, *other_params = (tree["params"] for tree in (variables, *others))
    params = jax.tree.map(
        lambda is_weight, *leaves: function(*leaves) if is_weight else leaves[0],
        masking.prunable(params),
        params,
        *other_params,
    )
    return {**variables, "params": params}


def _with_signs(magnitudes: PyTree, signs: PyTree) -> PyTree:
    """Return magnitudes with other signs; where a sign is 0, as of a pruned weight, its own sign is kept."""
    return _map_weights(lambda m, s: jnp.where(s == 0, m, jnp.abs(m) * jnp.sign(s)), magnitudes, signs)


# --- masks ---


def _random_scores(inputs: ArmInputs, stream: int = 0) -> PyTree:
    leaves, treedef = jax.tree.flatten(inputs.mask)
    keys = jax.random.split(jax.random.fold_in(inputs.key, stream), len(leaves))
    return treedef.unflatten([jax.random.uniform(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def _draw_layers(inputs: ArmInputs, counts: Int[Array, " layers"]) -> Mask:
    """Draw a mask with the given number of survivors in each layer."""
    return pruning.keep_highest_per_layer(_random_scores(inputs), inputs.dense_mask, counts, inputs.exclude)


def _shuffle(inputs: ArmInputs) -> Mask:
    return _draw_layers(inputs, pruning.layer_survivors(inputs.mask, inputs.exclude))


def _draw(inputs: ArmInputs) -> Mask:
    return pruning.keep_highest(_random_scores(inputs), inputs.dense_mask, inputs.count, inputs.exclude)


def _invert(inputs: ArmInputs) -> Mask:
    """Draw imp's number of survivors in each layer from the weights that imp pruned, as far as they suffice."""
    drawn = jax.tree.map(lambda score, keep: score + ~keep, _random_scores(inputs), inputs.mask)
    counts = pruning.layer_survivors(inputs.mask, inputs.exclude)
    return pruning.keep_highest_per_layer(drawn, inputs.dense_mask, counts, inputs.exclude)


def _draw_with_densities(counts: Callable) -> Callable[[ArmInputs], Mask]:
    def mask(inputs: ArmInputs) -> Mask:
        shapes = [leaf.shape for leaf in masking.prunable_leaves(inputs.mask, inputs.exclude)]
        return _draw_layers(inputs, counts(shapes, inputs.count))

    return mask


def _prune_at_initialization(score: Score, steps: int = 1) -> Callable[[ArmInputs], Mask]:
    """Return a function that prunes imp's random initialisation by a score to imp's number of survivors."""

    def mask(inputs: ArmInputs) -> Mask:
        variables, dense = inputs.initialize("init"), inputs.dense_mask

        def score_masked(mask):
            params = masking.apply(variables["params"], mask)
            return score(inputs.score_inputs({**variables, "params": params}, mask))

        if steps == 1:
            return pruning.keep_highest(score_masked(dense), dense, inputs.count, inputs.exclude)
        return pruning.prune_in_steps(score_masked, dense, inputs.count, steps, inputs.exclude)

    return mask


def _permute_mask(inputs: ArmInputs) -> Mask:
    """Carry imp's mask to the units of the other initialisation (Adnan et al. 2025)."""
    return permute(inputs.mask, inputs.permutations)


ARMS: dict[str, Arm] = {
    # the ticket itself; all arms derive their masks from its masks
    "imp": Arm(0),
    # the control of the paper: another random initialisation, the same in all rounds (ours)
    "reinit": Arm(1, _reinitialize, rewinds=False),
    # the ticket with other data order and augmentation, in the rounds of `instability.rounds` (section 2.1)
    "twin": Arm(2),
    # imp's mask permuted within each layer, with a new draw in each round (Frankle et al. 2021)
    "shuffled": Arm(3, mask=_shuffle, nested=False),
    # a mask drawn over all layers, with a new draw in each round
    "random": Arm(4, mask=_draw, nested=False),
    # a mask drawn from the weights that imp pruned
    "inverted": Arm(5, mask=_invert, nested=False),
    # the other initialisation with the signs of the ticket (Zhou et al. 2019)
    "signs": Arm(6, lambda i: _with_signs(_reinitialize(i), i.ticket), rewinds=False),
    # the ticket's magnitudes with the signs of the other initialisation
    "magnitudes": Arm(7, lambda i: _with_signs(i.ticket, _reinitialize(i))),
    # the ticket's signs times the standard deviation of the layer's weights (Zhou et al. 2019)
    "constant": Arm(8, lambda i: _map_weights(lambda w: jnp.std(w) * jnp.sign(w), i.ticket)),
    # the other initialisation with the signs that imp had at the end of the round before
    "trained_signs": Arm(
        9, lambda i: _with_signs(_reinitialize(i), i.trained), rewinds=False, uses_trained=True
    ),
    # masks drawn in each round, with layer densities that do not come from imp (Evci et al. 2020)
    "erk": Arm(10, mask=_draw_with_densities(layer_densities.erdos_renyi_kernel_counts), nested=False),
    "uniform": Arm(11, mask=_draw_with_densities(layer_densities.uniform_counts), nested=False),
    # masks of imp's random initialisation (that of step 0), under which the ticket is trained
    "snip": Arm(12, mask=_prune_at_initialization(scores.taylor)),
    "grasp": Arm(13, mask=_prune_at_initialization(scores.grasp)),
    "synflow": Arm(14, mask=_prune_at_initialization(scores.synflow, _SYNFLOW_STEPS), nested=False),
    "magnitude_init": Arm(15, mask=_prune_at_initialization(scores.magnitude)),
    # imp's mask carried to the other initialisation by permuting the units of each layer (Adnan et al. 2025);
    # the permutation is found by matching weights (ours)
    "permuted": Arm(16, _reinitialize, _permute_mask, rewinds=False, aligned=True),
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


def start_arm(arm: Arm, inputs: ArmInputs) -> tuple[Variables, Mask]:
    """Compute the starting weights, not yet masked, and the mask of an arm.

    Raises:
      ValueError: the arm returns a tree whose structure or shapes differ from those of the ticket or mask.
    """
    weights, mask = arm.weights(inputs), arm.mask(inputs)
    masking.require_same_shapes(inputs.ticket, weights)
    masking.require_same_shapes(inputs.mask, mask)
    return weights, jax.tree.map(lambda leaf: leaf.astype(bool), mask)


def initializer(
    init: Callable[[Key[Array, ""]], Variables], replicate_key: Key[Array, ""]
) -> Callable[[str], Variables]:
    """Return a function that initialises a replicate's network from the name of an RNG stream."""
    return lambda stream: init(jax.random.fold_in(replicate_key, stream_number(stream)))
