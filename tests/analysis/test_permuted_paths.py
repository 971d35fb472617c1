"""The analysis permuted_paths: a permuted copy of a network has no barrier after matching."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis, data, masking, models
from imp_jax.analysis import permuted_paths
from imp_jax.analysis.registry import NetworkInputs, RunInputs
from imp_jax.experiment import setup
from imp_jax.members import Member
from imp_jax.permutations import align, from_orders, permute
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.numpy_lenet import compute_errors_on_path

RESNET = {"model.name": "resnet8", "model.width": 0.5, "model.norm_affine": True}


def draw_variables(model, image_shape, seed):
    """Draw variables in which no leaf is constant, statistics included."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if "var" in str(path):
            return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        scale = np.sqrt(2 / max(1, np.prod(leaf.shape[:-1])))
        return (scale * generator.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, models.shapes(model, image_shape))


def permute_units(spec, variables, seed):
    """Permute the units of all groups at random."""
    generator = np.random.default_rng(seed)
    orders = {group: generator.permutation(size) for group, size in spec.sizes.items()}
    permutations = from_orders(spec, orders, *variables.values())
    return {name: permute(tree, permutations) for name, tree in variables.items()}


def make_inputs(experiment, config, networks, table=None):
    """Make the inputs of a run whose rounds have these variables: {round: {(arm, replicate): variables}}."""
    empty = pd.DataFrame(columns=analysis.ANALYSES["permuted_paths"].columns)
    loaded = []

    def load_round(number):
        loaded.append(number)
        by_member = {}
        for (arm, replicate), variables in networks[number].items():
            state = {name: tree for name, tree in variables.items() if name != "params"}
            params = variables["params"]
            mask = masking.ones_like(params)
            by_member[Member(arm, replicate)] = NetworkInputs(
                params=params,
                initial=params,
                mask=mask,
                model_state=state,
                initial_state=state,
                arm=arm,
                replicate=replicate,
                round=number,
                threshold=0.1,
                config=config,
                networks=by_member,
                get_experiment=lambda: experiment,
            )
        return by_member

    rounds = {number: tuple(Member(*key) for key in members) for number, members in networks.items()}
    table = empty if table is None else table
    inputs = RunInputs(
        pd.DataFrame(), {"permuted_paths": table}, config, rounds, None, lambda: experiment, load_round
    )
    return inputs, loaded


def compute(inputs):
    return analysis.ANALYSES["permuted_paths"].make_table(permuted_paths.compute_permuted_paths(inputs))


@functools.cache
def make_experiment():
    config = make_tiny_config()
    return setup(config, make_tiny_dataset(), use_mesh=False), config


@pytest.mark.parametrize("resnet", [False, True])
def test_a_permuted_copy_has_no_barrier_after_matching(resnet):
    """Also with normalisation statistics, which are permuted too and estimated again on the path."""
    images = np.random.default_rng(2).integers(0, 256, (60, 8, 8, 1), np.uint8)
    config = make_tiny_config(**(RESNET if resnet else {}))

    def set_up(labels):
        dataset = data.from_arrays(images, labels, images, labels, num_classes=3)
        return setup(config, dataset, use_mesh=False)

    spec = set_up(np.zeros(60, np.int32)).spec
    model, imp = spec.model, draw_variables(spec.model, (8, 8, 1), 0)
    # the classes that imp predicts with the statistics of these images, so that its error is 0
    logits, _ = model.apply(imp, spec.normalize(images), train=True, mutable=["batch_stats"])
    output = imp["params"][max(name for name in imp["params"] if name.startswith("Dense"))]
    output["bias"] -= logits.mean(0)  # otherwise most images are of one class
    experiment = set_up(np.asarray((logits - logits.mean(0)).argmax(1), np.int32))
    copy = permute_units(model.permutation_spec(), imp, 1)
    networks = {0: {("imp", 0): imp, ("reinit", 0): copy}}
    (row,) = compute(make_inputs(experiment, config, networks)[0]).itertuples()
    assert (row.replicate, row.kind, row.replicate_b, row.round) == (0, "reinit", 0, 0)
    assert row.barrier > 0.05
    assert row.matched_barrier == pytest.approx(0, abs=1e-6)
    assert row.matched_loss_barrier == pytest.approx(0, abs=1e-4)
    jax.tree.map(np.testing.assert_array_equal, align(model.permutation_spec(), imp, copy), imp)


