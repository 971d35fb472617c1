"""Checksums of checkpoints, to find damaged files and to tell damage from errors of the file system."""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

from imp_jax.errors import one_line

MANIFEST = "files.json"  # in each checkpoint: size and SHA-256 of its other files, by relative path


def compute_checksums(folder):
    """Compute the size and SHA-256 of each file of a checkpoint, by relative path.

    Raises:
      OSError: a file or folder cannot be read at the moment.
    """

    def fail(error):  # by default os.walk skips unreadable folders, and their files would seem to be missing
        raise error

    checksums = {}
    for directory, _, names in os.walk(folder, onerror=fail):
        for path in (Path(directory) / name for name in names if name != MANIFEST):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            checksums[str(path.relative_to(folder))] = [path.stat().st_size, digest]
    return dict(sorted(checksums.items()))


def find_damage(folder, error):
    """Describe the damaged file of a checkpoint whose reading raised `error`; "" if none is damaged.

    Raises:
      OSError: the files cannot be read at the moment.
    """
    if not folder.is_dir():
        return "it is missing"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:  # an earlier version wrote the checkpoint, or the process died before this file
        return one_line(error) if _indicates_damage(error) else ""
    except ValueError:
        return f"{MANIFEST} differs from what was written"
    found = compute_checksums(folder)
    for name, (size, digest) in manifest.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes, not {size}"
        if found[name][1] != digest:
            return f"the bits of {name} differ from those written"
    return ""


def _indicates_damage(error):
    """Return whether an exception indicates damage; used for checkpoints without a manifest."""
    if isinstance(error, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError):
        return True
    codes = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "Invalid JSON")  # of TensorStore
    return isinstance(error, ValueError) and not is_os_error(error) and any(c in str(error) for c in codes)


def is_os_error(error: BaseException | None) -> bool:
    """Return whether an exception comes from the file system; Orbax and TensorStore raise other types."""
    while error is not None:
        if isinstance(error, OSError) or "os_error_code='" in str(error):
            return True
        error = error.__cause__
    return False


def digest_tree(item):
    """Return the SHA-256 of the paths, dtypes, shapes and values of a tree's leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(item):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return digest.hexdigest()
