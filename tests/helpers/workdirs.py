"""Workdirs that earlier versions wrote, and that must stay usable; a zip file each."""

import zipfile
from pathlib import Path

# two rounds of a narrow LeNet on mnist5k, with a twin in the last, analysed: by commit, of each format of
# config.json, with the tables that have been defined otherwise since
EARLIER = {"d31948c": ("distances", "layers"), "2b6d8ba": ()}


def unpack(commit: str, workdir: Path) -> Path:
    """Write the workdir of an earlier version into the folder `workdir`; it names no data_dir."""
    with zipfile.ZipFile(Path(__file__).parent / f"workdir_{commit}.zip") as archive:
        archive.extractall(workdir)
    return workdir
