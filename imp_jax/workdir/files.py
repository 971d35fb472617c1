"""Writing files so that a crash leaves the old or the new one."""

import os
from pathlib import Path

from imp_jax.errors import UserError


def check_workdir_path(workdir: str | os.PathLike) -> None:
    """Refuse a workdir whose checkpoints Orbax could not read back, because it misinterprets the path.

    Raises:
      UserError: the absolute path contains a glob character, a backslash or gs:/, or is not UTF-8.
    """
    path = str(Path(workdir).absolute())
    wrong = [part for part in ("*", "?", "[", "\\", "gs:/") if part in path]
    if wrong or not _is_utf8(path):
        what = wrong[0] if wrong else "bytes that are not UTF-8"
        raise UserError(
            f"the workdir is {path!r}, with {what} in it, which Orbax cannot read back; give a --workdir on "
            f"this machine without any of * ? [ \\ in its path"
        )


def _is_utf8(path):
    try:
        return bool(path.encode())
    except UnicodeEncodeError:  # other bytes, as Python's surrogates
        return False


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary file, then rename it: a reader, or a crash, sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
