"""Learning rates (table 1) and optimizers against closed forms and optax."""

import jax
import numpy as np
import optax
import pytest

from imp_jax import config as configs
from imp_jax import optimizers
from imp_jax.config import UserError


def settings(**overrides):
    config = configs.default()
    config.update_from_flattened_dict(overrides)
    configs.validate(config)
    return config


def test_constant_schedule():
    rates = optimizers.learning_rates(settings(epochs=3, **{"optimizer.learning_rate": 12e-4}), 4)
    np.testing.assert_allclose(rates, np.full((3, 4), 12e-4), rtol=1e-6)


def test_step_schedule_divides_by_ten_from_each_milestone_on():
    config = settings(
        epochs=85,
        **{"optimizer.learning_rate": 0.1, "optimizer.schedule": "step", "optimizer.milestones": (56, 71)},
    )
    rates = optimizers.learning_rates(config, 390)
    np.testing.assert_allclose(rates[:56], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates[56:71], 0.01, rtol=1e-6)
    np.testing.assert_allclose(rates[71:], 0.001, rtol=1e-6)


def test_cosine_schedule_falls_from_the_base_rate_to_zero():
    config = settings(epochs=75, **{"optimizer.learning_rate": 0.01, "optimizer.schedule": "cosine"})
    rates = optimizers.learning_rates(config, 10).ravel()
    t = np.arange(750)
    np.testing.assert_allclose(rates, 0.01 * np.cos(np.pi * t / 1500) ** 2, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_multiplies_by_a_line_from_zero(schedule):
    without = settings(epochs=20, **{"optimizer.schedule": schedule})
    warm = settings(epochs=20, **{"optimizer.schedule": schedule, "optimizer.warmup_epochs": 10.0})
    ratio = optimizers.learning_rates(warm, 5) / optimizers.learning_rates(without, 5)
    np.testing.assert_allclose(ratio.ravel()[:50], np.arange(50) / 50, rtol=1e-5)
    np.testing.assert_allclose(ratio[10:], 1)


def test_unknown_schedule_and_optimizer():
    with pytest.raises(UserError, match=r"optimizer.schedule is 'stepp'.*did you mean step"):
        optimizers.learning_rates(settings(**{"optimizer.schedule": "stepp"}), 5)
    with pytest.raises(UserError, match=r"optimizer.name is 'adamw'.*adam, momentum, sgd"):
        optimizers.make_optimizer(settings(**{"optimizer.name": "adamw"}))


def test_adam_is_optax_adam():
    params = {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}
    ours, theirs = optimizers.adam(), optax.scale_by_adam()
    state, expected_state = ours.init(params), theirs.init(params)
    for step in range(50):
        scale = 10.0 ** (step % 9 - 6)  # of gradients beside which ε counts, too
        draws = jax.random.split(jax.random.key(step))
        gradients = {
            "kernel": scale * jax.random.normal(draws[0], (4, 3)),
            "bias": scale * jax.random.normal(draws[1], (3,)),
        }
        directions, state = ours.update(gradients, state, params)
        expected, expected_state = theirs.update(gradients, expected_state, params)
        for a, b in zip(*map(jax.tree.leaves, ((directions, state), (expected, expected_state))), strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-12)
    assert state.count == 50
