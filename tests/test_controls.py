"""The arms of this package: starting weights and masks, beside imp and after resuming."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import imp, layer_densities, masking, pruning, runs
from imp_jax.arms import ARMS
from imp_jax.errors import UserError
from imp_jax.members import Member
from imp_jax.round_state import take_images
from imp_jax.runtime.signals import Stopped
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.rounds import assert_trees_equal, take_member
from tests.helpers.stops import StopsAtFirstCheck

CONTROLS = [name for name in ARMS if name not in ("imp", "twin", "reinit")]
ALL = ("imp", "reinit", *CONTROLS)
OWN_MASKS = [name for name in CONTROLS if ARMS[name].mask is not ARMS["imp"].mask]
OWN_WEIGHTS = [name for name in CONTROLS if ARMS[name].weights is not ARMS["imp"].weights]


@pytest.fixture(scope="module")
def finished_rounds():
    """Return the experiment and the `RoundEnd`s of five rounds of all arms; two layers have an odd size."""
    from tests.conftest import make_tiny_experiment

    fields = {"instability.rounds": (), "pruning.images": 20, "optimizer.learning_rate": 0.2}  # signs change
    experiment = make_tiny_experiment(rounds=5, arms=ALL, **fields)
    return experiment, list(imp.rounds(experiment))


def network(end, arm, replicate=0):
    """Return the initial parameters, the mask and the trained parameters of a member."""
    i = end.members.index(Member(arm, replicate))
    networks = end.networks
    return tuple(
        take_member(tree, i) for tree in (networks.initial["params"], networks.mask, networks.trained["params"])
    )


def kernels(tree):
    return [np.asarray(leaf) for leaf in masking.prunable_leaves(tree)]


def whole_tickets(finished_rounds, replicate):
    """Return the random initialisations of imp and of reinit, before any pruning."""
    _, ends = finished_rounds
    return tuple(network(ends[0], arm, replicate)[0] for arm in ("imp", "reinit"))


def test_masks_have_exactly_as_many_survivors_as_imps(finished_rounds):
    _, ends = finished_rounds
    expected = 141
    for end in ends:
        for arm in ALL:
            for replicate in range(2):
                initial, mask, trained = network(end, arm, replicate)
                assert sum(leaf.sum() for leaf in kernels(mask)) == expected, arm
                assert all(layer["bias"].all() for layer in mask.values())
                for weights in (initial, trained):
                    for leaf, keep in zip(kernels(weights), kernels(mask), strict=True):
                        assert not leaf[~keep].any(), arm
        expected -= round(0.2 * expected)


def test_starting_weights_are_whole_under_every_mask(finished_rounds):
    """Masks that are not inside imp's keep weights which imp pruned earlier; these must not start from zero."""
    _, ends = finished_rounds
    for replicate in range(2):
        ticket, other = whole_tickets(finished_rounds, replicate)
        for end in ends:
            for arm in OWN_MASKS:
                start = other if arm == "permuted" else ticket
                initial, mask, _ = network(end, arm, replicate)
                assert_trees_equal(initial, masking.apply(start, mask))
                assert all(leaf[keep].all() for leaf, keep in zip(kernels(initial), kernels(mask), strict=True))


def test_starting_weights_are_as_their_names_say(finished_rounds):
    _, ends = finished_rounds
    for replicate in range(2):
        ticket, other = (kernels(tree) for tree in whole_tickets(finished_rounds, replicate))
        for before, end in zip([None, *ends], ends, strict=False):
            trained = ticket if before is None else kernels(network(before, "imp", replicate)[2])
            expected = {
                "signs": [np.abs(o) * np.sign(t) for o, t in zip(other, ticket, strict=True)],
                "magnitudes": [np.abs(t) * np.sign(o) for o, t in zip(other, ticket, strict=True)],
                "constant": [np.std(t) * np.sign(t) for t in ticket],
                "trained_signs": [np.abs(o) * np.sign(w) for o, w in zip(other, trained, strict=True)],
            }
            assert set(expected) == set(OWN_WEIGHTS) - {"permuted"}
            for arm, weights in expected.items():
                initial, mask, _ = network(end, arm, replicate)
                assert_trees_equal(mask, network(end, "imp", replicate)[1])
                for found, value, keep in zip(kernels(initial), weights, kernels(mask), strict=True):
                    np.testing.assert_allclose(found, np.where(keep, value, 0), rtol=1e-6)
    differs = [
        not np.array_equal(a, b)
        for a, b in zip(
            kernels(network(ends[2], "signs")[0]), kernels(network(ends[2], "trained_signs")[0]), strict=True
        )
    ]
    assert any(differs)  # training changes some signs


