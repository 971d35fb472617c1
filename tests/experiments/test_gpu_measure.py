"""`experiments.benchmark gpu`: its tasks, which are run on this CPU, and how it treats those that fail."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks.gpu import agreement, gpu_rounds, measure, plan
from experiments.benchmarks.gpu.measure import NO_GRAPHS, Setting, Task
from experiments.benchmarks.gpu.plan import Row
from imp_jax.errors import UserError
from tests.conftest import make_tiny_config, make_tiny_dataset


def fail(_):
    raise subprocess.CalledProcessError(3, ["python"], stderr="Traceback\nValueError: no such kernel\n")


def never_end(timeout_s):
    raise subprocess.TimeoutExpired(["python"], timeout_s)


def test_tasks_that_fail_do_not_end_the_others_and_all_are_written(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    left = []

    def succeed(timeout_s):
        left.append(timeout_s)
        assert len(json.loads(path.read_text())["tasks"]) == 2  # those before
        return {"rate": 5}

    tasks = [Task("one", fail), Task("two", never_end), Task("three", succeed)]
    table = measure.run_tasks(tasks, 100, path)
    assert json.loads(path.read_text()) == table
    one, two, three = table["tasks"]
    assert one["error"] == "exit status 3: ValueError: no such kernel"
    assert one["stderr"] == "Traceback\nValueError: no such kernel"
    assert two["error"] == "not finished in the time that was left"
    assert three["rate"] == 5
    assert 99 < left[0] < 100
    errors = capsys.readouterr().err
    assert "one: exit status 3: ValueError: no such kernel" in errors
    assert "three: 0.0 s" in errors
    measure.print_tables(table)
    out = capsys.readouterr().out
    assert 'three: {"rate": 5}' in out
    assert "two: not finished" in out


def test_no_task_is_started_without_time(tmp_path):
    table = measure.run_tasks([Task("one", fail)], measure.LEAST_SECONDS - 1, tmp_path / "gpu.json")
    assert table["tasks"][0]["error"] == "no time was left"


def test_a_row_is_timed_and_compared_with_its_prediction(tmp_path, monkeypatch, capsys):
    row = Row("lenet", 2, 32, "float32", "vmapped")
    predictions = {"rows": [{"row": row._asdict(), "images_per_second": {"low": 1, "middle": 2, "high": 3}}]}
    (tmp_path / "predicted.json").write_text(json.dumps(predictions))
    monkeypatch.setattr(measure, "PREDICTED", tmp_path / "predicted.json")
    monkeypatch.setattr(measure, "EPOCH_IMAGES", 640)
    monkeypatch.setattr(measure, "ON_GPU", {"JAX_PLATFORMS": "cpu"})
    tasks = [
        measure.make_steps_task(row, Setting()),
        measure.make_steps_task(row, Setting("unknown", {"XLA_FLAGS": "--xla_no_such_flag=1"})),
        measure.make_steps_task(row, Setting("on a TPU", {"JAX_PLATFORMS": "tpu"})),
    ]
    table = measure.run_tasks(tasks, 300, tmp_path / "gpu.json")
    timed, unknown, absent = table["tasks"]
    assert timed["name"] == "lenet: 2 × 32, float32, vmapped"
    assert len(timed["images_per_second"]) == 3
    assert min(timed["images_per_second"]) > 100
    assert timed["predicted"] == {"low": 1, "middle": 2, "high": 3}
    assert unknown["name"] == "lenet: 2 × 32, float32, vmapped, unknown"
    assert unknown["error"].startswith("exit status")
    assert "xla_no_such_flag" in unknown["stderr"]
    assert absent["error"].startswith("exit status")  # JAX does not fall back to the CPU
    measure.print_tables(table)
    out = capsys.readouterr().out
    assert "2 (1 to 3)" in out
    assert f"{np.median(timed['images_per_second']) / 2:.2f}" in out


def test_flags_of_a_setting_are_added_to_those_of_the_user(monkeypatch, tmp_path):
    (tmp_path / "show_flags.py").write_text("import os, json\nprint(json.dumps(os.environ['XLA_FLAGS']))\n")
    monkeypatch.setattr(measure, "REPOSITORY", tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    assert measure.run_module("show_flags", [], 60, NO_GRAPHS.environment) == (
        "--xla_of_the_user=1 --xla_gpu_enable_command_buffer="
    )


def test_every_row_has_a_form_and_a_prediction():
    assert plan.choose_rows(measure.list_rows()) == measure.list_rows()  # no two of the same program
    for row in measure.list_rows():
        assert row.form in plan.FORMS
        low, middle, high = (measure.read_prediction(row)[name] for name in ("low", "middle", "high"))
        assert 0 < low < middle < high
    assert measure.read_prediction(Row("lenet", 7, 60, "float32", "vmapped")) is None


def test_two_forms_agree_and_other_losses_do_not(monkeypatch):
    monkeypatch.setattr(agreement, "STEPS", 8)
    expected, actual = (
        {"mnist5k": {form: agreement.train("mnist5k", form)}} for form in (agreement.CPU_FORM, "vmapped")
    )
    losses = np.array(actual["mnist5k"]["vmapped"])
    assert losses.shape == (8, 2)
    assert (losses[-1] < 0.9 * losses[0]).all()
    [(name, result)] = agreement.compare_losses(expected, actual).items()
    assert name == "mnist5k, vmapped"
    assert result["agrees"]
    assert result["first step"] < 1e-6
    losses[0, 1] *= 1 + 2e-4  # as with TF32
    result = agreement.compare_losses(expected, {"mnist5k": {"vmapped": losses.tolist()}})["mnist5k, vmapped"]
    assert not result["agrees"]
    assert result["first step"] == pytest.approx(2e-4, rel=0.01)
    with pytest.raises(ValueError, match="the losses are not those of a GPU"):
        agreement.compare_losses(expected, expected)


def test_whole_rounds_are_timed_with_and_without_states():
    config = make_tiny_config(rounds=2, epochs=2)
    result = gpu_rounds.measure_rounds(config, make_tiny_dataset())
    assert result["seconds_per_round"] > 0
    assert result["images_per_second_of_whole_rounds"] > 0
    assert 0 < result["share_outside_training"] < 1
    assert result["extra_time_with_a_state_per_epoch"] > -1


def test_images_of_the_random_dataset_depend_on_their_class():
    dataset = gpu_rounds.make_dataset(200, (4, 4, 3), 10)
    images, labels = np.asarray(dataset.train.images), np.asarray(dataset.train.labels)
    means = [images[labels == label].mean() for label in range(10)]
    np.testing.assert_allclose(np.diff(means), 15, atol=9)
    assert dataset.test.examples == 40


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gpu"], "error: no GPU is visible: nvidia-smi lists none"),
        (["gpu", "--minutes=0.5"], "error: --minutes is 0.5; it should be at least 1"),
        (["lenet", "--minutes=5"], "error: --minutes is for gpu; lenet does not use it"),
    ],
)
def test_wrong_calls_raise_one_sentence(monkeypatch, arguments, sentence):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as error:
        benchmark.main()
    assert str(error.value).startswith(sentence)


def test_the_folder_of_the_table_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="whose folder does not exist"):
        measure.benchmark_gpu(8, str(tmp_path / "absent" / "gpu.json"))
    (tmp_path / "gpu.json").touch()
    with pytest.raises(UserError, match="which exists; move it away"):
        measure.benchmark_gpu(8, str(tmp_path / "gpu.json"))
