"""execution.json: the execution mode and the kernels that a run was begun with."""

import json
import os
import sys
from pathlib import Path

from imp_jax.experiment import Experiment
from imp_jax.runtime import distributed
from imp_jax.runtime.execution import ExecutionMode
from imp_jax.workdir.files import write_atomically

_CONVOLUTIONS = {  # in words; the later ones are faster on a CPU
    "flax": "the convolutions of Flax",
    "xla": "convolutions by XLA in forms for a CPU",
    "onednn": "convolutions by oneDNN",
}


def restore_execution(experiment: Experiment, workdir: str | os.PathLike) -> Experiment:
    """Return the experiment with the execution that a workdir was begun with, if this machine has it.

    Else, and in a new workdir, with the one that `setup` has chosen; a change is reported on stderr.
    """
    chosen = experiment.spec.execution
    try:
        stored = ExecutionMode(**json.loads(_execution_file(workdir).read_text()))
    except (OSError, ValueError, TypeError):  # a new workdir, or one of an earlier version
        stored = chosen
    possible = ("xla", "onednn") if chosen.convolutions == "onednn" else (chosen.convolutions,)
    if stored.convolutions not in possible:
        if distributed.is_primary():
            before = _CONVOLUTIONS.get(stored.convolutions, stored.convolutions)
            why = "are slow" if stored.convolutions == "flax" else "cannot be used"
            print(
                f"{workdir} was begun with {before}, which {why} here: it goes on with "
                f"{_CONVOLUTIONS[chosen.convolutions]}, and results differ by rounding",
                file=sys.stderr,
            )
        stored = chosen
    return _with_execution(experiment, stored)


def agree_on_execution(experiment: Experiment) -> Experiment:
    """Return the experiment with convolutions that all processes have; all of them have to call this."""
    execution, order = experiment.spec.execution, list(_CONVOLUTIONS)
    common = order[-distributed.global_max(-order.index(execution.convolutions))]
    return _with_execution(experiment, execution._replace(convolutions=common))


def _with_execution(experiment, execution):
    return experiment._replace(spec=experiment.spec._replace(execution=execution))


def store_execution(experiment: Experiment, workdir: str | os.PathLike) -> None:
    """Store the execution mode in a workdir, next to config.json, for `restore_execution`."""
    content = json.dumps(experiment.spec.execution._asdict(), indent=2) + "\n"
    write_atomically(_execution_file(workdir), content)


def _execution_file(workdir):
    return Path(workdir) / "execution.json"


def describe_execution(execution: ExecutionMode) -> str:
    """The convolutions and the mode of a run, for the terminal; empty where Flax computes all of them."""
    if execution.convolutions == "flax":
        return ""
    return f"{_CONVOLUTIONS[execution.convolutions]}; execution {execution.mode}"
