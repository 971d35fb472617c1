"""Learning rates (table 1) and optimizers, compared with closed forms and with optax."""

import functools

import jax
import numpy as np
import optax
import pytest

from imp_jax import config as configs
from imp_jax import masking, optimizers
from imp_jax.errors import UserError
from tests.helpers.epochs import learning_rates_of


def make_optimizer(config):
    fields = ("learning_rate", "momentum", "weight_decay")
    return optimizers.make_optimizer(config.optimizer.name, **{f: config.optimizer[f] for f in fields})


def make_config(**overrides):
    config = configs.default()
    config.update_from_flattened_dict(overrides)
    configs.validate(config)
    return config


def test_constant_schedule_has_the_base_rate():
    rates = learning_rates_of(make_config(epochs=3, **{"optimizer.learning_rate": 12e-4}), 4)
    np.testing.assert_allclose(rates, np.full((3, 4), 12e-4), rtol=1e-6)


def test_step_schedule_divides_by_ten_at_each_milestone():
    config = make_config(
        epochs=85,
        **{"optimizer.learning_rate": 0.1, "optimizer.schedule": "step", "optimizer.milestones": (56, 71)},
    )
    rates = learning_rates_of(config, 390)
    np.testing.assert_allclose(rates[:56], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates[56:71], 0.01, rtol=1e-6)
    np.testing.assert_allclose(rates[71:], 0.001, rtol=1e-6)


def test_cosine_schedule_falls_from_the_base_rate_to_zero():
    config = make_config(epochs=75, **{"optimizer.learning_rate": 0.01, "optimizer.schedule": "cosine"})
    rates = learning_rates_of(config, 10).ravel()
    t = np.arange(750)
    np.testing.assert_allclose(rates, 0.01 * np.cos(np.pi * t / 1500) ** 2, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_multiplies_the_schedule_by_a_line_from_zero(schedule):
    plain = make_config(epochs=20, **{"optimizer.schedule": schedule})
    warm = make_config(epochs=20, **{"optimizer.schedule": schedule, "optimizer.warmup_epochs": 10.0})
    ratio = learning_rates_of(warm, 5) / learning_rates_of(plain, 5)
    np.testing.assert_allclose(ratio.ravel()[:50], np.arange(50) / 50, rtol=1e-5)
    np.testing.assert_allclose(ratio[10:], 1)


def test_unknown_schedule_or_optimizer_is_rejected():
    with pytest.raises(UserError, match=r"optimizer.schedule is 'stepp'.*did you mean step"):
        learning_rates_of(make_config(**{"optimizer.schedule": "stepp"}), 5)
    with pytest.raises(UserError, match=r"optimizer.name is 'adamw'.*adam, momentum, sgd"):
        make_optimizer(make_config(**{"optimizer.name": "adamw"}))


def random_tree(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "kernel": scale * jax.random.normal(keys[0], (4, 3)),
        "bias": scale * jax.random.normal(keys[1], (3,)),
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "adam"}, optax.adam),
        ({"name": "momentum"}, lambda rate: optax.sgd(rate, momentum=0.9)),
        ({"name": "momentum", "momentum": 0.5}, lambda rate: optax.sgd(rate, momentum=0.5)),
        ({"name": "sgd"}, optax.sgd),
        ({"name": "sgd", "momentum": 0.5}, lambda rate: optax.sgd(rate, momentum=0.5)),
        ({"name": "decoupled"}, lambda rate: optax.adamw(rate, weight_decay=0.1)),
        ({"name": "injected"}, lambda rate: optax.adamw(rate, weight_decay=0.2)),
        ({"name": "rprop"}, optax.rprop),
    ],
)
def test_optimizers_make_the_updates_of_optax(monkeypatch, fields, expected):
    """Under jit and with a rate that changes at every step; some registered optimizers need the parameters."""
    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))
    optimizers.register("decoupled", functools.partial(optax.adamw, weight_decay=0.1))
    injected = functools.partial(optax.adamw, weight_decay=0.2)
    optimizers.register("injected", optax.inject_hyperparams(injected))
    optimizers.register("rprop", optax.rprop)
    fields["learning_rate"] = 0.1
    optimizer = make_optimizer(make_config(**{f"optimizer.{k}": v for k, v in fields.items()}))
    params = random_tree(99)
    mask = masking.ones_like(params)
    state, expected_params = optimizer.init(params), params
    expected_state = expected(0.1).init(params)
    update = jax.jit(optimizer.update)
    for step in range(5):
        gradients, rate = random_tree(step), 0.1 / (step + 1)
        updates, state = update(gradients, state, params, mask=mask, learning_rate=rate)
        params = optax.apply_updates(params, updates)
        updates, expected_state = expected(rate).update(gradients, expected_state, expected_params)
        expected_params = optax.apply_updates(expected_params, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), params, expected_params)


def test_weight_decay_is_added_to_the_gradient():
    optimizer = make_optimizer(make_config(**{"optimizer.name": "sgd", "optimizer.weight_decay": 0.5}))
    params, gradients = random_tree(0), random_tree(1)
    mask = masking.ones_like(params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, mask=mask, learning_rate=0.1)
    expected = jax.tree.map(lambda p, g: -0.1 * (g + 0.5 * p), params, gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected)


def test_momentum_is_rejected_for_adam():
    with pytest.raises(
        UserError, match=r"optimizer.momentum is 0.5; adam has no momentum, so it should be None"
    ):
        make_optimizer(make_config(**{"optimizer.momentum": 0.5}))


def test_register_requires_an_argument_called_learning_rate():
    with pytest.raises(UserError, match=r"'lion' takes \(lr\); it should take learning_rate by this name"):
        optimizers.register("lion", lambda lr: optax.lion(lr))


def test_milestone_after_the_last_step_is_rejected():
    config = make_config(epochs=1, **{"optimizer.schedule": "step", "optimizer.milestones": (0.99,)})
    with pytest.raises(UserError, match=r"last step of a training begins at epoch 0.875, so they should be"):
        learning_rates_of(config, 8)
    assert learning_rates_of(config, 100).ravel()[-1] == np.float32(1.2e-4)


def test_register_rejects_a_transform_with_a_fixed_learning_rate():
    """`config.optimizer.learning_rate` would have no effect."""
    with pytest.raises(UserError, match=r"'adamw' is a .*it should be a function of the learning rate"):
        optimizers.register("adamw", optax.adamw(1e-3))