def test_layer_counts_are_those_that_the_arm_promises(finished_rounds):
    _, ends = finished_rounds
    for end in ends:
        imp_mask = network(end, "imp")[1]
        counts, total = (f(imp_mask) for f in (pruning.layer_survivors, masking.survivors))
        shapes = [leaf.shape for leaf in kernels(imp_mask)]
        expected = {
            "shuffled": counts,
            "inverted": counts,
            "permuted": counts,
            "erk": layer_densities.erdos_renyi_kernel_counts(shapes, total),
            "uniform": layer_densities.uniform_counts(shapes, total),
        }
        for arm, value in expected.items():
            np.testing.assert_array_equal(pruning.layer_survivors(network(end, arm)[1]), value, arm)


def test_inverted_uses_the_weights_that_imp_pruned_as_far_as_they_suffice(finished_rounds):
    _, ends = finished_rounds
    for end in ends:
        for own, keep in zip(
            kernels(network(end, "inverted")[1]), kernels(network(end, "imp")[1]), strict=True
        ):
            assert (own & ~keep).sum() == min(keep.sum(), (~keep).sum())


def test_shuffled_is_no_fixed_permutation_over_rounds(finished_rounds):
    _, ends = finished_rounds
    masks = [[kernels(network(end, arm)[1])[0] for arm in ("imp", "shuffled")] for end in ends[2:]]
    # a fixed permutation would keep the masks of later rounds inside those of earlier ones, as imp's are
    assert all((later[0] & ~earlier[0]).sum() == 0 for earlier, later in itertools.pairwise(masks))
    assert all((later[1] & ~earlier[1]).sum() > 0 for earlier, later in itertools.pairwise(masks))


def test_nested_arms_never_regain_a_weight(finished_rounds):
    _, ends = finished_rounds
    for arm in ALL:
        grows = any(
            (b & ~a).any()
            for earlier, later in itertools.pairwise(ends)
            for a, b in zip(kernels(network(earlier, arm)[1]), kernels(network(later, arm)[1]), strict=True)
        )
        assert not (ARMS[arm].nested and grows), arm


def test_masks_at_initialisation_keep_the_highest_scores_of_imps_initialisation(finished_rounds):
    experiment, ends = finished_rounds
    ticket, _ = whole_tickets(finished_rounds, 1)
    images, labels = take_images(experiment, "arm images", 0, experiment.pruning.images)
    assert len(images) == 20

    def loss(params, temperature=1):
        logits = experiment.spec.model.apply({"params": params}, images / 255) / temperature
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(20), labels])

    gradient = jax.grad(loss)(ticket)
    gradient_of_loss = jax.grad(lambda params: loss(params, temperature=200))
    _, hessian_gradient = jax.jvp(gradient_of_loss, (ticket,), (gradient_of_loss(ticket),))
    expected_scores = {
        "snip": jax.tree.map(lambda p, g: jnp.abs(p * g), ticket, gradient),
        "grasp": jax.tree.map(jnp.multiply, ticket, hessian_gradient),
        "magnitude_init": jax.tree.map(jnp.abs, ticket),
    }
    for end in ends:
        for arm, values in expected_scores.items():
            mask = np.concatenate([leaf.ravel() for leaf in kernels(network(end, arm, 1)[1])])
            flat = np.concatenate([leaf.ravel() for leaf in kernels(values)])
            if not mask.all():
                assert flat[mask].min() >= flat[~mask].max() - 1e-6 * np.abs(flat).max(), arm