def test_barriers_match_numpy():
    experiment, config = make_experiment()
    spec = experiment.spec.model.permutation_spec()
    drawn = {key: draw_variables(experiment.spec.model, (4, 4, 1), i) for i, key in enumerate(range(3))}
    networks = {3: {("imp", i): variables for i, variables in drawn.items()}}
    table = compute(make_inputs(experiment, config, networks)[0])
    assert list(zip(table["replicate"], table["replicate_b"], table["kind"], strict=True)) == [
        (0, 1, "replicate"),
        (1, 2, "replicate"),
    ]
    test = make_tiny_dataset().test
    for row in table.itertuples():
        first, second = (drawn[i] for i in (row.replicate, row.replicate_b))
        matched = align(spec, first, second)
        for end, value in ((second, row.barrier), (matched, row.matched_barrier)):
            errors = compute_errors_on_path(first["params"], end["params"], test.images, test.labels, 11)
            assert value == pytest.approx(errors.max() - (errors[0] + errors[-1]) / 2, abs=1e-6)


def test_only_missing_pairs_of_every_third_round_are_computed():
    experiment, config = make_experiment()
    drawn = [draw_variables(experiment.spec.model, (4, 4, 1), seed) for seed in range(2)]
    networks = {n: {("imp", 0): drawn[0], ("reinit", 0): drawn[1]} for n in range(4)}
    inputs, loaded = make_inputs(experiment, config, networks)
    table = compute(inputs)
    assert loaded == list(table["round"]) == [0, 3]
    inputs, loaded = make_inputs(experiment, config, {3: networks[3]}, table)
    pd.testing.assert_frame_equal(compute(inputs), table)  # also rows of deleted rounds
    assert not loaded


def test_networks_that_are_not_finite_are_not_matched():
    experiment, config = make_experiment()
    first, second = (draw_variables(experiment.spec.model, (4, 4, 1), seed) for seed in range(2))
    second["params"]["Dense_1"]["kernel"][0, 0] = np.nan
    networks = {0: {("imp", 0): first, ("reinit", 0): second}}
    (row,) = compute(make_inputs(experiment, config, networks)[0]).itertuples()
    assert np.isnan(row.matched_barrier)


class WithoutSpec(nn.Module):
    num_classes: int


def test_models_without_known_units_and_branches_without_imp_have_no_rows(monkeypatch):
    experiment, config = make_experiment()
    drawn = draw_variables(experiment.spec.model, (4, 4, 1), 0)
    inputs, loaded = make_inputs(experiment, config, {0: {("reinit", 0): drawn}})
    assert not len(compute(inputs))
    with config.unlocked():
        config = config.copy_and_resolve_references()
    monkeypatch.setitem(models.MODELS, "without_spec", WithoutSpec)
    for name in ("without_spec", "not_registered"):
        config.model.name = name
        networks = {0: {("imp", 0): drawn, ("reinit", 0): drawn}}
        inputs, loaded = make_inputs(None, config, networks)  # the experiment is not needed
        assert not len(compute(inputs))
        assert not loaded


def test_the_sentence_compares_barriers_before_and_after_matching():
    rows = [
        {"kind": kind, "round": number, "barrier": before, "matched_barrier": after}
        for kind, number, before, after in [("reinit", 0, 0.4, 0.3), ("reinit", 8, 0.2, 0.15)]
    ]
    results = pd.DataFrame({"round": range(9), "density": 0.8 ** np.arange(9)})
    text = permuted_paths.describe_permuted_paths(pd.DataFrame(rows), results)
    assert text == (
        "Weight matching changes the error barrier between IMP and random reinitialisation from 40.0 to 30.0 "
        "points at 100 % density and from 20.0 to 15.0 points at 17 % density."
    )
    nan = pd.DataFrame(rows[:1]).assign(matched_barrier=np.nan)
    assert permuted_paths.describe_permuted_paths(nan, results) == ""
