"""Methods by name: their fields, and what their rounds train."""

import contextlib
import itertools

import jax
import numpy as np
import pytest

from configs import conv4, lenet, mnist5k, resnet20, resnet50
from imp_jax import config as configs
from imp_jax import imp, masking, methods, pruning, runs, scores, training
from imp_jax.errors import UserError
from imp_jax.experiment import setup
from imp_jax.runtime.signals import Stopped
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.rounds import assert_trees_equal, take_member
from tests.helpers.stops import StopsAtFirstCheck


@pytest.mark.parametrize(
    "module", [conv4, lenet, mnist5k, resnet20, resnet50], ids=lambda module: module.__name__
)
def test_every_config_takes_every_method(module):
    for method in methods.METHODS:
        config = module.get_config(method)
        configs.validate(config)
        assert methods.name_of(config) == method
    assert methods.name_of(module.get_config()) == "imp"


def test_unknown_method_lists_all():
    with pytest.raises(
        UserError, match=r"the method is .lrrr.; it should be one of imp, rewind, lrr, .* mean lrr"
    ):
        mnist5k.get_config("lrrr")
    with pytest.raises(UserError, match="the config gives no rewind_step; it should be a step above 0"):
        methods.apply(configs.default(), "rewind")


def test_other_settings_have_no_method_name():
    config = configs.default()
    config.pruning.score = "taylor"
    assert methods.name_of(config) == ""


def tiny_rounds(method, **fields):
    """Train three rounds of a method in memory."""
    config = make_tiny_config(**{"epochs": 1, "arms": ("imp",), "instability.rounds": (), **fields})
    config = methods.apply(config, method, rewind_step=3)
    experiment = setup(config, make_tiny_dataset(), use_mesh=False)
    return experiment, list(imp.rounds(experiment))


def expected_counts():
    counts = [141]
    for _ in range(2):
        counts.append(counts[-1] - round(0.2 * counts[-1]))
    return counts


@pytest.mark.parametrize("method", methods.METHODS)
def test_rounds_of_all_methods_have_the_densities_of_imp(method):
    fields = {"optimizer.schedule": "cosine"} if method == "finetune" else {}
    _, ends = tiny_rounds(method, **fields)
    for end, count in zip(ends, expected_counts(), strict=True):
        for replicate in range(2):
            assert masking.survivors(take_member(end.networks.mask, replicate)) == count


def test_one_shot_prunes_the_dense_network_in_every_round():
    _, ends = tiny_rounds("oneshot")
    for replicate in range(2):
        trained = take_member(ends[0].networks.trained["params"], replicate)
        start = take_member(ends[0].networks.initial["params"], replicate)
        for end, count in zip(ends, expected_counts(), strict=True):
            mask = pruning.keep_highest(jax.tree.map(abs, trained), masking.ones_like(trained), count)
            assert_trees_equal(take_member(end.networks.mask, replicate), mask)
            assert_trees_equal(
                take_member(end.networks.initial["params"], replicate), masking.apply(start, mask)
            )


def test_masks_at_initialisation_do_not_depend_on_training():
    for method, fields in (("snip", {"pruning.images": 20}), ("synflow", {}), ("random", {}), ("erk", {})):
        masks = [
            [end.networks.mask for end in tiny_rounds(method, **fields, **{"optimizer.learning_rate": rate})[1]]
            for rate in (1e-3, 1e-2)
        ]
        assert_trees_equal(*masks)


def test_snip_prunes_the_initialisation_by_its_saliency():
    experiment, ends = tiny_rounds("snip", **{"pruning.images": 46})
    images, labels = experiment.dataset.train
    for replicate in range(2):
        params = take_member(ends[0].networks.initial["params"], replicate)

        def loss(params):
            return training.loss_fn(params, {}, images, labels, spec=experiment.spec)[0]

        inputs = scores.ScoreInputs(params, None, None, loss, None)
        values = np.concatenate([leaf.ravel() for leaf in masking.prunable_leaves(scores.taylor(inputs))])
        kept = np.concatenate(
            [leaf[replicate].ravel() for leaf in masking.prunable_leaves(ends[2].networks.mask)]
        )
        assert values[kept].min() >= values[~kept].max() - 1e-6 * values.max()


def test_learning_rate_rewinding_keeps_the_weights_and_fine_tuning_the_last_rate():
    fields = {"optimizer.schedule": "step", "optimizer.milestones": (1,), "epochs": 2}
    for method in ("lrr", "finetune"):
        experiment, ends = tiny_rounds(method, **fields)
        for earlier, later in itertools.pairwise(ends):
            weights = masking.apply(earlier.networks.trained["params"], later.networks.mask)
            assert_trees_equal(later.networks.initial["params"], weights)
        rates = experiment.learning_rates
        assert rates[-1, -1] == pytest.approx(rates[0, 0] / 10)
        expected = np.full_like(rates, rates[-1, -1]) if method == "finetune" else rates
        np.testing.assert_array_equal(experiment.learning_rates_in(0), rates)
        np.testing.assert_array_equal(experiment.learning_rates_in(1), expected)


def test_fine_tuning_takes_steps_at_the_last_rate():
    """Gradient descent on the whole training set, in NumPy at the last rate of the schedule."""
    fields = {
        "optimizer.name": "sgd",
        "optimizer.schedule": "step",
        "optimizer.milestones": (1,),
        "epochs": 2,
        "batch_size": 46,
    }
    experiment, ends = tiny_rounds("finetune", **fields)
    networks = ends[1].networks
    images, labels = experiment.dataset.train
    params = take_member(networks.initial["params"], 0)
    for _ in range(2):
        gradients = jax.grad(lambda p: training.loss_fn(p, {}, images, labels, spec=experiment.spec)[0])(params)
        mask = take_member(networks.mask, 0)
        params = jax.tree.map(
            lambda p, g, m: p - np.where(m, experiment.learning_rates[-1, -1] * g, 0), params, gradients, mask
        )
    trained = take_member(networks.trained["params"], 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), trained, params)


@pytest.mark.parametrize("method", ["oneshot", "snip", "finetune"])
def test_methods_resume_to_the_bit(tmp_path, method):
    config = methods.apply(make_tiny_config(epochs=1, **{"instability.rounds": ()}), method)
    dataset = make_tiny_dataset()
    whole, resumed = (tmp_path / name for name in ("whole", "resumed"))
    runs.run(config, whole, dataset=dataset)
    while True:
        with contextlib.suppress(Stopped):
            runs.run(config, resumed, StopsAtFirstCheck(), dataset=dataset)
            break
    with contextlib.closing(Checkpoints(whole)) as a, contextlib.closing(Checkpoints(resumed)) as b:
        for number in range(3):
            assert_trees_equal(a.restore(number), b.restore(number))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pruning.steps": 100}, "pruning.steps is 100; pruning.network is 'trained', so it should be 1"),
        ({"pruning.scope": "erk"}, "pruning.scope is 'erk'; .* so it should be global or layer"),
        (
            {"pruning.network": "dense", "pruning.scope": "layer"},
            "pruning.scope is 'layer'; .* should be global",
        ),
        ({"pruning.network": "dense", "rewind_step": None}, "rewind_step is None; .* so it should be a step"),
        ({"pruning.network": "initial", "repulsion.strength": 2.0}, "repulsion.strength is 2; .* should be 0"),
        ({"optimizer.finetune": True}, "optimizer.finetune is True; rewind_step is 0.* so it should be False"),
        ({"pruning.network": "last"}, "it should be trained, dense or initial"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        configs.validate(make_tiny_config(**fields))
    assert "\n" not in str(error.value)
