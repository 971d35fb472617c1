"""How steps and members become programs, on functions with a closed form."""

import threading
import time
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from imp_jax import models
from imp_jax.errors import UserError
from imp_jax.models.fast_cpu import convolution, use_kernels
from imp_jax.runtime import compilation
from imp_jax.runtime.compilation import compile_seconds, enable_compilation_cache
from imp_jax.runtime.execution import (
    EXECUTION_MODES,
    ExecutionMode,
    choose_execution,
    python_loop,
    stack_step_outputs,
    vmap_or_unroll_members,
)
from imp_jax.workdir.execution import describe_execution, restore_execution, store_execution


class Network(nn.Module):
    """A user's own, of plain Flax layers."""

    groups: int = 1

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(images)), (2, 2), (2, 2))
        x = nn.Conv(6, (3, 3), feature_group_count=self.groups)(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


def chosen(model, execution="auto", dtype="float32"):
    model = models.find(model)() if isinstance(model, str) else model
    return choose_execution(execution, dtype, model, (16, 16, 3))


def test_the_execution_suits_the_convolutions_of_a_model(monkeypatch):
    monkeypatch.setattr(convolution, "has_onednn", lambda dtype: dtype == "float32")
    monkeypatch.setattr(compilation, "xla_keeps_optimization_barriers", lambda: True)
    assert chosen("lenet") == (True, False, "flax")  # scan, vmap
    assert chosen("conv4") == chosen(Network()) == (True, True, "onednn")
    assert chosen(Network(groups=2)) == (False, True, "onednn")  # the grouped one is slow in a loop
    assert chosen("conv4", "step_vmap") == (False, False, "onednn")
    assert chosen("conv4", dtype="bfloat16") == (True, True, "xla")
    monkeypatch.setattr(compilation, "xla_keeps_optimization_barriers", lambda: False)
    assert chosen("lenet") == (True, False, "flax")
    assert chosen(Network()) == (False, True, "onednn")  # a program a step
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen("conv4") == chosen(Network(groups=2)) == (True, True, "flax")
    with pytest.raises(UserError, match=r"execution is 'scan'; it should be one of auto, scan_vmap"):
        chosen("lenet", "scan")
    assert [EXECUTION_MODES[name].mode for name in EXECUTION_MODES] == list(EXECUTION_MODES)


def test_convolutions_do_not_depend_on_where_programs_are_kept(tmp_path, programs_not_kept):
    """A sweep names a folder, a command by hand none; programs with oneDNN are not written to it."""
    by_hand = chosen(Network())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    jax.jit(lambda x: x * 3)(1.0)
    written = len(list(tmp_path.glob("*-cache")))
    assert written > 0
    assert chosen(Network()) == by_hand
    if by_hand.convolutions != "onednn":
        pytest.skip("this XLA was built without oneDNN")
    with warnings.catch_warnings(), use_kernels("onednn"):
        warnings.simplefilter("error")  # JAX warns of a program that it cannot write
        jax.jit(lambda x: Network().init_with_output(jax.random.key(0), x)[0])(jnp.zeros((1, 4, 4, 3)))
    assert len(list(tmp_path.glob("*-cache"))) == written


def test_a_workdir_goes_on_with_the_execution_it_was_begun_with(tiny_experiment, tmp_path, capsys):
    def recalled(convolutions, scan=True):
        mode = ExecutionMode(scan=scan, unroll=True, convolutions=convolutions)
        experiment = tiny_experiment()
        experiment = experiment._replace(spec=experiment.spec._replace(execution=mode))
        return restore_execution(experiment, tmp_path)

    assert recalled("onednn").spec.execution == (True, True, "onednn")  # nothing is stored
    store_execution(recalled("xla", scan=False), tmp_path)
    assert recalled("onednn").spec.execution == (False, True, "xla")
    store_execution(recalled("flax"), tmp_path / ".")
    assert "was begun with convolutions by XLA" in capsys.readouterr().err
    assert recalled("onednn").spec.execution == (True, True, "onednn")  # a GPU's, on a CPU
    store_execution(recalled("onednn"), tmp_path)
    capsys.readouterr()
    assert recalled("onednn").spec.execution == (True, True, "onednn")
    assert capsys.readouterr().err == ""
    assert recalled("xla").spec.execution == (True, True, "xla")
    assert capsys.readouterr().err == (
        f"{tmp_path} was begun with convolutions by oneDNN, which cannot be used on this machine; it "
        "continues with convolutions by XLA in forms for a CPU, and results differ by rounding\n"
    )
    (tmp_path / "execution.json").write_text('{"scan": true, "future": 1}')
    assert recalled("xla").spec.execution == (True, True, "xla")
    assert describe_execution(ExecutionMode()) == ""
    assert describe_execution(ExecutionMode(unroll=True, convolutions="onednn")) == (
        "convolutions by oneDNN; execution scan_unroll"
    )


def test_compilation_is_timed_once_and_in_its_own_thread():
    @jax.jit
    def inner(x):
        time.sleep(0.2)  # traced within the other
        return x + 1

    @jax.jit
    def outer(x):
        time.sleep(0.1)
        return inner(x) * 2

    x = jnp.ones(3)
    before, start = compile_seconds(), time.perf_counter()
    outer(x)
    taken, wall = compile_seconds() - before, time.perf_counter() - start
    assert 0.3 <= taken <= wall
    before = compile_seconds()
    outer(x)
    assert compile_seconds() == before
    thread = threading.Thread(target=jax.jit(lambda x: x - 1), args=[x])
    thread.start()
    thread.join()
    assert compile_seconds() == before


def test_what_a_barrier_keeps_is_computed_once():
    """Without the options XLA computes the sines again for the second reader, transposed."""

    def function(x):
        y = jax.lax.optimization_barrier(jnp.sin(x))
        return y + 1, y.T

    def sines(program):
        return program.lower(jnp.ones((8, 9))).compile().as_text().count("sine(")

    assert (
        compilation.xla_keeps_optimization_barriers()
    )  # or trainings with convolutions are slow: see choose_execution
    assert sines(compilation.jit_with_backend_options(function)) == 1
    assert sines(jax.jit(function)) >= 1


def test_programs_are_kept_in_a_folder_for_the_processor(tmp_path, monkeypatch, programs_not_kept):
    def raise_no_home(path):
        raise RuntimeError("Could not determine home directory.")

    def kept():
        enable_compilation_cache()
        return jax.config.jax_compilation_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert kept() is None  # there is no place
    with monkeypatch.context() as homeless:
        homeless.delenv("XDG_CACHE_HOME")
        homeless.setattr(Path, "expanduser", raise_no_home)
        assert kept() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(kept())
    assert folder.parent == tmp_path / "imp_jax"
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (folder / name).touch()

    def names():
        return sorted(path.name for path in folder.iterdir() if path.name != ".lockfile")

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation, "_LOCK_TIMEOUT_S", 0.1)
    with FileLock(folder / ".lockfile"):  # of a process that is writing "torn"
        kept()
    assert names() == ["torn-cache", "whole-atime", "whole-cache"]
    jax.config.update("jax_compilation_cache_dir", None)
    kept()
    assert names() == ["whole-atime", "whole-cache"]
    jax.config.update("jax_compilation_cache_dir", "the user's own")
    assert kept() == "the user's own"


@pytest.mark.parametrize("name", EXECUTION_MODES)
def test_a_function_of_a_member_is_one_of_all(name):
    def function(weights, image, absent):
        assert absent is None
        return {"product": weights["kernel"] @ image}

    kernels = np.arange(12.0).reshape(2, 3, 2)
    of_all = vmap_or_unroll_members(function, (0, None, 0), EXECUTION_MODES[name])
    products = jax.jit(of_all)({"kernel": kernels}, jnp.array([1.0, 10.0]), None)["product"]
    np.testing.assert_array_equal(products, [[10, 32, 54], [76, 98, 120]])


def test_steps_follow_each_other():
    states, metrics = python_loop(lambda state, by: (state + by, {"was": state}), jnp.array(1.0), [(2,), (3,)])
    assert states == 6
    np.testing.assert_array_equal(metrics["was"], [1, 3])
    np.testing.assert_array_equal(
        stack_step_outputs(iter([jnp.array([1, 2]), jnp.array([3, 4])])), [[1, 2], [3, 4]]
    )
