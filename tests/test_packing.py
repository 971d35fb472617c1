"""Runs that train in one program: their results are those of single runs, to the bit."""

import contextlib

import jax
import pandas as pd
import pytest

from imp_jax import analysis, packing, runs, training
from imp_jax.divergence import DivergedError
from imp_jax.errors import UserError
from imp_jax.runtime import compilation
from imp_jax.runtime.signals import GracefulStop, Stopped
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.rounds import assert_trees_close, assert_trees_equal

DIFFERENT = (  # runs that may train together
    {"seed": 3, "optimizer.learning_rate": 0.01, "optimizer.weight_decay": 1e-3},
    {"optimizer.warmup_epochs": 1.0, "optimizer.weight_decay": 1e-2},
)
STRENGTHS = (2.0, -1.0)


def make_configs(count=2, strengths=(0, 0), **shared):
    return [
        make_tiny_config(**different, **{"repulsion.strength": float(strength)}, **shared)
        for different, strength in list(zip(DIFFERENT, strengths, strict=True))[:count]
    ]


def train_together(configs, folder, **options):
    folders = [folder / str(i) for i in range(len(configs))]
    return folders, packing.run_together(configs, folders, dataset=make_tiny_dataset(), **options)


def train_alone(configs, folder):
    folders = [folder / str(i) for i in range(len(configs))]
    for config, workdir in zip(configs, folders, strict=True):
        runs.run(config, workdir, dataset=make_tiny_dataset())
    return folders


def assert_workdirs_equal(one, other):
    """Compare the tables and all networks, to the bit."""
    tables = (pd.read_csv(workdir / "results.csv").drop(columns="seconds") for workdir in (one, other))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    with contextlib.closing(Checkpoints(one)) as a, contextlib.closing(Checkpoints(other)) as b:
        assert a.rounds() == b.rounds() != []
        for number in a.rounds():
            assert_trees_equal(a.restore(number), b.restore(number))
            assert_trees_equal(a.next_masks(number), b.next_masks(number))


@pytest.fixture
def trained_members(monkeypatch):
    """Record the number of members of every call of `training.train_and_evaluate`."""
    members, train = [], training.train_and_evaluate

    def record(states, *arguments, **options):
        result = train(states, *arguments, **options)
        members.append(result[1].loss.shape[1])
        return result

    monkeypatch.setattr(training, "train_and_evaluate", record)
    return members


def test_packed_runs_equal_single_runs_to_the_bit(tmp_path, trained_members):
    """With twins, rewinding and evaluations after epochs."""
    shared = {"rewind_step": 3, "instability.rounds": (1,), "evaluate_epochs": True, "rounds": 2}
    configs = make_configs(2, **shared)
    packed, errors = train_together(configs, tmp_path / "packed")
    assert errors == [None] * 2
    # two replicates of two arms, in round 1 also twins; an epoch is cut at the rewind step
    assert trained_members == [2 * 4, 2 * 4, 2 * 4, 2 * 6, 2 * 6, 2 * 6]
    for one, other in zip(packed, train_alone(configs, tmp_path / "single"), strict=True):
        assert_workdirs_equal(one, other)


@pytest.mark.parametrize("execution", ["scan_vmap", "step_unroll"])
def test_packed_runs_with_repulsion_equal_single_runs_to_rounding(tmp_path, trained_members, execution):
    """The stores of earlier optima have other sizes, so that sums differ in rounding."""
    configs = make_configs(2, STRENGTHS, rounds=3, execution=execution, replicates=1)
    packed, errors = train_together(configs, tmp_path / "packed")
    assert errors == [None] * 2
    assert trained_members == [2 * 2] * 2 * 3
    for one, other in zip(packed, train_alone(configs, tmp_path / "single"), strict=True):
        with contextlib.closing(Checkpoints(one)) as a, contextlib.closing(Checkpoints(other)) as b:
            for number in range(3):
                assert_trees_equal(a.restore(number).mask, b.restore(number).mask)
                assert_trees_close(a.restore(number).trained, b.restore(number).trained)
        for column in ("repulsion", "cosine"):
            packed_values, values = (pd.read_csv(workdir / "results.csv")[column] for workdir in (one, other))
            pd.testing.assert_series_equal(packed_values, values, rtol=1e-3, atol=1e-5)


def test_runs_at_different_rounds_train_together_too(tmp_path, trained_members):
    """A run that was stopped goes on beside a new one."""
    configs = make_configs(2, rounds=2)
    runs.run(make_configs(1, rounds=1)[0], tmp_path / "packed" / "0", dataset=make_tiny_dataset())
    packed, errors = train_together(configs, tmp_path / "packed")
    assert errors == [None] * 2
    # round 0 alone; round 1 beside round 0 of the other run; round 1 of that
    assert trained_members == [4, 4, 8, 8, 4, 4]
    for one, other in zip(packed, train_alone(configs, tmp_path / "single"), strict=True):
        assert_workdirs_equal(one, other)


def test_a_run_that_fails_does_not_end_the_others(tmp_path):
    configs = make_configs(2, rounds=1)
    (tmp_path / "packed" / "0").mkdir(parents=True)
    (tmp_path / "packed" / "0" / "config.json").write_text("{}")
    packed, errors = train_together(configs, tmp_path / "packed")
    assert isinstance(errors[0], UserError)
    assert errors[1] is None
    (single,) = train_alone(configs[1:], tmp_path / "single")
    assert_workdirs_equal(packed[1], single)


