"""`experiments.benchmark`: its tables, and the work and the throughput that they contain."""

import contextlib
import functools
import importlib
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import (
    analysis,
    convolutions,
    disk,
    forms,
    load,
    midi,
    patches,
    pytorch,
    round_worker,
    sparse,
    steps,
    steps_table,
    throughput,
    whole_runs,
    work,
)
from experiments.paper.scales import MINI
from experiments.sweeps import cost
from experiments.sweeps.runs import load_config
from imp_jax.analysis import ANALYSES
from imp_jax.errors import UserError
from imp_jax.runtime import devices


def load_narrow_config(data_dir, name):
    config = load_config(name)
    config.model.width, config.replicates, config.dataset.data_dir = 0.1, 2, data_dir
    return config


@pytest.fixture
def run_benchmark(data_dir, monkeypatch, capfd):
    """Return a function that runs `experiments.benchmark` on a narrow LeNet, and returns what it prints."""
    for module in (analysis, whole_runs):
        monkeypatch.setattr(module, "load_config", functools.partial(load_narrow_config, data_dir))
    monkeypatch.setattr(devices, "use_one_device_per_cpu_core", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        benchmark.main()
        return capfd.readouterr().out

    return run


def test_the_lenet_benchmark_prints_its_table(run_benchmark):
    out = run_benchmark("lenet", "--rounds=1", "--epochs=1")
    quantities = ("all members, whole round", "share of a round outside training", "compilation", "host memory")
    for quantity in quantities:
        assert quantity in out


def test_the_table_of_steps_is_written_to_a_file(run_benchmark, tmp_path):
    arguments = ("conv4", "--members=1", "--batch_size=4", "--steps=2", "--repeats=2")
    table_path = str(tmp_path / "table.json")
    out = run_benchmark(*arguments, f"--out={table_path}")
    for quantity in ("conv4: 1 × 4, float32", "images/s of all", "of peak", "586.30 MFLOP"):
        assert quantity in out
    row = steps_table.read_table(table_path)["rows"]["conv4"]
    assert len(row["images_per_second"]) == 2
    assert row["compilation"] > 0.1
    assert row["memory"] > 0.1
    assert row["peak_flops"] > 1e9
    assert row["peak_bytes"] > 1e8


def test_the_parts_of_convolutions_are_timed_in_each_form(capsys):
    convolutions.benchmark_convolutions(batch_size=2, repeats=1, shapes=[(8, 3, 4, 1), (8, 4, 4, 2)])
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "stride" in line]
    assert [line[0].strip() for line in lines] == ["8², 3 to 4, stride 1", "8², 4 to 4, stride 2"]
    assert all(float(cell) >= 0 for line in lines for cell in (line[1], *line[3:]))


def test_each_form_of_convolutions_is_timed_in_a_process(monkeypatch, capsys):
    calls = []

    def fake_row(name, options):
        calls.append((name, options))
        return {"images_per_second": [10 * len(calls), 10 * len(calls) + 2]}

    monkeypatch.setattr(steps, "time_row_in_subprocess", fake_row)
    forms.benchmark_forms("resnet20", [1, 3], [128], ["--repeats=2"])
    options = ["--repeats=2", "--members=3", "--batch_size=128"]
    assert calls[-2:] == [("resnet20", [*options, f"--form={form}"]) for form in ("grouped", "patches")]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "3 × 128" in line)
    cells = [cell.strip() for cell in line.split("│")[2:-1]]
    assert cells == ["61 (60 to 62)", "71 (70 to 72)", "81 (80 to 82)", "91 (90 to 92)", "101 (100 to 102)"]


