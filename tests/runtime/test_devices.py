"""Meshes of four virtual devices: all give the same networks, and members need no communication."""

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

SINGLE_DEVICE, *MESHES = (1, 1), (4, 1), (2, 2), (1, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of `tests.helpers.on_devices`, a new process: JAX fixes its devices when it starts."""
    path = tmp_path_factory.mktemp("devices") / "results"
    subprocess.run([sys.executable, "-m", "tests.helpers.on_devices", path], cwd=ROOT, check=True)
    with open(path, "rb") as file:
        return pickle.load(file)


def assert_same_rounds(actual, expected):
    """Assert that the masks are equal, and everything else is equal up to rounding."""
    for actual_round, expected_round in zip(actual, expected, strict=True):
        networks, rows, history = actual_round
        expected_networks, expected_rows, expected_history = expected_round
        jax.tree.map(np.testing.assert_array_equal, networks.mask, expected_networks.mask)
        for tree, expected_tree in ((networks, expected_networks), (history, expected_history)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), tree, expected_tree)
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert row.keys() == expected_row.keys()
            for name, value in row.items():
                close = value if isinstance(value, str) else pytest.approx(value, abs=1e-5)
                assert expected_row[name] == close


@pytest.mark.parametrize("mesh", MESHES)
def test_lenet_is_the_same_on_any_mesh(results, mesh):
    """With repulsion, twins in round 1 (six members on up to four devices) and rewinding to step 5."""
    assert [len(rows) for _, rows, _ in results["lenet"][SINGLE_DEVICE]] == [4, 6, 4]
    assert_same_rounds(results["lenet"][SINGLE_DEVICE], results["lenet"][mesh])


@pytest.mark.parametrize("mesh", [(2, 2), (1, 4)])
def test_resnet_is_the_same_on_any_mesh(results, mesh):
    """BatchNorm uses statistics of the whole batch; its running statistics are compared as well."""
    assert_same_rounds(results["resnet"][SINGLE_DEVICE], results["resnet"][mesh])


def test_resumed_round_with_empty_slots_has_the_same_bits(results):
    """Six members on four devices in round 1, stopped after its first epoch."""
    whole, resumed = (results["resumed"][kills] for kills in (False, True))
    assert [len(networks.mask["Dense_0"]["kernel"]) for networks in whole] == [4, 6]
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_runs_in_one_program_equal_single_runs(results):
    """Two members on two devices, in round 1 three and an empty slot; together, four and eight slots.

    A device with one member has other products than one with two, so round 0 differs in rounding.
    """
    single, packed = (results["packed"][together] for together in (False, True))
    assert [len(networks.mask["Dense_0"]["kernel"]) for networks in packed] == [2, 3, 2, 3]
    for one, other in zip(single, packed, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.mask, other.mask)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), one, other)


def test_batch_norm_of_parts_is_the_same_on_any_mesh(results):
    one_device, four_devices = results["resnet in parts"].values()
    assert_same_rounds(one_device, four_devices)
    kernels = [
        rounds[0][0].trained["params"]["Dense_0"]["kernel"]
        for rounds in (one_device, results["resnet"][SINGLE_DEVICE])
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3  # the parts have other statistics than the batch


def test_accumulated_gradients_train_like_the_whole_batch(results):
    assert_same_rounds(results["lenet"][SINGLE_DEVICE], results["lenet accumulated"])


@pytest.mark.parametrize("split", ["accumulated", "in parts"])
def test_a_step_in_parts_is_the_mean_of_steps_on_the_parts(results, split):
    """With SGD, whose step is linear in the gradient. BatchNorm uses the statistics of each part."""
    step, mean_of_steps = results[split]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), step, mean_of_steps)


def test_a_mesh_of_members_needs_no_collectives(results):
    assert results["collectives"][4, 1] == [0, 0]
    assert min(results["collectives"][2, 2]) > 0  # so the search does find collectives


def test_points_of_a_path_may_be_divided_over_devices(results):
    for divided, on_one_device in results["paths"]:
        assert np.ptp(on_one_device[0]) > 0.01  # the points differ
        np.testing.assert_allclose(divided, on_one_device, rtol=1e-5)


def test_copies_of_a_data_set_on_cpu_devices_share_its_memory(results):
    """Otherwise a machine with many cores would need as many times the memory."""
    original, copies = results["memory"]
    assert copies == [original] * 4


def test_one_program_serves_all_rounds_of_a_mesh(results):
    assert results["programs"] == 1


# --- sizes of the mesh, and sizes that are refused ---


@pytest.fixture
def mesh_sizes(monkeypatch):
    """Return a function that computes the sizes of the mesh for numbers of devices and members."""

    def compute_sizes(num_devices, members, member=-1, data=1, processes=1, **fields):
        monkeypatch.setattr(jax, "device_count", lambda: num_devices)
        monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * num_devices)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(jax, "local_device_count", lambda: num_devices // processes)
        monkeypatch.setattr(devices, "Mesh", lambda grid, axes: grid)
        mesh = devices.make_mesh(members, **{"batch_size": 60} | fields, member=member, data=data)
        return (1, 1) if mesh is None else mesh.shape

    return compute_sizes


@pytest.mark.parametrize(
    ("num_devices", "members", "requested", "expected"),
    [
        (1, 6, (-1, 1), (1, 1)),
        (8, 6, (-1, 1), (6, 1)),
        (4, 6, (-1, 1), (3, 1)),  # two members each, as on four devices
        (4, 7, (-1, 1), (4, 1)),
        (8, 1, (-1, -1), (1, 6)),  # neither 8 nor 7 divides 60 images
        (8, 3, (-1, -1), (3, 2)),
        (8, 6, (-1, 2), (3, 2)),
        (8, 6, (2, -1), (2, 4)),
        (9, 2, (-1, -1), (2, 4)),
        (8, 6, (1, 1), (1, 1)),
        (8, 6, (8, 1), (8, 1)),  # a larger mesh than needed, as requested
    ],
)
def test_devices_are_used_for_members_first_then_for_batches(
    mesh_sizes, num_devices, members, requested, expected
):
    assert mesh_sizes(num_devices, members, *requested) == expected


def test_every_process_is_part_of_the_mesh(mesh_sizes):
    assert mesh_sizes(8, 6, processes=8) == (8, 1)
    assert mesh_sizes(8, 6, processes=2, data=2) == (4, 2)
    with pytest.raises(UserError, match=r"is 6 × 1; 2 processes of 4 devices .* such as 8 × 1, 4 × 2, 2 × 4"):
        mesh_sizes(8, 6, member=6, processes=2)
    with pytest.raises(
        UserError, match=r"mesh\.data should divide 4 or be a multiple of it, such as 12 × 1, 6 × 2, 3"
    ):
        mesh_sizes(12, 6, member=4, data=3, processes=3)


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
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(mesh_sizes, fields, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        mesh_sizes(2, 6, **fields)
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


def test_describe_mesh_names_sizes_and_empty_slots(mesh_sizes, monkeypatch):
    mesh_sizes(8, 6)
    grid = np.empty((4, 2))
    mesh = type("Mesh", (), {"devices": grid})
    words = devices.describe_mesh(mesh, 6)
    assert re.match(
        r"mesh 4 × 2 \(member × data\) on 8 of 8 devices, .*; 2 members per device, 2 empty slots", words
    )
    assert "mesh 1 × 1 (member × data) on 1 of 8 devices" in devices.describe_mesh(None, 6)
