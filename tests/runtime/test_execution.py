"""Execution modes and compilation, on functions with a known result."""

import functools
import json
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
    """A network of a user, of plain Flax layers."""

    groups: int = 1

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(images)), (2, 2), (2, 2))
        x = nn.Conv(6, (3, 3), feature_group_count=self.groups)(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


def choose(model, execution="auto", dtype="float32", platform="cpu"):
    model = models.find(model)() if isinstance(model, str) else model
    return choose_execution(execution, dtype, model, (16, 16, 3), platform)


def test_auto_execution_depends_on_the_convolutions_of_a_model(monkeypatch):
    monkeypatch.setattr(convolution, "has_onednn", lambda dtype: dtype == "float32")
    monkeypatch.setattr(compilation, "xla_keeps_optimization_barriers", lambda: True)
    assert choose("lenet") == (True, False, "flax")  # scan, vmap
    assert choose("conv4") == choose(Network()) == (True, True, "onednn")
    assert choose(Network(groups=2)) == (False, True, "onednn")  # the grouped one is slow in a loop
    assert choose("conv4", "step_vmap") == (False, False, "onednn")
    assert choose("conv4", dtype="bfloat16") == (True, True, "xla")
    monkeypatch.setattr(compilation, "xla_keeps_optimization_barriers", lambda: False)
    assert choose("lenet") == (True, False, "flax")
    assert choose(Network()) == (False, True, "onednn")  # one program per step
    with pytest.raises(UserError, match=r"execution is 'scan'; it should be one of auto, tune, scan_vmap"):
        choose("lenet", "scan")
    with pytest.raises(UserError, match=r"execution is 'grouped'; it should be one of auto, .* step_unroll$"):
        choose("conv4", "grouped")
    assert [EXECUTION_MODES[name].mode for name in EXECUTION_MODES] == list(EXECUTION_MODES)


def test_execution_on_a_gpu_vmaps_members_but_not_their_convolutions():
    on_gpu = functools.partial(choose, platform="gpu")
    assert on_gpu("lenet") == (True, False, "flax")
    assert on_gpu("conv4") == on_gpu(Network()) == (True, False, "per_member")
    assert on_gpu("conv4", "grouped") == (True, False, "grouped")
    assert on_gpu("conv4", "step_unroll") == (False, True, "per_member")
    assert on_gpu(Network(groups=2)) == (True, True, "per_member")  # vmap would make the grouped one slow
    with pytest.raises(UserError, match=r"execution is 'grouped'; it should be one of auto"):
        on_gpu("lenet", "grouped")


def test_the_compilation_cache_does_not_change_the_convolutions(tmp_path, programs_not_kept):
    """They are the same with a cache folder, as in a sweep. Programs with oneDNN are not written to it."""
    without_cache = choose(Network())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    jax.jit(lambda x: x * 3)(1.0)
    written = len(list(tmp_path.glob("*-cache")))
    assert written > 0
    assert choose(Network()) == without_cache
    if without_cache.convolutions != "onednn":
        pytest.skip("this XLA was built without oneDNN")
    with warnings.catch_warnings(), use_kernels("onednn"):
        warnings.simplefilter("error")  # JAX warns about programs that it cannot write
        jax.jit(lambda x: Network().init_with_output(jax.random.key(0), x)[0])(jnp.zeros((1, 4, 4, 3)))
    assert len(list(tmp_path.glob("*-cache"))) == written


def test_a_resumed_workdir_keeps_its_execution(tiny_experiment, tmp_path, capsys):
    def restore(convolutions, scan=True):
        mode = ExecutionMode(scan=scan, unroll=True, convolutions=convolutions)
        experiment = tiny_experiment()
        experiment = experiment._replace(spec=experiment.spec._replace(execution=mode))
        return restore_execution(experiment, tmp_path)

    assert restore("onednn").spec.execution == (True, True, "onednn")  # nothing is stored
    store_execution(restore("xla", scan=False), tmp_path)
    assert restore("onednn").spec.execution == (False, True, "xla")
    store_execution(restore("flax"), tmp_path / ".")
    assert "was begun with convolutions by XLA" in capsys.readouterr().err
    assert restore("onednn").spec.execution == (True, True, "onednn")  # stored on a GPU, resumed on a CPU
    store_execution(restore("onednn"), tmp_path)
    capsys.readouterr()
    assert restore("onednn").spec.execution == (True, True, "onednn")
    assert capsys.readouterr().err == ""
    assert restore("xla").spec.execution == (True, True, "xla")
    assert capsys.readouterr().err == (
        f"{tmp_path} was begun with convolutions by oneDNN, which cannot be used on this machine; "
        "convolutions by XLA in forms for a CPU are used instead, and results differ by rounding\n"
    )
    (tmp_path / "execution.json").write_text('{"scan": true, "future": 1}')
    assert restore("xla").spec.execution == (True, True, "xla")
    for stored in ("per_member", "flax", "grouped"):  # each can be used where the others can
        mode = ExecutionMode(convolutions=stored)
        (tmp_path / "execution.json").write_text(json.dumps(mode._asdict()))
        assert restore("per_member").spec.execution == mode
    capsys.readouterr()
    assert restore("xla").spec.execution == (True, True, "xla")
    assert "was begun with grouped convolutions of all members, which cannot be used" in capsys.readouterr().err
    assert describe_execution(ExecutionMode()) == ""
    assert describe_execution(ExecutionMode(unroll=True, convolutions="onednn")) == (
        "convolutions by oneDNN; execution scan_unroll"
    )


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_that_cannot_capture_loops_is_reported_once(monkeypatch, capsys, works):
    """The probe is run on this CPU, where compiler options of a GPU have no effect."""
    compilation._gpu_captures_loops.cache_clear()
    compilation._compiler_options.cache_clear()
    assert "WHILE,CONVOLUTION" in compilation._compiler_options("gpu", True)["xla_gpu_enable_command_buffer"]
    compilation._compiler_options.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    if not works:

        def fail(*_, **options):
            assert options == {"compiler_options": compilation._GRAPH_OPTIONS}
            raise jax.errors.JaxRuntimeError("cannot capture\na convolution")

        monkeypatch.setattr(jax, "jit", fail)
    for _ in range(2):
        assert compilation._compiler_options("gpu", True) == (compilation._GRAPH_OPTIONS if works else {})
        compilation._compiler_options.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")  # the user's choice takes precedence
    assert compilation._compiler_options("gpu", True) == {}
    assert compilation._compiler_options("tpu", True) == {}
    compilation._compiler_options.cache_clear()
    compilation._gpu_captures_loops.cache_clear()
    error = capsys.readouterr().err
    assert error.count("this GPU cannot execute an epoch as one CUDA graph") == (not works)


def test_compile_seconds_count_nested_programs_once_and_one_thread():
    @jax.jit
    def inner(x):
        time.sleep(0.2)  # inside the tracing of `outer`
        return x + 1

    @jax.jit
    def outer(x):
        time.sleep(0.1)
        return inner(x) * 2

    x = jnp.ones(3)
    seconds, start = compile_seconds(), time.perf_counter()
    outer(x)
    compile_time, wall_time = compile_seconds() - seconds, time.perf_counter() - start
    assert 0.3 <= compile_time <= wall_time
    seconds = compile_seconds()
    outer(x)
    assert compile_seconds() == seconds
    thread = threading.Thread(target=jax.jit(lambda x: x - 1), args=[x])
    thread.start()
    thread.join()
    assert compile_seconds() == seconds


def test_a_value_behind_an_optimization_barrier_is_computed_once():
    """Without the compiler options XLA may compute the sines again for the transposed output."""

    def function(x):
        y = jax.lax.optimization_barrier(jnp.sin(x))
        return y + 1, y.T

    def count_sines(program):
        return program.lower(jnp.ones((8, 9))).compile().as_text().count("sine(")

    # if this fails, trainings with convolutions are slow: see `choose_execution`
    assert compilation.xla_keeps_optimization_barriers()
    assert count_sines(compilation.jit_with_backend_options(function)) == 1


def test_the_compilation_cache_is_a_folder_per_processor(tmp_path, monkeypatch, programs_not_kept):
    def raise_no_home(path):
        raise RuntimeError("Could not determine home directory.")

    def enable():
        enable_compilation_cache()
        return jax.config.jax_compilation_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert enable() is None  # the folder cannot be made
    with monkeypatch.context() as homeless:
        homeless.delenv("XDG_CACHE_HOME")
        homeless.setattr(Path, "expanduser", raise_no_home)
        assert enable() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(enable())
    assert folder.parent == tmp_path / "imp_jax"
    for name in ("complete-cache", "complete-atime", "partial-cache"):
        (folder / name).touch()

    def names():
        return sorted(path.name for path in folder.iterdir() if path.name != ".lockfile")

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation, "_LOCK_TIMEOUT_S", 0.1)
    with FileLock(folder / ".lockfile"):  # another process is writing "partial"
        enable()
    assert names() == ["complete-atime", "complete-cache", "partial-cache"]
    jax.config.update("jax_compilation_cache_dir", None)
    enable()
    assert names() == ["complete-atime", "complete-cache"]
    jax.config.update("jax_compilation_cache_dir", "the user's own")
    assert enable() == "the user's own"


@pytest.mark.parametrize("name", EXECUTION_MODES)
def test_a_function_of_one_member_is_mapped_over_all(name):
    def function(weights, image, absent):
        assert absent is None
        return {"product": weights["kernel"] @ image}

    kernels = np.arange(12.0).reshape(2, 3, 2)
    mapped = vmap_or_unroll_members(function, (0, None, 0), EXECUTION_MODES[name])
    products = jax.jit(mapped)({"kernel": kernels}, jnp.array([1.0, 10.0]), None)["product"]
    np.testing.assert_array_equal(products, [[10, 32, 54], [76, 98, 120]])


def test_python_loop_carries_the_state_and_stacks_the_outputs():
    states, metrics = python_loop(
        lambda state, step: (state + step, {"previous": state}), jnp.array(1.0), [(2,), (3,)]
    )
    assert states == 6
    np.testing.assert_array_equal(metrics["previous"], [1, 3])
    np.testing.assert_array_equal(
        stack_step_outputs(iter([jnp.array([1, 2]), jnp.array([3, 4])])), [[1, 2], [3, 4]]
    )
