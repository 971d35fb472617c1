"""The memory of this machine or of its accelerators."""

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
    free = (max(0, limit - use) for limit, use in _read_cgroups(Path("/")))
    return min([_available_on_host(), *free])


def host_limit_bytes() -> int:
    """Return the machine's memory in bytes, or the lowest limit of a container or Slurm job."""
    return min([_total_on_host(), *(limit for limit, _ in _read_cgroups(Path("/")))])


def _total_on_host():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _available_on_host():
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return _total_on_host() // 2


def _read_cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of the control group of this process, and of each group that contains it.

    Args:
      root: the root of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            for limit, use in _CGROUP_FILES:
                with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
                    limit_bytes = int((folder / limit).read_text())
                    yield limit_bytes, _read_use(folder, use)
            if folder == base:
                break


def _read_use(folder, name):
    """Return the bytes in use, without what the kernel can drop from its cache of files."""
    try:
        used = int((folder / name).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return used - int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
