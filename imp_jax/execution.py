"""How steps, members and devices become programs: many steps in one or a program each, one copy or several."""

import contextlib
import functools
import hashlib
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock, Timeout
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict

from imp_jax import models
from imp_jax.config import choose
from imp_jax.devices import MEMBER
from imp_jax.models import convolution

_LOCK_TIMEOUT_S = 10  # that JAX waits for it too


class Execution(NamedTuple):
    """How members and steps become programs; results differ by rounding only."""

    scan: bool = True  # all steps of an epoch in one program, or a program a step
    unroll: bool = False  # members one after the other in a program, or vmapped
    convolutions: str = "flax"  # the implementation of a model's, see `models.convolution.convolutions_by`

    @property
    def mode(self) -> str:
        """The name in `EXECUTIONS` of how steps and members run."""
        return f"{'scan' if self.scan else 'step'}_{'unroll' if self.unroll else 'vmap'}"


EXECUTIONS = {
    "scan_vmap": Execution(scan=True, unroll=False),
    "scan_unroll": Execution(scan=True, unroll=True),
    "step_vmap": Execution(scan=False, unroll=False),
    "step_unroll": Execution(scan=False, unroll=True),
}


def choose_execution(config: ConfigDict, model: nn.Module, image_shape: tuple[int, int, int]) -> Execution:
    """Choose how a model's steps run on this machine, by `config.execution` and by the convolutions it has.

    `auto` scans over steps and vmaps members. Members with convolutions are unrolled: vmap over kernels makes
    grouped convolutions, whose gradients are slow (measured on a CPU, assumed on a GPU). On a CPU each step is
    a program of its own if some convolution would be slow in a loop: one that is not a plain `nn.Conv`, or any
    where XLA does not keep the barriers of `models.convolution`.

    On a CPU every plain `nn.Conv` is computed by oneDNN if this XLA has it, else by XLA in forms that are fast
    there. With oneDNN, what this process compiles is no longer written to JAX's compilation cache.

    Raises:
      UserError: an unknown name.
    """
    on_cpu = jax.default_backend() == "cpu"
    plain, others = count_convolutions(model, image_shape)
    auto = "scan_unroll" if plain or others else "scan_vmap"
    if on_cpu and (others or (plain and not _keeps_barriers())):
        auto = "step_unroll"
    execution = choose({"auto": EXECUTIONS[auto], **EXECUTIONS}, "execution", config.execution)
    if on_cpu and plain:
        implementation = "onednn" if convolution.has_onednn(config.dtype) else "xla"
        execution = execution._replace(convolutions=implementation)
    if execution.convolutions == "onednn":
        convolution.write_no_programs()
    return execution


def count_convolutions(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Count the convolutions of a model that `convolutions_by` takes over, and its others."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with convolution.convolutions_by("xla"):
        traced = jax.make_jaxpr(lambda variables, image: model.apply(variables, image, train=False))(
            models.shapes(model, image_shape), image
        )
    plain, all_of_them = (str(traced).count(text) for text in ("name=_convolve\n", "= conv_general_dilated["))
    return plain, all_of_them - plain


def keep_programs() -> None:
    """Turn on JAX's persistent compilation cache, of at most 1 GiB, unless the user has configured one.

    The folder is one in ~/.cache for processors like this, as nodes that share a home may differ.
    """
    if jax.config.jax_compilation_cache_dir is not None:
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
        # JAX writes no more where a process has died between the two files of a program; the lock is its own
        with contextlib.suppress(Timeout), FileLock(folder / ".lockfile", timeout=_LOCK_TIMEOUT_S):
            for program in folder.glob("*-cache"):
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


class _CompileSpans(threading.local):
    """When this thread traced and compiled, as pairs of start and end, in s, that do not overlap."""

    def __init__(self):
        self.spans = []

    def note(self, event: str, start: float, end: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            while self.spans and self.spans[-1][0] >= start:  # nested in this one
                self.spans.pop()
            self.spans.append((start, end))


_compile_spans = _CompileSpans()
jax.monitoring.register_event_time_span_listener(_compile_spans.note)


def compile_seconds() -> float:
    """Return how long this thread has traced and compiled programs so far, in s."""
    return sum(end - start for start, end in _compile_spans.spans)


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