def test_dense_masks_in_round_0_make_controls_of_one_initialisation_start_alike(finished_rounds):
    _, ends = finished_rounds
    for arm in OWN_MASKS:
        start = "reinit" if arm == "permuted" else "imp"
        assert_trees_equal(network(ends[0], arm)[0], network(ends[0], start)[0])


@pytest.mark.parametrize(
    ("rewind_step", "arms"),
    [
        (0, ALL),
        (3, ("imp", "reinit", "shuffled", "signs", "snip", "permuted")),
        (None, ("imp", "reinit", "random", "trained_signs", "synflow", "permuted")),
    ],
)
def test_arms_resume_to_the_bit(tmp_path, rewind_step, arms):
    config = make_tiny_config(
        arms=arms, replicates=1, epochs=1, rewind_step=rewind_step, **{"instability.rounds": ()}
    )
    dataset = make_tiny_dataset()
    whole, resumed = (tmp_path / name for name in ("whole", "resumed"))
    runs.run(config, whole, dataset=dataset)
    while True:
        with contextlib.suppress(Stopped):
            runs.run(config, resumed, StopsAtFirstCheck(), dataset=dataset)
            break
    with contextlib.closing(Checkpoints(whole)) as a, contextlib.closing(Checkpoints(resumed)) as b:
        for number in range(3):
            networks = a.restore(number)
            assert_trees_equal(networks, b.restore(number))
            kept = [
                (leaf[np.asarray(keep)] != 0).all()
                for leaf, keep in zip(kernels(networks.initial["params"]), kernels(networks.mask), strict=True)
            ]
            assert all(kept)  # also with rewind_step=None, where imp's own weights are zero once pruned


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"arms": ("imp", "shuffled"), "repulsion.strength": 2.0},
            "the masks of shuffled may regain pruned weights",
        ),
        ({"arms": ("imp", "permuted")}, "permuted needs the dense network of reinit beside it"),
        (
            {"arms": ("imp", "suffled")},
            "it should contain imp, whose masks all arms use, and any of reinit, shuff",
        ),
        ({"pruning.layer_factors": (("Dense_2", 0.5),)}, "it should be \\(\\), or pruning.scope be 'layer'"),
        (
            {"pruning.scope": "layer", "pruning.layer_factors": (("Dense_7", 0.5),)},
            "'Dense_7', which names no layer to prune; there are Dense_0, Dense_1, Dense_2",
        ),
        (
            {"pruning.scope": "layer", "pruning.layer_factors": (("Dense_2", 5.0),)},
            "has the factor 5 for 'Dense_2'; times pruning.fraction, 0.2, it should be below 1",
        ),
        ({"pruning.layer_factors": ("Dense_2", 0.5)}, "it should be pairs of a name and a factor above 0"),
        ({"pruning.scope": "unit"}, "pruning.scope is 'unit'; it should be global, layer, erk or uniform"),
    ],
)
def test_settings_that_do_not_fit_are_rejected_in_one_sentence(tiny_experiment, fields, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        tiny_experiment(**fields)
    assert "\n" not in str(error.value)


def test_images_are_taken_only_for_arms_that_use_them(tiny_experiment):
    assert tiny_experiment(arms=("imp", "synflow", "magnitude_init", "shuffled")).arms_with_images == set()
    experiment = tiny_experiment(arms=("imp", "snip", "grasp"), **{"pruning.images": 20})
    assert (experiment.arms_with_images, experiment.pruning.images) == ({"snip", "grasp"}, 20)
    with pytest.raises(UserError, match="uses no images, so it should be 256"):
        tiny_experiment(arms=("imp", "synflow"), **{"pruning.images": 20})
