"""How steps, members and devices become programs: many steps in one or a program each, one copy or several."""

import contextlib
import functools
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict

from imp_jax import models
from imp_jax.config import choose, validate
from imp_jax.devices import MEMBER


class Execution(NamedTuple):
    """How members and steps become programs; results differ by rounding only."""

    scan: bool = True  # all steps of an epoch in one program, or a program a step
    unroll: bool = False  # members one after the other in a program, or vmapped


EXECUTIONS = {
    "scan_vmap": Execution(scan=True, unroll=False),
    "scan_unroll": Execution(scan=True, unroll=True),
    "step_vmap": Execution(scan=False, unroll=False),
    "step_unroll": Execution(scan=False, unroll=True),
}


def choose_execution(config: ConfigDict, params: PyTree[jax.ShapeDtypeStruct]) -> Execution:
    """What `config.execution` says; `auto` is a scan over vmapped members, for convolutional networks unrolled.

    Under vmap over kernels a convolution becomes a grouped one, whose gradients are slow on a CPU at the
    paper's batch sizes; that a GPU does not like them either is assumed. Where a CPU's XLA does not keep the
    barriers of `models.convolution`, its convolutions are slow in a loop: there each step is a program.

    Raises:
      UserError: an unknown name.
    """
    auto = "scan_vmap"
    if has_convolutions(params):
        auto = "scan_unroll" if jax.default_backend() != "cpu" or _keeps_barriers() else "step_unroll"
    options = {"auto": EXECUTIONS[auto], **EXECUTIONS}
    return choose(options, "execution", config.execution)


def has_convolutions(params: PyTree[jax.ShapeDtypeStruct]) -> bool:
    """Whether some of these weights are kernels of images."""
    return any(leaf.ndim == 4 for leaf in jax.tree.leaves(params))


def keep_programs(config: ConfigDict) -> None:
    """Have what this process compiles for a config kept on disk, up to a GiB, for the next one.

    JAX's own setting, such as JAX_COMPILATION_CACHE_DIR, goes first. Else the folder is one in ~/.cache for
    processors like this, as nodes that share a home may differ; and a CPU's programs with convolutions, which
    cannot be kept (`models.convolution`), are not.

    Raises:
      UserError: see `config.validate` and `models.find`.
    """
    validate(config)
    model = models.find(config.model.name)()
    if jax.config.jax_compilation_cache_dir is not None or (
        jax.default_backend() == "cpu" and has_convolutions(models.shapes(model, (32, 32, 3))["params"])
    ):
        return
    processor = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next(line for line in lines if line.startswith(("flags", "Features")))
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one that cannot be written to
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = home / "imp_jax" / hashlib.sha256(processor.encode()).hexdigest()[:8]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for program in folder.glob("*-cache"):  # JAX writes no more where a process has died before its time
            if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
                program.unlink()
        jax.config.update("jax_compilation_cache_max_size", 2**30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # of small programs there are many
        jax.config.update("jax_compilation_cache_dir", str(folder))


def alone(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` as a program of its own; its `program()` is what `jax.jit` makes of it."""

    @functools.cache
    def program():  # not before its first call: the options depend on the device
        return jax.jit(function, compiler_options=_compiler_options(), **options)

    def call(*args, **kwargs):
        return program()(*args, **kwargs)

    call.program = program
    return call


@functools.cache
def _compiler_options():
    """What XLA on a CPU would do worse by itself.

    It hands convolutions to YNNPACK, whose weight gradients take twice the time. And it drops barriers before
    it fuses: what is read twice is computed twice, a network's residual stream again and again.
    """
    if jax.default_backend() != "cpu":
        return {}
    kinds = ("INDIVIDUAL_DOT", "REDUCE")  # what YNNPACK is left: by default INDIVIDUAL_CONVOLUTION too
    options = {
        "xla_cpu_experimental_ynn_fusion_type": ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds),
        "xla_disable_hlo_passes": "cse_barrier_expander",
    }
    try:
        jax.jit(jnp.negative, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:  # an experimental option: this XLA does not know it
        return {}
    return options


@functools.cache
def _keeps_barriers():
    program = alone(lambda x: jax.lax.optimization_barrier(2 * x) + 1).program()
    return "opt-barrier" in program.lower(1.0).compile().as_text()


def step_by_step(
    step: Callable[..., tuple[PyTree, PyTree]], states: PyTree, inputs: Iterable[tuple]
) -> tuple[PyTree, PyTree]:
    """`step(states, *inputs)` again and again, a program each; the metrics are stacked as by a scan."""

    def all_metrics():
        nonlocal states
        for step_inputs in inputs:
            states, metrics = step(states, *step_inputs)
            yield metrics

    metrics = collect(all_metrics())
    return states, metrics


def collect(outputs: Iterable[PyTree]) -> PyTree:
    """The outputs of programs started one after the other, stacked; two at most are under way."""
    collected = []
    for output in outputs:
        collected.append(output)
        if len(collected) > 1:  # or the host would run ahead, and batches pile up on the device
            jax.block_until_ready(collected[-2])
    stack = np.stack if jax.process_count() == 1 else jnp.stack
    return jax.tree.map(lambda *parts: stack(parts), *collected)


def over_devices(
    function: Callable[..., PyTree], in_specs: tuple[P, ...], mesh: Mesh | None
) -> Callable[..., PyTree]:
    """`function` on each device's part of its arguments; the outputs lead with members."""
    if mesh is None:
        return function
    options = {"in_specs": in_specs, "out_specs": P(MEMBER)}
    # unchecked: gradients stay those of a device's own images until the step takes their mean
    return jax.shard_map(function, mesh=mesh, check_vma=False, **options)


def over_members(
    function: Callable[..., PyTree], in_axes: tuple[int | None, ...], execution: Execution
) -> Callable[..., PyTree]:
    """`function` of one member as a function of all, which lead the arguments whose axis is 0."""
    if not execution.unroll:
        return jax.vmap(function, in_axes)

    def unrolled(*arguments):
        def of_member(i):
            return [
                jax.tree.map(lambda leaf: leaf[i], argument) if axis == 0 else argument
                for argument, axis in zip(arguments, in_axes, strict=True)
            ]

        members = len(jax.tree.leaves(arguments[0])[0])
        outputs = [function(*of_member(i)) for i in range(members)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    return unrolled
