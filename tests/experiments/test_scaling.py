"""Estimated times on many devices, compared with plans worked out by hand."""

import pytest

from experiments.benchmarks import plan, scaling
from experiments.paper.catalogue import FIGURES
from experiments.paper.scales import PAPER
from experiments.sweeps import cost

DEVICE = {"images_per_second": {"resnet20": {"128": 1000.0}, "resnet50": {"1024": 1000.0}}}
FIG1 = FIGURES["fig1"].runs(PAPER)
# the longest of the runs, of batch size 128: a larger batch leaves out as many images per epoch, or more
RUN_SECONDS = cost.estimate_seconds(FIG1[0], DEVICE)


@pytest.mark.parametrize(
    ("runs", "devices", "max_data", "share", "plan_sizes"),
    [
        (1, 1, 1, 1, (1, 1, 1)),
        # 22 rounds of six members on six devices, and three of nine, with the twins
        (1, 6, 1, (22 + 3 * 2) / 159, (1, 6, 1)),
        (1, 8, 1, (22 + 3 * 2) / 159, (1, 6, 1)),
        (1, 9, 1, 25 / 159, (1, 9, 1)),
        (1, 4, 1, (22 * 2 + 3 * 3) / 159, (1, 3, 1)),  # four devices would be no faster than three
        (1, 2, 2, 1 / 2, (1, 1, 2)),
        # all twelve runs at once on five devices each; with six each, two of them would have to wait
        (12, 64, 1, 25 * 2 / 159, (12, 5, 1)),
        (12, 12, 1, 1, (12, 1, 1)),
    ],
)
def test_the_fastest_distribution_of_runs_over_devices_is_found(runs, devices, max_data, share, plan_sizes):
    fastest = plan.find_fastest_plan(FIG1[:runs], devices, DEVICE, max_data)
    assert fastest.seconds == pytest.approx(RUN_SECONDS * share)
    assert (fastest.concurrent_runs, fastest.member, fastest.data) == plan_sizes


def test_batches_are_divided_only_if_allowed():
    runs = FIGURES["tablec"].runs(PAPER)
    run_seconds = cost.estimate_seconds(runs[0], DEVICE)
    # two runs of one member each, which train concurrently
    assert plan.find_fastest_plan(runs, 64, DEVICE).seconds == pytest.approx(run_seconds)
    divided = plan.find_fastest_plan(runs, 64, DEVICE, 64)
    assert divided.seconds == pytest.approx(run_seconds / 32)
    assert plan.find_fastest_plan(runs, 64, {}) is None


def test_compute_member_size_counts_the_bytes_of_lenet_with_adam():
    """A parameter, its two moments and its gradient have 4 bytes each, its mask 1, the step count 4.

    Devices sum the gradients, the loss and the accuracy.
    """
    assert plan.compute_member_size("lenet") == (266_610, 17 * 266_610 + 4, 4 * 266_610 + 8)


def test_steps_over_virtual_devices_are_timed():
    (rate,) = scaling.time_in_subprocess("lenet", "batch", 2, (1, 8, 2), repeats=1, gpus=())
    assert rate > 0
