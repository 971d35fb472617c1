"""Meshes of four virtual devices: the same networks on all of them, and no talk between members."""

import pickle
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from imp_jax.errors import UserError
from imp_jax.runtime import devices
from tests.helpers import ROOT

ONE, *OTHERS = (1, 1), (4, 1), (2, 2), (1, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What on_devices.py has computed, in a process of its own, as the devices are counted once."""
    path = tmp_path_factory.mktemp("devices") / "results"
    subprocess.run([sys.executable, "-m", "tests.helpers.on_devices", path], cwd=ROOT, check=True)
    with open(path, "rb") as file:
        return pickle.load(file)


def assert_same_rounds(some, others):
    """Equal masks, and all else to rounding."""
    for (networks, rows, seen), (others_networks, others_rows, others_seen) in zip(some, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, networks.mask, others_networks.mask)
        for one, other in ((networks, others_networks), (seen, others_seen)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), one, other)
        for row, others_row in zip(rows, others_rows, strict=True):
            assert row.keys() == others_row.keys()
            for name, value in row.items():
                expected = value if isinstance(value, str) else pytest.approx(value, abs=1e-5)
                assert others_row[name] == expected


@pytest.mark.parametrize("mesh", OTHERS)
def test_lenet_is_the_same_on_any_mesh(results, mesh):
    """With repulsion, twins in round 1 (six members on up to four devices) and rewinding to step 5."""
    assert [len(rows) for _, rows, _ in results["lenet"][ONE]] == [4, 6, 4]
    assert_same_rounds(results["lenet"][ONE], results["lenet"][mesh])


@pytest.mark.parametrize("mesh", OTHERS)
def test_resnet_is_the_same_on_any_mesh(results, mesh):
    """Normalised by the whole batch, which shows in its running statistics too."""
    assert_same_rounds(results["resnet"][ONE], results["resnet"][mesh])


def test_parts_of_a_batch_are_the_same_on_any_mesh(results):
    on_one, on_four = results["resnet in parts"].values()
    assert_same_rounds(on_one, on_four)
    kernels = [
        rounds[0][0].trained["params"]["Dense_0"]["kernel"] for rounds in (on_one, results["resnet"][ONE])
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3  # statistics of parts are others


def test_accumulated_lenet_is_that_of_the_large_batch(results):
    assert_same_rounds(results["lenet"][ONE], results["lenet accumulated"])


@pytest.mark.parametrize("how", ["accumulated", "in parts"])
def test_a_step_in_parts_is_the_mean_of_steps_on_the_parts(results, how):
    """Of SGD, whose step is linear in the gradient; each part is normalised by its own statistics."""
    step, mean_of_steps = results[how]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), step, mean_of_steps)


def test_members_alone_need_no_collective(results):
    assert results["collectives"][4, 1] == [0, 0]
    assert min(results["collectives"][2, 2]) > 0  # which could be seen


def test_copies_of_a_set_on_cpu_devices_share_its_memory(results):
    """So that a machine of many cores does not need the memory of as many copies."""
    original, copies = results["memory"]
    assert copies == [original] * 4


def test_one_program_serves_all_rounds_of_a_mesh(results):
    assert results["programs"] == 1


# --- what fits, on so many devices ---


@pytest.fixture
def mesh_of(monkeypatch):
    """The sizes of the mesh for a run of so many members, on so many devices."""

    def sizes(there, members, member=-1, data=1, processes=1, **fields):
        monkeypatch.setattr(jax, "device_count", lambda: there)
        monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * there)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(jax, "local_device_count", lambda: there // processes)
        monkeypatch.setattr(devices, "Mesh", lambda grid, axes: grid)
        mesh = devices.make_mesh(members, **{"batch_size": 60} | fields, member=member, data=data)
        return (1, 1) if mesh is None else mesh.shape

    return sizes


@pytest.mark.parametrize(
    ("there", "members", "asked", "sizes"),
    [
        (1, 6, (-1, 1), (1, 1)),
        (8, 6, (-1, 1), (6, 1)),
        (4, 6, (-1, 1), (3, 1)),  # two members each, as on four devices
        (4, 7, (-1, 1), (4, 1)),
        (8, 1, (-1, -1), (1, 6)),  # 60 images are not divided by 8
        (8, 3, (-1, -1), (3, 2)),
        (8, 6, (-1, 2), (3, 2)),
        (8, 6, (2, -1), (2, 4)),
        (9, 2, (-1, -1), (2, 4)),
        (8, 6, (1, 1), (1, 1)),
        (8, 6, (8, 1), (8, 1)),  # if that is what is asked for
    ],
)
def test_members_are_placed_first(mesh_of, there, members, asked, sizes):
    assert mesh_of(there, members, *asked) == sizes


def test_no_process_is_left_out(mesh_of):
    assert mesh_of(8, 6, processes=8) == (8, 1)
    assert mesh_of(8, 6, processes=2, data=2) == (4, 2)
    with pytest.raises(UserError, match=r"is 6 × 1; 2 processes of 4 devices .* such as 8 × 1, 4 × 2, 2 × 4"):
        mesh_of(8, 6, member=6, processes=2)
    with pytest.raises(
        UserError, match=r"mesh\.data should divide 4 or be a multiple of it, such as 12 × 1, 6 × 2, 3"
    ):
        mesh_of(12, 6, member=4, data=3, processes=3)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"data": 3}, r"mesh\.member × mesh\.data is -1 × 3, and there are 2 devices; .* such as 2 × 1, 1 × 2"),
        ({"member": 4}, r"is 4 × 1, and there are 2 devices"),
        ({"data": 2, "batch_size": 61}, r"batch_size is 61; with mesh\.data 2 .* such as 60 or 62"),
        ({"data": 2, "batch_size": 6, "accumulate_steps": 2}, r"multiple of 4, such as 4 or 8"),
        ({"data": 2, "batch_size": 1}, r"multiple of 2, such as 2 or 4"),
        ({"data": 2, "batch_size": 63, "norm_parts": 3, "accumulate_steps": 1}, "batch_size is 63"),
        ({"data": 2, "norm_parts": 3}, r"model\.norm_parts is 3 and mesh\.data 2; .* multiple"),
    ],
)
def test_what_does_not_fit_is_one_sentence(mesh_of, fields, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        mesh_of(2, 6, **fields)
    assert "\n" not in str(error.value)


def test_jax_without_a_device_or_in_double_precision_is_refused(monkeypatch):
    def no_device():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    devices.require_usable()
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64 is set; training"):
        devices.require_usable()
    monkeypatch.setattr(jax, "devices", no_device)
    with pytest.raises(UserError, match="JAX has no device: RuntimeError: Unable to initialize backend 'cuda'"):
        devices.require_usable()


def test_the_mesh_in_words(mesh_of, monkeypatch):
    mesh_of(8, 6)
    grid = np.empty((4, 2))
    mesh = type("Mesh", (), {"devices": grid})
    words = devices.describe_mesh(mesh, 6)
    assert re.match(
        r"mesh 4 × 2 \(member × data\) on 8 of 8 devices, .*; 2 members per device, 2 empty slots", words
    )
    assert "mesh 1 × 1 (member × data) on 1 of 8 devices" in devices.describe_mesh(None, 6)
