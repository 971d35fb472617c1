"""Workdirs that earlier versions wrote, and that must stay usable; a zip file each."""

import json
import zipfile
from pathlib import Path

from imp_jax.workdir.checksums import digest_tree

# two rounds of a narrow LeNet on mnist5k, with a twin in the last, analysed: by commit, of each format of
# config.json, with the tables that have been defined otherwise since
EARLIER = {"d31948c": ("distances", "layers"), "2b6d8ba": ()}


def unpack(commit: str, workdir: Path) -> Path:
    """Write the workdir of an earlier version into the folder `workdir`; it names no data_dir."""
    with zipfile.ZipFile(Path(__file__).parent / f"workdir_{commit}.zip") as archive:
        archive.extractall(workdir)
    return workdir


def forget_definition(folder):
    """Write the version of a checkpoint as it was when distances and J_r still counted biases."""
    path = folder / "version" / "metadata"
    version = json.loads(path.read_text())
    del version["digest"], version["similarity"]
    path.write_text(json.dumps({**version, "digest": digest_tree(version)}))
