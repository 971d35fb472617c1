"""Free memory: of the host, and within the limits of control groups."""

import pytest

from imp_jax.runtime import memory


def test_available_memory_is_part_of_that_of_the_machine():
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 1e6 < memory.available_bytes() <= total


def write_group(folder, limit, use, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, use), strict=True):
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("controllers", "line", "names"),
    [
        ("", "0::/slurm/job_1", ("memory.max", "memory.current")),
        ("memory", "4:memory:/slurm/job_1", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_limit_and_use_of_each_group_are_read(tmp_path, controllers, line, names):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpu:/elsewhere\n{line}\n")
    base = tmp_path / "sys/fs/cgroup" / controllers
    write_group(base / "slurm/job_1", "max", 10, names)
    write_group(base / "slurm", 1000, 300, names)
    write_group(base, 500, 900, names)
    write_group(tmp_path / "sys", 1, 0, names)  # not a control group
    for folder, cached in ((base / "slurm", 0), (base, 400)):
        (folder / "memory.stat").write_text(f"anon 500\ninactive_file {cached}\n")
    assert list(memory._read_cgroups(tmp_path)) == [(1000, 300), (500, 500)]


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert list(memory._read_cgroups(tmp_path)) == []


def test_limits_of_groups_bound_the_memory(monkeypatch):
    monkeypatch.setattr(memory, "_read_cgroups", lambda root: iter([(5000, 1000), (3000, 3500)]))
    assert memory.available_bytes() == 0
    assert memory.host_limit_bytes() == 3000