def test_steps_are_timed_beside_one_busy_process_per_core(monkeypatch, capsys):
    started, calls = [], []

    def start(command):
        started.append(subprocess.Popen(command))
        return started[-1]

    def fake_row(name, options):
        assert options == ["--repeats=2"]
        busy = [process for process in started if process.poll() is None]
        calls.append((name, len(busy)))
        return {"images_per_second": [30, 60] if busy else [90, 110]}

    monkeypatch.setattr(load, "Popen", start)
    monkeypatch.setattr(steps, "time_row_in_subprocess", fake_row)
    load.benchmark_load(["--repeats=2"])
    cores = devices.available_cores()
    assert calls == [("lenet", 0), ("lenet", cores), ("resnet8", 0), ("resnet8", cores)]
    assert all(process.poll() is not None for process in started)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "resnet8" in line)
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells == ["resnet8", "100 (90 to 110)", "45 (30 to 60)", "0.45"]


@pytest.mark.parametrize(("strides", "padding"), [((1, 1), "SAME"), ((2, 2), ((1, 1), (1, 1)))])
def test_a_matrix_product_of_patches_equals_the_convolution(strides, padding):
    images = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    expected = jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        patches.patches_convolution(images, kernel, strides, padding), expected, rtol=1e-4, atol=1e-4
    )


def test_two_tables_are_compared_by_their_medians(capsys):
    def table(rates, compilation, machine="this"):
        row = {"images_per_second": rates, "compilation": compilation, "memory": 2.0}
        row |= {
            "machine": machine,
            "members": 6,
            "batch_size": 60,
            "dtype": "float32",
            "execution": "scan_vmap",
        }
        return {"date": "2026-11-24", "rows": {"lenet": row}}

    steps_table.print_ratios(table([90, 100, 110], 4.0), table([140, 150, 180], 2.0))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "lenet" in line)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["lenet", "1.50", "0.50", "1.00"]
    steps_table.print_ratios(table([1], 4.0, "another"), table([1], 2.0))
    assert "not the same work, or machine" in capsys.readouterr().out


def test_the_work_of_a_step_is_the_sum_over_its_layers():
    def count_work(name, **overrides):
        config = importlib.import_module(f"configs.{name}").get_config()
        config.update(overrides)
        return work.count_work(config)

    weights, biases = 784 * 300 + 300 * 100 + 100 * 10, 410
    lenet = count_work("lenet")
    assert lenet.flops == 2 * (3 * weights - 784 * 300)
    assert lenet.activations == 6 * 410 * 4
    parameters = weights + biases
    # float32 parameters, Adam's moments and step count, and gradients, each read and written; and the mask
    assert lenet.state == 2 * 4 * (parameters + (2 * parameters + 1) + parameters) + parameters

    stem, stages = 9 * 3 * 16 * 32**2, (6 * 16 * 16 + 0) * 9 * 32**2
    stages += (16 * 32 + 5 * 32 * 32) * 9 * 16**2 + (32 * 64 + 5 * 64 * 64) * 9 * 8**2
    resnet20 = count_work("resnet20", dtype="bfloat16")
    assert resnet20.flops == 2 * (3 * (stem + stages + 640) - stem)
    assert resnet20.activations == 9 * 2 * (7 * 16 * 32**2 + 6 * 32 * 16**2 + 6 * 64 * 8**2 + 10)


def test_a_missing_pytorch_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="--torch needs PyTorch and torchvision: pip install"):
        pytorch.make_torch_train_fns("lenet", 1, 60)


def test_the_benchmark_of_analyses_prints_its_table(run_benchmark, one_figure):
    names = ("paths", "barriers", "weights", "layers", "learning", "noise", "instability")
    with mock.patch.dict(ANALYSES, {name: ANALYSES[name] for name in names}, clear=True):
        out = run_benchmark("analysis", "--rounds=2", "--repeats=1")
    assert "4 members, 2 rounds on" in out
    for quantity in (
        "all analyses, figures and report",
        "compilation included",
        "20 points over one evaluation",
        *("paths (s)", "learning (s)", "noise, on request (s)", "instability, on request (s)"),
    ):
        assert quantity in out


