"""The lock of a workdir, and the files that identify its run."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from imp_jax import config_files
from imp_jax.errors import UserError
from imp_jax.workdir.files import check_workdir_path, write_atomically
from imp_jax.workdir.results import recorded_rounds

_DATASET_FILE = "dataset.json"

_CONFIG_PATH, CONFIG_COPY = "config_file.txt", "config_file.py"  # path and copy of the file given by --config

_LOCK_TIMEOUT_S = 1.0  # `experiments.run status` takes the lock for a moment to test whether it is free


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike, config: ConfigDict) -> Iterator[Path]:
    """Lock `path` as the workdir of this config, creating it if needed.

    The operating system releases the lock when the process ends.

    Raises:
      UserError: the workdir cannot be written or read back; it holds a run of another config (the message lists
        the differences) or results without a config; or another process has locked it. Existing files are
        not changed in these cases.
    """
    workdir = Path(path)
    check_workdir_path(workdir)
    _refuse_other_run(workdir, config)
    try:
        for folder in ("figures", "checkpoints"):
            (workdir / folder).mkdir(parents=True, exist_ok=True)
        lock = FileLock(workdir / ".lock", thread_local=False)  # another thread may release it
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except Timeout as error:
        raise UserError(
            f"{lock_owner(workdir)} is writing to {workdir}; wait for it to end, or give another --workdir"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror}") from error
    try:
        _refuse_other_run(workdir, config)  # another process may have come first
        _write_to_workdir(workdir / ".holder", f"process {os.getpid()} on {socket.gethostname()}")
        _write_to_workdir(workdir / "config.json", config_files.to_json(config))
        yield workdir
    finally:
        with contextlib.suppress(OSError):
            (workdir / ".holder").unlink()
        lock.release()


def require_same_dataset(workdir: Path, identity: dict[str, Any]) -> None:
    """Check that a data set has the `Dataset.identity` of the one with which a workdir was begun.

    Raises:
      UserError: another number of images or other classes.
    """
    try:
        stored = json.loads((workdir / _DATASET_FILE).read_text())
    except (OSError, ValueError):  # a new workdir, or one of an earlier version
        return
    if stored == identity:
        return
    stored_text, given_text = (
        "{train_examples:,} training and {test_examples:,} test images of {num_classes} classes".format(
            **fields
        )
        for fields in (stored, identity)
    )
    if stored_text == given_text:
        new_class = next(name for name in identity["classes"] if name not in stored["classes"])
        given_text = f"as many of other classes, such as {new_class},"
    raise UserError(
        f"{workdir} was begun with another data set: {stored_text} there, and {given_text} here; give another "
        f"--workdir"
    )


def store_dataset(workdir: Path, identity: dict[str, Any]) -> None:
    """Store `Dataset.identity` in a workdir, for `require_same_dataset`."""
    _write_to_workdir(workdir / _DATASET_FILE, json.dumps(identity, indent=2) + "\n")


def store_config_file(workdir: Path, config_file: str) -> None:
    """Store the absolute path of the config file, as given by --config, and a copy of the file.

    `imp_jax.analysis` executes the file at that path, never the copy, which is only to be read. Once rounds are
    recorded, the copy is no longer replaced; a config file that differs from it is reported on stderr.
    """
    path, colon, argument = config_file.partition(":")
    _write_to_workdir(workdir / _CONFIG_PATH, f"{Path(path).absolute()}{colon}{argument}\n")
    copy = workdir / CONFIG_COPY
    try:
        text = Path(path).read_bytes()
    except OSError:  # the file may have been moved since it was executed
        return
    if not copy.exists() or not recorded_rounds(workdir):
        _write_to_workdir(copy, text)
    elif copy.read_bytes() != text:
        print(
            f"{path} has changed since the rounds in {workdir} were trained; {copy} is a copy of the earlier "
            f"text; give another --workdir if the model or the data set has changed",
            file=sys.stderr,
        )


def stored_config(workdir: Path) -> ConfigDict:
    """Return the config of a workdir. Raises a UserError if the folder is not the workdir of a run."""
    path = workdir / "config.json"
    try:
        return config_files.from_json(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {path} as a config: {error}") from error


def stored_config_file(workdir: Path, existing: bool = False) -> str | None:
    """Return the --config that `store_config_file` stored, with an absolute path; None if there is none.

    With `existing`, also return None if there is no file at that path.
    """
    try:
        config_file = (workdir / _CONFIG_PATH).read_text().rstrip("\n")
    except OSError:
        return None
    return config_file if not existing or Path(config_file.partition(":")[0]).is_file() else None


def lock_owner(workdir: Path) -> str:
    """Describe the process that has locked a workdir."""
    try:
        return (workdir / ".holder").read_text()
    except OSError:  # the owner has not yet written its name, or is exiting
        return "another process"


def _write_to_workdir(path, content):
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write to workdir {path.parent}: {error.strerror}") from error


def _refuse_other_run(workdir, config):
    stored = workdir / "config.json"
    if stored.exists():
        try:
            differences = config_files.differences(config, json.loads(stored.read_text()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read {stored} as a config; repair it, or give another --workdir"
            ) from error
        if differences:
            raise UserError(
                f"{workdir} holds a run of another config: {'; '.join(differences)}; give another --workdir"
            )
    elif (workdir / "results.csv").exists() or any(workdir.glob("checkpoints/*")):
        raise UserError(f"{workdir} holds results but no config.json; give another --workdir")