def test_an_error_of_the_program_is_that_of_all_its_runs(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("too many members")

    monkeypatch.setattr(training, "train_and_evaluate", fail)
    _, errors = train_together(make_configs(2), tmp_path)
    assert [str(error) for error in errors] == ["too many members"] * 2


def test_a_signal_stops_all_runs_and_each_can_be_resumed_alone(tmp_path, monkeypatch):
    configs = make_configs(2, checkpoint_every_epochs=1, rounds=2)
    stop, calls, train = GracefulStop(), [], training.train_and_evaluate

    def train_and_signal(*arguments, **options):
        calls.append(arguments)
        stop.requested = 15 if len(calls) == 3 else stop.requested  # after the first epoch of round 1
        return train(*arguments, **options)

    monkeypatch.setattr(training, "train_and_evaluate", train_and_signal)
    packed, errors = train_together(configs, tmp_path / "packed", stop=stop)
    assert all(isinstance(error, Stopped) for error in errors)
    assert len(calls) == 3
    monkeypatch.undo()
    for config, workdir in zip(configs, packed, strict=True):
        runs.run(config, workdir, dataset=make_tiny_dataset())
    for one, other in zip(packed, train_alone(configs, tmp_path / "single"), strict=True):
        assert_workdirs_equal(one, other)


def test_the_time_of_compilation_is_that_of_every_run(tmp_path, monkeypatch):
    """Also of the runs whose threads wait while another one compiles; it is not time of training."""
    seconds = []

    class TimedPack(packing.Pack):
        def train(self, run, *arguments, **options):
            before = compilation.compile_seconds()
            result = super().train(run, *arguments, **options)
            seconds.append(compilation.compile_seconds() - before)
            return result

    monkeypatch.setattr(packing, "Pack", TimedPack)
    train_together(make_configs(2, batch_size=11, rounds=1), tmp_path)  # a batch size that no other test uses
    first, second = seconds[:2]
    assert first > 0.05
    assert first == pytest.approx(second)


@pytest.mark.parametrize(
    ("different", "sentence"),
    [
        ({"epochs": 3}, "epochs is 2 in one run and 3 in another; .* should differ only in seed, optimizer"),
        ({"repulsion.strength": 2.0}, "strength is 0 in one run and 2 in another; .* should be 0 in all or in"),
        ({"optimizer.weight_decay": 0.0}, "optimizer.weight_decay is 0.001 in one run and 0 in another"),
        ({"execution": "tune"}, "execution is 'auto' in one run and 'tune' in another"),
        ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate is -1.0; it should be above 0"),
    ],
)
def test_runs_that_differ_in_more_are_refused(tmp_path, different, sentence):
    configs = [make_tiny_config(**DIFFERENT[0]), make_tiny_config(**(DIFFERENT[1] | different))]
    with pytest.raises(UserError, match=sentence):
        train_together(configs, tmp_path)
    with pytest.raises(UserError, match="there are no configs"):
        train_together([], tmp_path)
    tuned = [make_tiny_config(**different, execution="tune") for different in DIFFERENT]
    with pytest.raises(UserError, match="execution is 'tune'; runs that train together should have auto"):
        train_together(tuned, tmp_path)
    requested = [make_tiny_config(**different, **{"analysis.also": ("absent",)}) for different in DIFFERENT]
    with pytest.raises(UserError, match=r"analysis.also is \('absent',\)"):
        train_together(requested, tmp_path, analyses=analysis)
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several processes train together"):
        train_together(make_configs(2), tmp_path)


def test_a_run_that_diverges_does_not_change_the_other(tmp_path):
    """All its members diverge; it ends, and the other run trains on alone."""
    diverging = make_tiny_config(**(DIFFERENT[0] | {"optimizer.learning_rate": 1e30, "on_divergence": "drop"}))
    good = make_tiny_config(**DIFFERENT[1], on_divergence="drop")
    packed, errors = train_together([diverging, good], tmp_path / "packed")
    assert isinstance(errors[0], DivergedError)
    assert errors[1] is None
    (single,) = train_alone([good], tmp_path / "single")
    assert_workdirs_equal(packed[1], single)


def test_a_signal_between_the_checks_of_two_runs_stops_both_at_one_step(tmp_path, monkeypatch):
    """A signal counts from the end of the next steps on, so that no run trains on without the others."""
    stop, members, train = GracefulStop(), [], training.train_and_evaluate

    def record(states, *arguments, **options):
        result = train(states, *arguments, **options)
        members.append(result[1].loss.shape[1])
        return result

    def signal_between(end):
        stop.requested = 15 if end.round == 0 else 0

    monkeypatch.setattr(training, "train_and_evaluate", record)
    original = runs.run

    def run(*arguments, **options):
        original(*arguments, **options, on_epoch=[signal_between])  # after the check of its run

    monkeypatch.setattr(runs, "run", run)
    _, errors = train_together(make_configs(2), tmp_path, stop=stop)
    assert all(isinstance(error, Stopped) for error in errors)
    assert members == [8, 8]


def test_an_interrupt_without_a_handler_stops_all_runs(tmp_path, monkeypatch):
    """As Ctrl-C does in a notebook."""
    join, calls = packing._join, []

    def interrupt(threads):
        calls.append(threads)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(threads)

    monkeypatch.setattr(packing, "_join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_together(make_configs(2), tmp_path)
    assert len(calls) == 2
    assert not any(thread.is_alive() for thread in calls[0])
