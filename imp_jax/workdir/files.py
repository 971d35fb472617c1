"""Atomic writes, and a check of the path of a workdir."""

import os
from pathlib import Path

from imp_jax.errors import UserError


def check_workdir_path(workdir: str | os.PathLike) -> None:
    """Check that Orbax can read what it writes to a workdir; it misinterprets some paths.

    Raises:
      UserError: the absolute path contains a glob character, a backslash or gs:/, or is not UTF-8.
    """
    path = str(Path(workdir).absolute())
    wrong = [part for part in ("*", "?", "[", "\\", "gs:/") if part in path]
    if wrong or not _is_utf8(path):
        cause = wrong[0] if wrong else "bytes that are not UTF-8"
        raise UserError(
            f"the workdir is {path!r}, with {cause} in it, which Orbax cannot read back; give a --workdir on "
            f"this machine without any of * ? [ \\ in its path"
        )


def _is_utf8(path):
    try:
        return bool(path.encode())
    except UnicodeEncodeError:  # Python represents other bytes by surrogates
        return False


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader, also after a crash, sees the complete old or the complete new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
