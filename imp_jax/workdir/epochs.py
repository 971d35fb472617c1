"""epochs.csv, one row per member, round and epoch, of rounds whose members are evaluated after every epoch."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from imp_jax.workdir.checkpoints import Checkpoints, DamagedError
from imp_jax.workdir.files import write_atomically
from imp_jax.workdir.results import Row

FIELDS = (
    "replicate",
    "arm",
    "round",
    "epoch",  # number of finished epochs of the round's training, from 1
    "test_loss",  # nats
    "test_accuracy",  # in [0, 1]
    "validation_loss",  # empty without a validation split
    "validation_accuracy",
)


class EpochResults:
    """Writes epochs.csv: adds the rows of a round after its checkpoint, which has them too, is on disk."""

    def __init__(self, workdir: Path, checkpoints: Checkpoints, results: Sequence[Row]):
        """Start from the rows of the rounds on disk; write the file if its content should be another.

        Rounds of `results`, the rows of results.csv, keep their rows of the file if their checkpoints are
        deleted or damaged. Rows of rounds that are not in `results` are dropped: these are trained again.
        """
        self._path = workdir / "epochs.csv"
        in_file = read_epochs(workdir)
        self._rows: list[Row] = []
        on_disk = checkpoints.rounds()
        for number in sorted({row["round"] for row in results}):
            rows = in_file[in_file["round"] == number].to_dict("records")
            if number in on_disk:
                with contextlib.suppress(DamagedError):
                    rows = checkpoints.epoch_rows(number)
            self._rows += rows
        self._write()

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of a round; they are on disk when this returns."""
        if rows:
            # a branch may train a round after later ones
            self._rows = sorted([*self._rows, *rows], key=lambda row: row["round"])
            self._write()

    def _write(self):
        table = pd.DataFrame(self._rows, columns=list(FIELDS))
        # nine digits distinguish any two values of float32
        content = table.to_csv(index=False, float_format="%.9g").encode()
        exists = self._path.exists()
        if (len(table) or exists) and not (exists and self._path.read_bytes() == content):
            write_atomically(self._path, content)


def read_epochs(workdir: Path) -> pd.DataFrame:
    """Return epochs.csv of a workdir as a table; empty if there is no file, or one that cannot be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        table = pd.read_csv(workdir / "epochs.csv")
        if set(FIELDS) <= set(table):
            return table[list(FIELDS)]
    return pd.DataFrame(columns=list(FIELDS))
