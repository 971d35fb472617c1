"""One orbax checkpoint per round: the round is on disk whole, or not at all."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

import imp_jax
from imp_jax.config import UserError
from imp_jax.masking import Mask
from imp_jax.training import Variables

FORMAT = 1  # of a checkpoint; raised whenever one of before could no longer be read


class Round(NamedTuple):
    """What a round leaves behind; every leaf leads with the members, arm by arm as in `config.arms`."""

    initial: Variables  # θ⊙m the training started from; with rewind_step=k, the dense network's at step k
    trained: Variables
    mask: Mask


class Checkpoints:
    """The folder `checkpoints` of a workdir: step n holds round n's `Round` and its rows of results.csv.

    The rows travel inside the checkpoint, so that a run that died between the two loses neither; so do the
    number of the format and the version of the package that wrote it.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._manager = ocp.CheckpointManager(
            (Path(workdir) / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(create=False),  # to read must not make folders
            item_handlers={
                "networks": ocp.StandardCheckpointHandler(),
                "rows": ocp.JsonCheckpointHandler(),
                "version": ocp.JsonCheckpointHandler(),
            },
        )

    def rounds(self) -> list[int]:
        """The rounds that are safely on disk, in order.

        Raises:
          UserError: one of them has a format that this version does not know.
        """
        rounds = sorted(self._manager.all_steps())
        for number in rounds:
            item = ocp.args.Composite(version=ocp.args.JsonRestore())
            try:
                version = self._manager.restore(number, args=item)["version"]
                found = version["format"], f"format {version['format']}, of imp_jax {version['imp_jax']}"
            except (KeyError, FileNotFoundError):
                found = None, "no format number"
            if found[0] != FORMAT:
                raise UserError(
                    f"the checkpoint {self._manager.directory / str(number)} has {found[1]}; this is imp_jax "
                    f"{imp_jax.__version__}, which reads format {FORMAT}"
                )
        return rounds

    def save(self, number: int, networks: Round, rows: list[dict[str, Any]]) -> None:
        """Write round `number`; when this returns, it is on disk under its final name."""
        version = {"format": FORMAT, "imp_jax": imp_jax.__version__}
        items = {
            "networks": ocp.args.StandardSave(networks._asdict()),
            "rows": ocp.args.JsonSave(rows),
            "version": ocp.args.JsonSave(version),
        }
        self._manager.save(number, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def restore(self, number: int) -> Round:
        """The networks of round `number`, on the default device whatever devices wrote them."""
        metadata = self._manager.item_metadata(number)["networks"]
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), metadata.tree)
        item = self._manager.restore(number, args=ocp.args.Composite(networks=ocp.args.StandardRestore(target)))
        return Round(**jax.tree.map(jax.numpy.asarray, item["networks"]))

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The rows of results.csv that belong to round `number`."""
        return self._manager.restore(number, args=ocp.args.Composite(rows=ocp.args.JsonRestore()))["rows"]

    def close(self) -> None:
        self._manager.close()
