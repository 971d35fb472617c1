"""Compilation: compiler options, the persistent compilation cache, and the time that compiling takes."""

import contextlib
import functools
import hashlib
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from filelock import FileLock, Timeout

from imp_jax.errors import one_line

_LOCK_TIMEOUT_S = 10  # the same as in JAX
# With XLA's defaults, the host of a GPU launches every kernel of a step that contains a convolution. With these
# options, a loop over steps is one CUDA graph.
_GRAPH_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,"
    "CONDITIONAL,WHILE,CONVOLUTION",
    "xla_gpu_graph_min_graph_size": 1,
}


def enable_compilation_cache() -> None:
    """Turn on JAX's persistent compilation cache, of at most 1 GiB, unless the user has configured one.

    The folder in ~/.cache depends on the processor, because nodes that share a home directory may differ in it.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    processor = describe_processor()
    with contextlib.suppress(OSError, RuntimeError):  # no home directory, or a read-only one
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = home / "imp_jax" / hashlib.sha256(processor.encode()).hexdigest()[:8]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        # JAX stops writing if a process died between the two files of a program; this is JAX's own lock
        with contextlib.suppress(Timeout), FileLock(folder / ".lockfile", timeout=_LOCK_TIMEOUT_S):
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
                    program.unlink()
        jax.config.update("jax_compilation_cache_max_size", 2**30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # there are many small programs
        jax.config.update("jax_compilation_cache_dir", str(folder))


def describe_processor() -> str:
    """Return the kind of processor, with the instructions that it has if they are known."""
    processor = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next(line for line in lines if line.startswith(("flags", "Features")))
    return processor


def jit_with_backend_options(
    function: Callable[..., Any],
    *,
    ynnpack_reductions: bool = True,
    platform: str | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """`jax.jit(function, **options)` with the compiler options of a platform.

    Args:
      ynnpack_reductions: whether YNNPACK may compute reductions on a CPU. XLA then chooses it by the size of
        the array, and its sums differ in rounding. With it ResNet-20 trains in 0.8 of the time, LeNet in the
        same.
      platform: "cpu" or "gpu", for which the function is compiled; None: that of this process, whose backend is
        initialised.
    """
    platform = platform or jax.default_backend()
    return jax.jit(function, compiler_options=_compiler_options(platform, ynnpack_reductions), **options)


class _CompileSpans(threading.local):
    """The times at which this thread traced and compiled: disjoint pairs of start and end, in s."""

    def __init__(self):
        self.spans = []
        self.waited_s = 0.0

    def record(self, event: str, start: float, end: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            while self.spans and self.spans[-1][0] >= start:  # nested inside the new span
                self.spans.pop()
            self.spans.append((start, end))


_compile_spans = _CompileSpans()
jax.monitoring.register_event_time_span_listener(_compile_spans.record)


def compile_seconds() -> float:
    """Return the time, in s, that this thread has spent on tracing and compiling so far."""
    return _compile_spans.waited_s + sum(end - start for start, end in _compile_spans.spans)


def add_compile_seconds(seconds: float) -> None:
    """Count a time, in s, for which this thread waited while another one compiled for it."""
    _compile_spans.waited_s += seconds


@functools.cache
def _compiler_options(platform, ynnpack_reductions):
    """Return compiler options that speed up programs; {} for platforms other than "cpu" and "gpu".

    On a CPU, XLA's defaults (1) send convolutions to YNNPACK, whose weight gradients take twice as long, and
    (2) remove `optimization_barrier`s before fusion, so that a value with two consumers, such as the residual
    stream, is recomputed. For a GPU, see `_GRAPH_OPTIONS`.
    """
    if platform == "gpu":
        is_set_by_user = "xla_gpu_enable_command_buffer" in os.environ.get("XLA_FLAGS", "")
        use_graphs = not is_set_by_user and (jax.default_backend() != "gpu" or _gpu_captures_loops())
        return _GRAPH_OPTIONS if use_graphs else {}
    if platform != "cpu":
        return {}
    # for YNNPACK; the default includes INDIVIDUAL_CONVOLUTION
    kinds = ("INDIVIDUAL_DOT", "REDUCE") if ynnpack_reductions else ("INDIVIDUAL_DOT",)
    options = {
        "xla_cpu_experimental_ynn_fusion_type": ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds),
        "xla_disable_hlo_passes": "cse_barrier_expander",
    }
    try:
        jax.jit(jnp.negative, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:  # this version of XLA does not know one of the options
        return {}
    return options


@functools.cache
def _gpu_captures_loops():
    """Return whether this GPU executes a loop over convolutions as a CUDA graph; if not, say so on stderr."""

    def step(kernel, _):
        def loss(kernel):
            outputs = jax.lax.conv_general_dilated(kernel, kernel, (1, 1), "SAME")
            return jnp.sum(jax.lax.conv_general_dilated(outputs, kernel, (1, 1), "SAME"))

        return kernel - jax.grad(loss)(kernel), None

    def loop(kernels):
        return [jax.lax.scan(step, kernel, length=2)[0] for kernel in kernels]

    try:
        kernels = [jnp.zeros((8, 8, 3, 3), dtype) for dtype in ("float32", "bfloat16")]
        jax.block_until_ready(jax.jit(loop, compiler_options=_GRAPH_OPTIONS)(kernels))
    except jax.errors.JaxRuntimeError as error:
        print(
            f"this GPU cannot execute an epoch as one CUDA graph, so kernels are launched one by one: "
            f"{one_line(error)}",
            file=sys.stderr,
        )
        return False
    return True


@functools.cache
def xla_keeps_optimization_barriers() -> bool:
    """Return whether `optimization_barrier`s are still in a compiled program, as our compiler options ask."""
    program = jit_with_backend_options(lambda x: jax.lax.optimization_barrier(2 * x) + 1)
    return "opt-barrier" in program.lower(1.0).compile().as_text()
