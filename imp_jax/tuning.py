"""Choose how steps and members are compiled by timing a few steps of each mode: `execution=tune`."""

import contextlib
import hashlib
import json
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from imp_jax import __version__, imp, models
from imp_jax.errors import UserError
from imp_jax.experiment import Experiment
from imp_jax.runtime import compilation, devices
from imp_jax.runtime.execution import ExecutionMode
from imp_jax.workdir.files import write_atomically

STEPS = 20  # of a timing
REPEATS = 3  # timings, after one that compiles
_LOCK_TIMEOUT_S = 10


def tune_execution(experiment: Experiment) -> Experiment:
    """Return the experiment with the fastest mode of its device, and print the times of all.

    Times `STEPS` steps of all members in each mode of `list_modes`. The times are stored beside the compiled
    programs, and serve every later experiment of the same network, members and batches on such a device.

    Raises:
      UserError: several processes train together, which could choose differently; or the data set is streamed.
    """
    reason = None
    if jax.process_count() > 1:
        reason = "several processes train together, which could choose different modes"
    if not experiment.dataset.train.in_memory:
        reason = f"the images of {experiment.name} are streamed, so that the times are those of decoding"
    if reason:
        raise UserError(f"execution is 'tune'; {reason}, and it should be auto or the name of a mode")
    key = _describe_setting(experiment)
    times = _read_times().get(key)
    if times is None:
        times = [[list(mode), time_mode(experiment, mode)] for mode in list_modes(experiment.spec.execution)]
        _store_times(key, times)
    seconds = {ExecutionMode(*mode): s for mode, s in times}
    fastest = min(seconds, key=seconds.__getitem__)
    steps = ", ".join(f"{_name(mode)} {1e3 * s:,.2f}" for mode, s in seconds.items())
    print(f"milliseconds per step: {steps}; {_name(fastest)} is used")
    return experiment._replace(spec=experiment.spec._replace(execution=fastest))


def list_modes(chosen: ExecutionMode) -> list[ExecutionMode]:
    """Return the modes that may be the fastest where `auto` is `chosen`, which is the first of them."""
    if chosen.convolutions in ("per_member", "grouped"):
        modes = [ExecutionMode(convolutions=name) for name in ("per_member", "grouped")]
        modes.append(ExecutionMode(unroll=True, convolutions="per_member"))
    elif chosen.convolutions == "flax":
        # step by step means that the network has convolutions that are slow in a loop
        modes = [chosen._replace(unroll=unroll) for unroll in (False, True)] if chosen.scan else []
    else:
        modes = [chosen._replace(scan=scan) for scan in (True, False)]
    return list(dict.fromkeys([chosen, *modes]))


def time_mode(experiment: Experiment, mode: ExecutionMode) -> float:
    """Return the seconds of a step of all members in a mode, without compilation: the best of `REPEATS`."""
    rates = experiment.learning_rates[:1, :STEPS]
    experiment = experiment._replace(
        spec=experiment.spec._replace(execution=mode),
        learning_rates=rates,
        finetunes=False,
        rewind_step=0,
        saved_steps=frozenset(),
        evaluate_epochs=False,
    )
    seconds = []
    for _ in range(1 + REPEATS):
        seconds.append(imp.train(experiment, 0, imp.init_state(experiment)).seconds)
    return min(seconds[1:]) / rates.size


def _name(mode):
    return "grouped" if mode.convolutions == "grouped" else mode.mode


def _describe_setting(experiment):
    """Return a digest of all that the times of steps depend on."""
    spec, mesh = experiment.spec, experiment.spec.mesh
    image_shape = experiment.dataset.train.image_shape
    # the state shows which optimizer it is; the object has no description
    opt_state = jax.eval_shape(spec.optimizer.init, models.shapes(spec.model, image_shape)["params"])
    setting = (
        spec.model,
        image_shape,
        jax.tree.structure(opt_state),
        len(experiment.members),
        (spec.batch_size, spec.accumulate_steps, spec.norm_parts, spec.augmentation),
        (bool(spec.repulsion_strength), spec.matmul_precision),
        list_modes(spec.execution),
        mesh and dict(mesh.shape),
        (jax.devices()[0].device_kind, devices.available_cores(), compilation.describe_processor()),
        (jax.__version__, __version__),
    )
    return hashlib.sha256(repr(setting).encode()).hexdigest()


def _times_file():
    """Return the file of all times, in the folder of JAX's compilation cache; None if there is no cache."""
    folder = jax.config.jax_compilation_cache_dir
    return Path(folder) / "execution_times.json" if folder else None


def _read_times():
    with contextlib.suppress(OSError, ValueError):
        if path := _times_file():
            return json.loads(path.read_text())
    return {}


def _store_times(key, times):
    with contextlib.suppress(OSError, Timeout):  # a read-only folder, or one without locks
        if path := _times_file():
            with FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S):  # another process may store its own
                write_atomically(path, json.dumps(_read_times() | {key: times}, indent=2) + "\n")
