"""Workdirs of earlier versions, which must stay usable; one zip file each."""

import zipfile
from pathlib import Path

# by the commit that wrote a workdir: its tables whose definitions have changed since. Each workdir has another
# format of config.json and two rounds of a narrow LeNet on mnist5k, with a twin in the last, and is analysed
EARLIER = {"d31948c": ("distances", "layers"), "2b6d8ba": ()}


def unpack(commit: str, workdir: Path) -> Path:
    """Unpack the workdir of an earlier version into `workdir` and return it; its config has no data_dir."""
    with zipfile.ZipFile(Path(__file__).parent / f"workdir_{commit}.zip") as archive:
        archive.extractall(workdir)
    return workdir
