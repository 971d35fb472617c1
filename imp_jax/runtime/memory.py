"""The free memory of this machine or of its accelerators."""

import os

import jax


def available_bytes() -> int:
    """Return the memory of the devices of this process that is free, in bytes."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return jax.local_device_count() * (stats["bytes_limit"] - stats["bytes_in_use"])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
