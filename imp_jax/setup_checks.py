"""Checks of the names and settings of a config against the model and the data set, for `experiment.setup`.

A wrong setting raises a UserError.
"""

import jax
import jax.numpy as jnp

from imp_jax import arms, data, masking, models, scores
from imp_jax import config as configs
from imp_jax.errors import UserError, one_line
from imp_jax.permutations import identity


def check_arms(names, repulsion_strength, is_branch):
    if is_branch:
        if unknown := [name for name in names if name not in arms.ARMS]:
            raise UserError(f"there is no arm {unknown[0]!r}; there are {', '.join(arms.ARMS)}")
        if not names or len(set(names)) < len(names):
            raise UserError(f"arms is {tuple(names)}; it should have at least one arm, without repetition")
        return
    known = [name for name in arms.ARMS if name not in ("imp", "twin")]
    if not {"imp"} <= set(map(str, names)) <= {"imp", *known} or len(set(names)) < len(names):
        raise UserError(
            f"arms is {names}; it should contain imp, whose masks all arms use, and any of {', '.join(known)}, "
            f"without repetition, such as ('imp', 'reinit'); instability.rounds sets the rounds of twins"
        )
    grown = [name for name in names if not arms.ARMS[name].nested]
    if grown and repulsion_strength:
        raise UserError(
            f"repulsion.strength is {repulsion_strength:g}; the masks of {', '.join(grown)} may regain pruned "
            f"weights, whose earlier values J_r does not store, so it should be 0, or arms be without "
            f"{'it' if len(grown) == 1 else 'them'}"
        )


def check_aligned_arms(config, model):
    """Check that the arms that need permutations of units can have them."""
    for name in config.arms:
        if arms.ARMS[name].aligned and "reinit" not in config.arms and not config.branch.name:
            raise UserError(f"arms is {tuple(config.arms)}; {name} needs the dense network of reinit beside it")
        if arms.ARMS[name].aligned and not hasattr(model, "permutation_spec"):
            raise UserError(
                f"arms has {name!r}; {config.model.name} has no method permutation_spec, which says what units "
                f"can be permuted, so arms should be without it"
            )


def check_layer_factors(config, params):
    """Refuse layer factors that have no effect, or that prune a whole layer."""
    factors = config.pruning.layer_factors
    if factors and config.pruning.scope != "layer":
        raise UserError(
            f"pruning.layer_factors is {factors}; pruning.scope is {config.pruning.scope!r}, which uses no "
            f"factors, so it should be (), or pruning.scope be 'layer'"
        )
    for pattern, factor in factors:
        if masking.prunable(params, pattern) == masking.prunable(params):
            raise UserError(
                f"pruning.layer_factors has {pattern!r}, which names no layer to prune; there are "
                f"{', '.join(params)}"
            )
        if not factor * config.pruning.fraction < 1:
            raise UserError(
                f"pruning.layer_factors has the factor {factor:g} for {pattern!r}; times pruning.fraction, "
                f"{config.pruning.fraction:g}, it should be below 1"
            )


def check_unused_settings(config, dataset):
    """Refuse settings that only streamed sets read if the set is in memory."""
    given, defaults = configs.flatten(config), configs.flatten(configs.default())
    for field in set(data.Streamed.settings) - set(dataset.train.settings):
        if given[field] != defaults[field]:
            raise UserError(
                f"{field} is {given[field]!r}; only streamed sets read it, and {config.dataset.name} is kept "
                f"in memory, so it should be {defaults[field]!r}"
            )


def check_instability_steps(parting_steps, steps):
    """Refuse steps at which twins would part after the end of a training of `steps` steps."""
    if parting_steps and max(parting_steps) >= steps:
        raise UserError(
            f"instability.steps is {parting_steps}; a training has {steps} steps, so they should be at most "
            f"{steps - 1}"
        )


def check_score(name, score, spec, dataset):
    """Check by tracing that a score returns a tree like the parameters; return whether it uses images."""
    variables = models.shapes(spec.model, dataset.train.image_shape)
    calls = []

    def trace(variables, key):
        params = variables["params"]
        return score(_traced_inputs(variables, masking.ones_like(params), key, spec, dataset, calls))

    result = jax.eval_shape(trace, variables, jax.random.key(0))
    try:
        masking.require_same_shapes(variables["params"], result)
    except ValueError as error:
        raise UserError(
            f"pruning.score is {name!r}, which should return a tree like the parameters: {one_line(error)}"
        ) from error
    return bool(calls)


def check_arm(name, spec, dataset, exclude):
    """Check by tracing that an arm returns trees like ticket and mask; return whether it uses images."""
    image_shape, arm = dataset.train.image_shape, arms.ARMS[name]
    variables = models.shapes(spec.model, image_shape)
    calls = []

    def trace(variables, key):
        mask = masking.ones_like(variables["params"])
        permutations = identity(spec.model.permutation_spec(), variables["params"]) if arm.aligned else None
        inputs = arms.ArmInputs(
            variables,
            mask,
            key,
            arms.initializer(models.init_fn(spec.model, image_shape), key),
            variables if arm.uses_trained else None,
            lambda variables, mask: _traced_inputs(variables, mask, key, spec, dataset, calls),
            permutations,
            exclude,
        )
        return arms.start_arm(arm, inputs)

    try:
        jax.eval_shape(trace, variables, jax.random.key(0))
    except ValueError as error:
        raise UserError(
            f"arms has {name!r}, which should return trees like the ticket and the mask: {one_line(error)}"
        ) from error
    return bool(calls)


def _traced_inputs(variables, mask, key, spec, dataset, calls):
    """Make the inputs of a score; append to `calls` when it computes the loss of an image."""
    image_shape = dataset.train.image_shape
    images, labels = jnp.zeros((1, *image_shape)), jnp.zeros(1, jnp.int32)
    inputs = scores.make_inputs(variables, mask, key, images, labels, image_shape=image_shape, spec=spec)

    def record(function):
        return lambda *arguments, **options: calls.append(1) or function(*arguments, **options)

    return inputs._replace(loss=record(inputs.loss), example_loss=record(inputs.example_loss))


def require_layers(patterns, params):
    """Refuse a pattern of `pruning.exclude` that matches no layer with weights, or patterns that match all."""
    prunable, remaining = masking.prunable(params), masking.prunable(params, patterns)
    for pattern in patterns:
        if masking.prunable(params, pattern) == prunable:
            raise UserError(
                f"pruning.exclude has {pattern!r}, which names no layer to prune; there are {', '.join(params)}"
            )
    if not any(jax.tree.leaves(prunable)):
        raise UserError(
            f"the network has no weights to prune: none of {', '.join(params)} has a leaf called kernel"
        )
    if not any(jax.tree.leaves(remaining)):
        raise UserError(f"pruning.exclude is {patterns}; it should leave some of {', '.join(params)} to prune")
