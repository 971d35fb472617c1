"""The lock of a workdir, and the files that say which run it holds."""

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

_CONFIG_PATH, CONFIG_COPY = "config_file.txt", "config_file.py"  # in a workdir: of the file given by --config

_LOCK_TIMEOUT_S = 1.0  # `experiments.run status` takes the lock for an instant, to see whether it is free


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike, config: ConfigDict) -> Iterator[Path]:
    """Lock `path` as the workdir of this config, creating it if needed. The lock ends with the process.

    Raises:
      UserError: it cannot be written or read back; it holds a run of another config (the message has the
        differences) or results without a config; or another process has locked it. Existing files are then
        unchanged.
    """
    workdir = Path(path)
    check_workdir_path(workdir)
    _refuse_other_run(workdir, config)
    try:
        for folder in ("figures", "checkpoints"):
            (workdir / folder).mkdir(parents=True, exist_ok=True)
        # a lock of the operating system: released however the process ends
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
    """Refuse a data set that differs, by `Dataset.identity`, from the one that a workdir was begun with.

    Raises:
      UserError: another number of images or other classes.
    """
    try:
        stored = json.loads((workdir / _DATASET_FILE).read_text())
    except (OSError, ValueError):  # a new workdir, or one of an earlier version
        return
    if stored == identity:
        return
    there, here = (
        "{train_examples:,} training and {test_examples:,} test images of {num_classes} classes".format(**one)
        for one in (stored, identity)
    )
    if there == here:
        other = next(name for name in identity["classes"] if name not in stored["classes"])
        here = f"as many of other classes, such as {other},"
    raise UserError(
        f"{workdir} was begun with another data set: {there} there, and {here} here; give another --workdir"
    )


def store_dataset(workdir: Path, identity: dict[str, Any]) -> None:
    """Store `Dataset.identity` in a workdir, for `require_same_dataset`."""
    _write_to_workdir(workdir / _DATASET_FILE, json.dumps(identity, indent=2) + "\n")


def store_config_file(workdir: Path, config_file: str) -> None:
    """Store the absolute path of the config file, as given by --config, and a copy of its text.

    `imp_jax.analysis` executes the file at that path, never the copy, which is for readers. Once rounds are
    recorded the copy no longer changes; a config file with a different text is reported on stderr.
    """
    path, colon, argument = config_file.partition(":")
    _write_to_workdir(workdir / _CONFIG_PATH, f"{Path(path).absolute()}{colon}{argument}\n")
    copy = workdir / CONFIG_COPY
    try:
        text = Path(path).read_bytes()
    except OSError:  # it may have been moved since it was executed
        return
    if not copy.exists() or not recorded_rounds(workdir):
        _write_to_workdir(copy, text)
    elif copy.read_bytes() != text:
        print(
            f"{path} is another text than {workdir} was begun with, which {copy} keeps and the rounds on disk "
            f"are of; give another --workdir if its model or data set has changed",
            file=sys.stderr,
        )


def stored_config_file(workdir: Path, existing: bool = False) -> str | None:
    """What `store_config_file` was given, absolute; None if nothing, or with `existing` if no file is there."""
    try:
        config_file = (workdir / _CONFIG_PATH).read_text().rstrip("\n")
    except OSError:
        return None
    return config_file if not existing or Path(config_file.partition(":")[0]).is_file() else None


def lock_owner(workdir: Path) -> str:
    """Describe the process that has locked a workdir."""
    try:
        return (workdir / ".holder").read_text()
    except OSError:  # it is about to write its name, or to exit
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
            raise UserError(f"cannot read {stored} as a config; mend it, or give another --workdir") from error
        if differences:
            raise UserError(
                f"{workdir} holds a run of another config: {'; '.join(differences)}; give another --workdir"
            )
    elif (workdir / "results.csv").exists() or any(workdir.glob("checkpoints/*")):
        raise UserError(f"{workdir} holds results but no config.json to tell whose; give another --workdir")
