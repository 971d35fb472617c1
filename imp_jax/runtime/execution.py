"""How training steps are compiled.

One program per epoch (`lax.scan`) or per step; members vmapped or unrolled; sharded over a mesh.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from imp_jax import models
from imp_jax.errors import lookup
from imp_jax.models.fast_cpu import convolution, use_kernels
from imp_jax.runtime import compilation
from imp_jax.runtime.devices import MEMBER


class ExecutionMode(NamedTuple):
    """How steps and members are compiled. The results of all modes are equal up to rounding."""

    scan: bool = True  # all steps of an epoch in one program; False: one program per step
    unroll: bool = False  # members one after the other in a program; False: vmapped
    convolutions: str = "flax"  # the implementation of convolutions, see `models.kernels`

    @property
    def repeats_convolutions(self) -> bool:
        """Whether a program contains the convolutions of each member separately, so that it grows with them."""
        return self.unroll or self.convolutions == "per_member"

    @property
    def mode(self) -> str:
        """The name of this mode in `EXECUTION_MODES`."""
        return f"{'scan' if self.scan else 'step'}_{'unroll' if self.unroll else 'vmap'}"


EXECUTION_MODES = {
    "scan_vmap": ExecutionMode(scan=True, unroll=False),
    "scan_unroll": ExecutionMode(scan=True, unroll=True),
    "step_vmap": ExecutionMode(scan=False, unroll=False),
    "step_unroll": ExecutionMode(scan=False, unroll=True),
}


def choose_execution(
    name: str,
    dtype: str,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    platform: str | None = None,
) -> ExecutionMode:
    """Choose how a model is executed, from the name of a mode and the model's convolutions.

    `auto` scans over steps and vmaps members. Every plain `nn.Conv` is computed by the kernels of its platform:

    - On a GPU, members are vmapped, but cuDNN computes the convolutions of one member at a time; `grouped`
      calls it once for all members. vmap alone makes grouped convolutions whose weight gradients cuDNN does not
      know as such (see `models.fast_gpu.convolution`). Members are unrolled if a convolution is not plain.
    - On a CPU, oneDNN computes the convolutions if this build of XLA includes it, otherwise XLA in a form that
      is fast on a CPU. Members are unrolled. There is one program per step if a convolution would be slow in a
      loop: one that is not plain, or any if XLA removes the optimisation barriers of `models.fast_cpu`. With
      oneDNN, this process no longer writes to JAX's compilation cache.

    Args:
      name: `auto`, a key of `EXECUTION_MODES`, or on a GPU `grouped`; `tune` is `auto` here, until a run begins
        (see `imp_jax.tuning`).
      dtype: of the convolutions.
      platform: "cpu" or "gpu", on which the model is executed; None: that of this process.

    Raises:
      UserError: unknown `name`, or `grouped` where there is no plain convolution on a GPU.
    """
    on_cpu = (platform or jax.default_backend()) == "cpu"
    plain, others = count_convolutions(model, image_shape)
    if on_cpu:
        auto = "scan_unroll" if plain or others else "scan_vmap"
        if others or (plain and not compilation.xla_keeps_optimization_barriers()):
            auto = "step_unroll"
    else:
        auto = "scan_unroll" if others else "scan_vmap"
    modes = {"auto": EXECUTION_MODES[auto], "tune": EXECUTION_MODES[auto], **EXECUTION_MODES}
    if plain and not on_cpu:
        modes["grouped"] = EXECUTION_MODES["scan_vmap"]
    execution = lookup(modes, "execution", name)
    if not plain:
        return execution
    if not on_cpu:
        return execution._replace(convolutions="grouped" if name == "grouped" else "per_member")
    implementation = "onednn" if convolution.has_onednn(dtype) else "xla"
    if implementation == "onednn":
        convolution.disable_compilation_cache_writes()
    return execution._replace(convolutions=implementation)


def count_convolutions(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return the number of convolutions of a model with fast CPU kernels, and the number of others."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with use_kernels("xla"):
        traced = jax.make_jaxpr(lambda variables, image: model.apply(variables, image, train=False))(
            models.shapes(model, image_shape), image
        )
    plain, total = (str(traced).count(text) for text in ("name=_convolve\n", "= conv_general_dilated["))
    return plain, total - plain


def python_loop(
    step: Callable[..., tuple[PyTree, PyTree]], states: PyTree, inputs: Iterable[tuple]
) -> tuple[PyTree, PyTree]:
    """Call `step(states, *inputs)` for all inputs; like `lax.scan`, but one program per step."""

    def run_steps():
        nonlocal states
        for step_inputs in inputs:
            states, metrics = step(states, *step_inputs)
            yield metrics

    metrics = stack_step_outputs(run_steps())
    return states, metrics


def stack_step_outputs(outputs: Iterable[PyTree]) -> PyTree:
    """Stack the outputs of successive dispatches; block so that at most two are in flight."""
    collected = []
    for output in outputs:
        collected.append(output)
        if len(collected) > 1:  # otherwise the host runs ahead and batches pile up on the device
            jax.block_until_ready(collected[-2])
    stack = np.stack if jax.process_count() == 1 else jnp.stack
    return jax.tree.map(lambda *parts: stack(parts), *collected)


def shard_over_mesh(
    function: Callable[..., PyTree], in_specs: tuple[P, ...], mesh: Mesh | None
) -> Callable[..., PyTree]:
    """Apply `jax.shard_map`; all outputs are sharded along "member". Without a mesh return `function`."""
    if mesh is None:
        return function
    options = {"in_specs": in_specs, "out_specs": P(MEMBER)}
    # check_vma=False: gradients differ between devices until the step averages them
    return jax.shard_map(function, mesh=mesh, check_vma=False, **options)


def vmap_or_unroll_members(
    function: Callable[..., PyTree], in_axes: tuple[int | None, ...], execution: ExecutionMode
) -> Callable[..., PyTree]:
    """Map a function of one member over all members: by `jax.vmap`, or by a Python loop if `execution.unroll`.

    Args:
      in_axes: 0 for arguments with a member axis, None for others.
    """
    if not execution.unroll:
        return jax.vmap(function, in_axes)

    def unrolled(*arguments):
        def select_member(i):
            return [
                jax.tree.map(lambda leaf: leaf[i], argument) if axis == 0 else argument
                for argument, axis in zip(arguments, in_axes, strict=True)
            ]

        members = len(jax.tree.leaves(arguments[0])[0])
        outputs = [function(*select_member(i)) for i in range(members)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    return unrolled
