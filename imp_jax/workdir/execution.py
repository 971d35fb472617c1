"""execution.json: the execution mode and the convolutions with which a run was begun."""

import json
import os
import sys
from pathlib import Path

from imp_jax.experiment import Experiment
from imp_jax.runtime import distributed
from imp_jax.runtime.execution import ExecutionMode
from imp_jax.workdir.files import write_atomically

_CONVOLUTIONS = {  # descriptions, from slow to fast on a CPU; those of a GPU last
    "flax": "the convolutions of Flax",
    "xla": "convolutions by XLA in forms for a CPU",
    "onednn": "convolutions by oneDNN",
    "grouped": "grouped convolutions of all members",
    "per_member": "convolutions of one member at a time",
}
_POSSIBLE = {  # which stored convolutions are kept, by those that this machine would choose
    "flax": ("flax",),
    "xla": ("xla",),
    "onednn": ("xla", "onednn"),
    "grouped": ("flax", "grouped", "per_member"),
    "per_member": ("flax", "grouped", "per_member"),
}


def restore_execution(experiment: Experiment, workdir: str | os.PathLike) -> Experiment:
    """Return the experiment with the execution mode stored in its workdir, if this machine supports it.

    Otherwise, and for a new workdir, keep the mode that `setup` chose. A change is reported on stderr.
    """
    chosen = experiment.spec.execution
    try:
        stored = ExecutionMode(**json.loads(_execution_file(workdir).read_text()))
    except (OSError, ValueError, TypeError):  # a new workdir, or one of an earlier version
        stored = chosen
    if stored.convolutions not in _POSSIBLE[chosen.convolutions]:
        if distributed.is_primary():
            previous = _CONVOLUTIONS.get(stored.convolutions, stored.convolutions)
            reason = "are slow" if stored.convolutions == "flax" else "cannot be used"
            print(
                f"{workdir} was begun with {previous}, which {reason} on this machine; "
                f"{_CONVOLUTIONS[chosen.convolutions]} are used instead, and results differ by rounding",
                file=sys.stderr,
            )
        stored = chosen
    return _with_execution(experiment, stored)


def agree_on_execution(experiment: Experiment) -> Experiment:
    """Return the experiment with the fastest convolutions that all processes support. Collective."""
    execution, order = experiment.spec.execution, list(_CONVOLUTIONS)
    common = order[-distributed.global_max(-order.index(execution.convolutions))]
    return _with_execution(experiment, execution._replace(convolutions=common))


def _with_execution(experiment, execution):
    return experiment._replace(spec=experiment.spec._replace(execution=execution))


def store_execution(experiment: Experiment, workdir: str | os.PathLike) -> None:
    """Store the execution mode in a workdir, next to config.json, for `restore_execution`."""
    content = json.dumps(experiment.spec.execution._asdict(), indent=2) + "\n"
    write_atomically(_execution_file(workdir), content)


def has_execution(workdir: str | os.PathLike) -> bool:
    """Return whether an execution mode is stored in a workdir."""
    return _execution_file(workdir).exists()


def _execution_file(workdir):
    return Path(workdir) / "execution.json"


def describe_execution(execution: ExecutionMode) -> str:
    """Describe the convolutions and the execution mode of a run; "" if Flax computes the convolutions."""
    if execution.convolutions == "flax":
        return ""
    return f"{_CONVOLUTIONS[execution.convolutions]}; execution {execution.mode}"
