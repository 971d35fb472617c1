"""How steps and members become programs, on functions with a closed form."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import config as configs
from imp_jax import execution, models
from imp_jax.config import UserError
from imp_jax.execution import EXECUTIONS, choose_execution, collect, keep_programs, over_members, step_by_step


def test_members_with_convolutions_are_unrolled(monkeypatch):
    def chosen(name, execution="auto"):
        config = configs.default()
        config.execution = execution
        return choose_execution(config, models.shapes(models.find(name)(), (32, 32, 3))["params"])

    monkeypatch.setattr(execution, "_keeps_barriers", lambda: True)
    assert chosen("lenet") == (True, False)  # scan, vmap
    assert chosen("conv4") == chosen("resnet20") == (True, True)
    assert chosen("conv4", "step_unroll") == (False, True)
    monkeypatch.setattr(execution, "_keeps_barriers", lambda: False)
    assert chosen("lenet") == (True, False)
    assert chosen("conv4") == chosen("resnet20") == (False, True)  # a program a step
    with pytest.raises(UserError, match=r"execution is 'scan'; it should be one of auto, scan_vmap"):
        chosen("lenet", "scan")


def test_what_a_barrier_keeps_is_computed_once():
    """Without the options XLA computes the sines again for the second reader, transposed."""

    def function(x):
        y = jax.lax.optimization_barrier(jnp.sin(x))
        return y + 1, y.T

    def sines(program):
        return program.lower(jnp.ones((8, 9))).compile().as_text().count("sine(")

    assert execution._keeps_barriers()  # or trainings with convolutions are slow: see choose_execution
    assert sines(execution.alone(function).program()) == 1
    assert sines(jax.jit(function)) >= 1


def test_programs_are_kept_in_a_folder_for_the_processor(tmp_path, monkeypatch, programs_not_kept):
    def raise_no_home(path):
        raise RuntimeError("Could not determine home directory.")

    def kept(name):
        config = configs.default()
        config.model.name = name
        keep_programs(config)
        return jax.config.jax_compilation_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert kept("lenet") is None  # there is no place
    with monkeypatch.context() as homeless:
        homeless.delenv("XDG_CACHE_HOME")
        homeless.setattr(Path, "expanduser", raise_no_home)
        assert kept("lenet") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept("conv4") is None  # a CPU's convolutions
    folder = Path(kept("lenet"))
    assert folder.parent == tmp_path / "imp_jax"
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (folder / name).touch()
    jax.config.update("jax_compilation_cache_dir", None)
    kept("lenet")
    assert sorted(path.name for path in folder.iterdir()) == ["whole-atime", "whole-cache"]
    jax.config.update("jax_compilation_cache_dir", "the user's own")
    assert kept("lenet") == "the user's own"


@pytest.mark.parametrize("name", EXECUTIONS)
def test_a_function_of_a_member_is_one_of_all(name):
    def function(weights, image, absent):
        assert absent is None
        return {"product": weights["kernel"] @ image}

    kernels = np.arange(12.0).reshape(2, 3, 2)
    of_all = over_members(function, (0, None, 0), EXECUTIONS[name])
    products = jax.jit(of_all)({"kernel": kernels}, jnp.array([1.0, 10.0]), None)["product"]
    np.testing.assert_array_equal(products, [[10, 32, 54], [76, 98, 120]])


def test_steps_follow_each_other():
    states, metrics = step_by_step(lambda state, by: (state + by, {"was": state}), jnp.array(1.0), [(2,), (3,)])
    assert states == 6
    np.testing.assert_array_equal(metrics["was"], [1, 3])
    np.testing.assert_array_equal(collect(iter([jnp.array([1, 2]), jnp.array([3, 4])])), [[1, 2], [3, 4]])