def test_rounds_of_two_versions_are_timed_in_turn(monkeypatch, tmp_path, capsys):
    trees = {"before": tmp_path / "before", "after": midi.REPOSITORY}
    monkeypatch.setattr(midi, "_checked_out", lambda commit: contextlib.nullcontext(trees["before"]))
    calls = []

    def fake_process(tree, rounds, epochs):
        calls.append((tree, rounds, epochs))
        return {"round": 60.0, "analyses": 30.0 if tree == trees["before"] else 15.0, "peak_gib": 2.0}

    monkeypatch.setattr(midi, "_time_in_process", fake_process)
    midi.benchmark_midi(rounds=3, repeats=2, base="1234abc", epochs=4)
    assert calls == [(tree, 3, 4) for _ in range(2) for tree in trees.values()]
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "whole round" in line]
    medians = {line[1].strip(): float(line[2]) for line in lines}
    assert medians == {
        "whole round, before, 1234abc (s)": 90,
        "whole round, after (s)": 75,
        "whole round, before / after": 1.2,
    }


def test_a_round_is_timed_with_its_analyses(data_dir, one_figure, tmp_path):
    config_file = tmp_path / "narrow.py"
    config_file.write_text(
        "from configs import mnist5k\n\ndef get_config():\n    config = mnist5k.get_config()\n"
        f"    config.model.width, config.dataset.data_dir = 0.1, {data_dir!r}\n    return config\n"
    )
    names = ("paths", "barriers", "weights", "layers")
    with mock.patch.dict(ANALYSES, {name: ANALYSES[name] for name in names}, clear=True):
        seconds = round_worker.time_rounds(str(config_file), rounds=1, epochs=1)
    assert seconds.keys() == {"round", "analyses", "peak_gib"}
    assert min(seconds.values()) > 0


def test_the_benchmark_of_checkpoints_prints_its_table(run_benchmark):
    out = run_benchmark("checkpoints", "--rounds=1", "--repeats=1", "--epochs=1")
    for quantity in ("run without states within rounds", "extra time with a state every 5 epochs"):
        assert quantity in out


def test_the_benchmark_of_disk_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(disk, "TABLE_1_CONFIGS", ("conv4",))
    disk.benchmark_disk(rounds=1)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "conv4" in line)
    _, _, members, round_0, whole_run, state, _ = (cell.strip() for cell in row.split("│"))
    variables = 6 * 2_425_930 * 4 / 1e6  # MB of six networks; random ones compress a little, their masks a lot
    assert members == "6"
    assert round_0 == whole_run
    assert 1.5 * variables < float(round_0) < 2.3 * variables
    assert 3 * variables <= float(state) < 3.1 * variables  # ticket, weights and momentum; not compressed


def test_the_benchmark_of_repulsion_prints_its_tables(run_benchmark):
    out = run_benchmark("repulsion", "--rounds=2", "--repeats=1", "--epochs=1")
    for quantity in (
        "with λ = 2 (s)",
        "ratio of the first, which compiles",
        "LeNet-300-100, P = 23,920",
        "ResNet-50, P = 25,",
    ):
        assert quantity in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("conv4", "--steps=0"), "error: --steps is 0; it should be at least 1"),
        (("conv4", "--execution=loop"), "error: execution is 'loop'; it should be one of auto"),
        (("resnet50", "--torch"), "error: --torch is for table, lenet, conv4, resnet8, resnet20"),
        (("midi", "--base=absent"), "error: --base is 'absent', which cannot be checked out"),
        (("table", "--compare=absent.json"), "error: --compare is 'absent.json', which cannot be read"),
        (
            ("table", "--out=absent/table.json"),
            "error: --out is 'absent/table.json', whose folder does not exist",
        ),
    ],
)
def test_bad_arguments_print_one_line(run_benchmark, capfd, arguments, sentence):
    with pytest.raises(SystemExit) as exit_info:
        run_benchmark(*arguments)
    message = exit_info.value.code
    if message == 1:  # a process that was started has printed it
        message = capfd.readouterr().err.rstrip()
    assert message.startswith(sentence)
    assert "\n" not in message


