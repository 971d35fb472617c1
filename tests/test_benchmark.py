import subprocess
import sys
from pathlib import Path

import pytest

from experiments import benchmark as bench
from experiments import cost
from experiments.scales import MINI


def benchmark(*arguments):
    command = [sys.executable, "-m", "experiments.benchmark", *arguments]
    return subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )


def test_the_lenet_benchmark_prints_its_table():
    done = benchmark("lenet", "--rounds=1", "--epochs=1")
    assert done.returncode == 0, done.stderr
    for quantity in ("all members, whole round", "share of a round not training", "compilation", "host memory"):
        assert quantity in done.stdout


def test_the_benchmark_of_steps_prints_its_table():
    done = benchmark("conv4", "--members=1", "--batch_size=4", "--steps=2", "--repeats=2")
    assert done.returncode == 0, done.stderr
    assert "conv4, 1 member, batch 4, float32, step_unroll on" in done.stdout
    for quantity in ("images/s, all members", "step of all members", "compilation", "host memory"):
        assert quantity in done.stdout


def test_the_benchmark_of_analyses_prints_its_table():
    done = benchmark("analysis", "--rounds=2", "--repeats=1")
    assert done.returncode == 0, done.stderr
    assert "6 members, 2 rounds on" in done.stdout
    for quantity in (
        "all analyses, figures and report",
        "compilation included",
        "20 points over one evaluation",
    ):
        assert quantity in done.stdout


def test_the_benchmark_of_checkpoints_prints_its_table():
    done = benchmark("checkpoints", "--rounds=1", "--repeats=1", "--epochs=1")
    assert done.returncode == 0, done.stderr
    for quantity in ("run without states within rounds", "more with one every 5 epochs"):
        assert quantity in done.stdout


def test_the_benchmark_of_disk_prints_its_table():
    done = benchmark("disk", "--rounds=1")
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if "resnet50" in line)
    _, _, members, round_0, whole, state, _ = (cell.strip() for cell in row.split("│"))
    parameters = 25_503_912 * 4 / 1e6  # MB; two networks compress a little, and their masks much
    assert members == "1"
    assert round_0 == whole
    assert 1.5 * parameters < float(round_0) < 2.3 * parameters
    assert 3 * parameters <= float(state) < 3.1 * parameters  # ticket, weights and momentum, as they are


def test_the_benchmark_of_repulsion_prints_its_tables():
    done = benchmark("repulsion", "--rounds=2", "--repeats=1", "--epochs=1")
    assert done.returncode == 0, done.stderr
    for quantity in (
        "with λ = 2 (s)",
        "ratio of the first, which compiles",
        "LeNet-300-100, P = 266,610",
        "ResNet-50, P = 25,",
    ):
        assert quantity in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("conv4", "--steps=0"), "error: --steps is 0; it should be at least 1"),
        (("conv4", "--execution=loop"), "error: execution is 'loop'; it should be one of auto"),
        (("lenet", "--torch"), "error: --torch is for conv4 and resnet20"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, sentence):
    done = benchmark(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(sentence)
    assert len(done.stderr.splitlines()) == 1


def test_throughput_is_recorded_for_the_costs(tmp_path, monkeypatch, capsys):
    recorded = tmp_path / "throughput.json"
    recorded.write_text('{"another": {}}')
    monkeypatch.setattr(cost, "MEASURED", recorded)
    bench.benchmark_throughput(rounds=1, repeats=1, record="here", names=["lenet"])
    assert "lenet, batch 600, 6 members" in capsys.readouterr().out
    device = cost.measured()["here"]
    speeds = device["images_per_second"]["lenet"]
    assert list(speeds) == ["20", "60", "200", "600"]
    assert all(1000 < speed < 1e9 for speed in speeds.values())
    assert cost.seconds(MINI.lenet, device) > 159 * 20 * 66 * 60 / speeds["60"]
    assert cost.measured()["another"] == {}
