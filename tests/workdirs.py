"""Workdirs that earlier versions wrote, and that must stay usable; a zip file each in `data`."""

import zipfile
from pathlib import Path

# by commit: two rounds of a narrow LeNet on mnist5k, with a twin in the last, analysed
EARLIER = ("d31948c",)


def unpack(commit: str, workdir: Path) -> Path:
    """Write the workdir of an earlier version into the folder `workdir`; it names no data_dir."""
    with zipfile.ZipFile(Path(__file__).parent / "data" / f"workdir_{commit}.zip") as archive:
        archive.extractall(workdir)
    return workdir
