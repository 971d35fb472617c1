"""The free memory of this machine or of its accelerators."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

# files of a control group that contain its limit and its use, in the versions 2 and 1 of Linux's control groups
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available_bytes() -> int:
    """Return the memory of the devices of this process that is free, in bytes.

    On a CPU, respect the limits of a container or of a Slurm job.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return jax.local_device_count() * (stats["bytes_limit"] - stats["bytes_in_use"])
    return min([_available_on_host(), *_available_in_cgroups(Path("/"))])


def _available_on_host():
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _available_in_cgroups(root: Path) -> Iterator[int]:
    """Yield what the control group of this process, and each that contains it, leaves free.

    Args:
      root: the root of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            for limit, use in _CGROUP_FILES:
                with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
                    yield max(0, int((folder / limit).read_text()) - int((folder / use).read_text()))
            if folder == base:
                break
