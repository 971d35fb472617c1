"""What many devices would take, against plans made by hand."""

import pytest

from experiments.benchmarks import plan, scaling
from experiments.paper.catalogue import FIGURES
from experiments.paper.scales import PAPER
from experiments.sweeps import cost

DEVICE = {"images_per_second": {"resnet20": {"128": 1000.0}, "resnet50": {"1024": 1000.0}}}
FIG1 = FIGURES["fig1"].runs(PAPER)
ALONE = cost.estimate_seconds(FIG1[0], DEVICE)  # all are the same number of images


@pytest.mark.parametrize(
    ("runs", "devices", "most_data", "share", "mesh"),
    [
        (1, 1, 1, 1, (1, 1, 1)),
        # 22 rounds of six members on six devices, and three of nine, with the twins
        (1, 6, 1, (22 + 3 * 2) / 159, (1, 6, 1)),
        (1, 8, 1, (22 + 3 * 2) / 159, (1, 6, 1)),
        (1, 9, 1, 25 / 159, (1, 9, 1)),
        (1, 4, 1, (22 * 2 + 3 * 3) / 159, (1, 3, 1)),  # three devices do what four would
        (1, 2, 2, 1 / 2, (1, 1, 2)),
        # all twelve at once on five devices each; on six each they would be ten, and then two
        (12, 64, 1, 25 * 2 / 159, (12, 5, 1)),
        (12, 12, 1, 1, (12, 1, 1)),
    ],
)
def test_runs_are_spread_as_is_fastest(runs, devices, most_data, share, mesh):
    fastest = plan.find_fastest_plan(FIG1[:runs], devices, DEVICE, most_data)
    assert fastest.seconds == pytest.approx(ALONE * share)
    assert (fastest.concurrent_runs, fastest.member, fastest.data) == mesh


def test_batches_are_divided_where_they_can_be():
    runs = FIGURES["tablec"].runs(PAPER)
    alone = cost.estimate_seconds(runs[0], DEVICE)
    assert plan.find_fastest_plan(runs, 64, DEVICE).seconds == pytest.approx(alone)  # two runs of one network
    divided = plan.find_fastest_plan(runs, 64, DEVICE, 64)
    assert divided.seconds == pytest.approx(alone / 32)
    assert plan.find_fastest_plan(runs, 64, {}) is None


def test_sizes_of_lenet():
    """Under Adam: weights, two moments and a gradient of 4 bytes, a mask of one, and the count of steps."""
    assert plan.compute_member_size("lenet") == (266_610, 17 * 266_610 + 4, 4 * 266_610 + 8)


def test_steps_over_virtual_devices_are_timed():
    (rate,) = scaling.time_in_subprocess("lenet", "batch", 2, (1, 8, 2), repeats=1, gpus=())
    assert rate > 0
