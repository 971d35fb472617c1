import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import config as configs
from imp_jax import models
from imp_jax.config import UserError


def lenet(**overrides):
    config = configs.default()
    config.update(overrides)
    model = models.create(config, num_classes=10)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]


def test_lenet_has_the_parameters_of_table_1():
    _, params = lenet()
    assert (
        sum(p.size for p in jax.tree.leaves(params))
        == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
        == 266_610
    )


def test_lenet_starts_kaiming_uniform_with_zero_biases():
    _, params = lenet()
    for layer in params.values():
        limit = np.sqrt(6 / layer["kernel"].shape[0])  # gain √2: variance 2 / fan-in, uniform
        assert 0.99 * limit < np.abs(layer["kernel"]).max() <= limit
        assert np.var(layer["kernel"]) == pytest.approx(limit**2 / 3, rel=0.1)
        np.testing.assert_array_equal(layer["bias"], 0)


def test_bfloat16_computes_in_bf16_on_float32_parameters():
    model, params = lenet(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert model.apply({"params": params}, jnp.ones((2, 28, 28, 1))).dtype == jnp.bfloat16


def test_unknown_model_is_said_with_a_suggestion():
    with pytest.raises(UserError, match=r"model.name is 'lenett'; .* \(did you mean lenet\?\)"):
        lenet(model={"name": "lenett"})