def test_throughput_is_recorded_for_estimates_of_cost(tmp_path, monkeypatch, capsys):
    recorded = tmp_path / "throughput.json"
    recorded.write_text('{"another": {}}')
    monkeypatch.setattr(cost, "MEASURED", recorded)
    monkeypatch.setattr(throughput, "load_config", functools.partial(load_narrow_config, None))
    monkeypatch.setattr(throughput, "_time_process", lambda run: 130.0 if "repulsion" in run.name else 100.0)
    throughput.benchmark_throughput(rounds=1, repeats=1, record="here", names=["lenet"])
    assert "lenet, batch 600, 4 members" in capsys.readouterr().out
    device = cost.read_throughput()["here"]
    speeds = device["images_per_second"]["lenet"]
    assert list(speeds) == ["20", "60", "200", "600"]
    assert all(1000 < speed < 1e9 for speed in speeds.values())
    one_round = 6 * 10 * 66 * 60 / speeds["60"]
    assert device["besides"]["lenet"] == pytest.approx(100 - one_round, abs=0.051)
    assert device["repulsion"]["lenet"] == pytest.approx(1 + 30 / one_round, rel=0.01)
    training = 159 * 20 * 66 * 60 / speeds["60"]
    assert cost.estimate_seconds(MINI.lenet, device) == pytest.approx(training + device["besides"]["lenet"])
    assert cost.read_throughput()["another"] == {}


def test_the_benchmark_of_a_branch_prints_both_speeds(run_benchmark):
    out = run_benchmark("branch", "--rounds=2", "--repeats=1", "--epochs=1")
    assert "6 members of a run and 12 of a branch" in out
    for quantity in ("images/s, all members, run", "images/s, all members, branch", "branch × run"):
        assert quantity in out


def test_the_forms_of_sparse_networks_train_the_same_weights(monkeypatch):
    """Units that one member has lost are padding in another; a lost unit keeps its weights."""
    monkeypatch.setattr(sparse, "STEPS", 5)
    rng = np.random.default_rng(0)
    sizes = {"Dense_0": (20, 9), "Dense_1": (9, 7), "Dense_2": (7, 3)}
    params = {
        name: {"kernel": rng.normal(size=(2, *s)).astype(np.float32), "bias": np.ones((2, s[1]), np.float32)}
        for name, s in sizes.items()
    }
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    for name, size in sizes.items():
        masks[name]["kernel"] = rng.random((2, *size)) < 0.4
    masks["Dense_2"]["kernel"][0, 2] = False  # a unit of the second hidden layer, in the first member
    masks["Dense_0"]["kernel"][1, :4] = False
    live = [sparse.list_live_units(sparse.take(masks, m)) for m in range(2)]
    assert 2 not in live[0][2]
    assert not set(range(4)) & set(live[1][0])
    images, labels = rng.random((50, 20), np.float32), rng.integers(0, 3, 50)
    dense, compact, surviving = (
        sparse.make_train_fn(form, params, masks, images, labels, batch_size=8)()
        for form in sparse.FORMS.values()
    )
    for m in range(2):
        units = [*live[m], np.arange(3)]
        for name, rows, columns in zip(sparse.LAYERS, units[:-1], units[1:], strict=True):
            trained, mask = np.asarray(dense[name]["kernel"][m]), masks[name]["kernel"][m]
            part = np.asarray(compact[name]["kernel"][m])[: len(rows), : len(columns)]
            np.testing.assert_allclose(
                part * mask[np.ix_(rows, columns)], (trained * mask)[np.ix_(rows, columns)], atol=1e-5
            )
            values = np.asarray(surviving[name]["kernel"][m])[: mask.sum()]
            np.testing.assert_allclose(values, trained.T[mask.T], atol=1e-5)
        lost = np.asarray(dense["Dense_1"]["kernel"][0][:, 2])
    np.testing.assert_array_equal(lost, (params["Dense_1"]["kernel"] * masks["Dense_1"]["kernel"])[0][:, 2])
