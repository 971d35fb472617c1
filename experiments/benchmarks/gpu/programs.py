"""Compile the training program of a config for a GPU, on a machine without one."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from experiments.benchmarks.gpu.hlo import UnknownTextError
from experiments.sweeps.datasets import DATASET_SIZES, STREAMED_DATASETS
from imp_jax import data, imp, training
from imp_jax.data.dataset import EpochInMemory
from imp_jax.data.streaming import StreamedBatch
from imp_jax.experiment import setup
from imp_jax.runtime.execution import ExecutionMode


class CompiledProgram(NamedTuple):
    """A training program, as the compiler describes it."""

    hlo: str  # optimized HLO
    thunks: str  # the order in which the host launches it
    peak_bytes: int  # with the data set in memory, without the workspaces of cuDNN and cuBLAS


def compile_training(
    config: ConfigDict, members: int, execution: ExecutionMode, device: jax.Device
) -> CompiledProgram:
    """Compile an epoch of `members` networks of a config, or a step if its data set is streamed.

    Args:
      config: modified in place; all members become replicates of imp.
      device: see `targets.make_device`.

    Raises:
      UnknownTextError: XLA did not write the thunk sequence of the program.
    """
    program, arguments, spec = _training_program(config, members, execution)
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
    )
    with tempfile.TemporaryDirectory() as folder:
        # without optimisation of machine code, which nobody executes
        options = {"xla_dump_to": folder, "xla_backend_optimization_level": 0}
        compiled = program.lower(*arguments, spec=spec).compile(compiler_options=options)
        thunks = [path.read_text() for path in Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")]
    if len(thunks) != 1:
        raise UnknownTextError(f"XLA wrote {len(thunks)} thunk sequences instead of one")
    return CompiledProgram(compiled.as_text(), thunks[0], compiled.memory_analysis().peak_memory_in_bytes)


def _training_program(config, members, execution):
    """Return a jitted function for GPUs, the shapes of its arguments, and its spec."""
    examples, image_shape, num_classes = DATASET_SIZES[config.dataset.name]
    config.arms, config.replicates, config.instability.rounds = ("imp",), members, ()
    streamed = config.dataset.name in STREAMED_DATASETS
    augmentation = () if streamed else data.DEFAULT_AUGMENTATION.get(config.dataset.name, ())
    # one batch instead of the real set: the spec depends on the shape of an image only
    images = np.random.default_rng(0).integers(0, 256, (config.batch_size, *image_shape), np.uint8)
    labels = np.arange(config.batch_size) % num_classes
    dataset = data.from_arrays(
        *(images, labels, images[:2], labels[:2]), num_classes=num_classes, augmentation=augmentation
    )
    experiment = setup(config, dataset, use_mesh=False)
    spec = experiment.spec._replace(execution=execution)
    experiment = experiment._replace(spec=spec)

    def init():
        state = imp.init_state(experiment)
        return training.init_states(state.tickets, state.masks, spec=spec), state.masks

    shape = jax.ShapeDtypeStruct
    states, masks = jax.eval_shape(init)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), members))
    dropout_keys = keys if spec.rng_streams else None
    jitted = training.programs(execution.unroll, "gpu")
    if streamed:
        batch = StreamedBatch(
            shape((members, config.batch_size, *image_shape), np.uint8),
            shape((members, config.batch_size), np.int32),
        )
        number, rate = shape((), np.int32), shape((), np.float32)
        return jitted.step, (states, masks, batch, number, rate, None, dropout_keys), spec
    split = data.InMemory(shape((examples, *image_shape), np.uint8), shape((examples,), np.int32))
    epoch = EpochInMemory(split, shape((members, examples), np.int32), keys)
    rates = shape((examples // config.batch_size,), np.float32)
    return jitted.scan_steps, (states, masks, epoch, shape((), np.int32), rates, None, dropout_keys), spec
