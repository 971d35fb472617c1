"""The experiments of the literature: their runs and branches, and verdicts on made-up tables."""

import sys

import matplotlib.figure
import pytest

from experiments.literature import at_initialisation, comparison, controls, effort, precision, signs, transfer
from experiments.literature.comparison import NO_LEAD, TOO_LITTLE, Comparison, Series, judge, part_of_lead
from experiments.paper import catalogue, commands
from experiments.paper.panels import NOT_RUN
from experiments.paper.scales import MINI, PAPER, SCALES, SMOKE
from experiments.sweeps import launchers
from experiments.sweeps.runs import Branch
from experiments.sweeps.sweep import Sweep
from imp_jax import branch, config_files
from tests.helpers.tables import tables

FIGURES = [figure for group in catalogue.LITERATURE for figure in group.FIGURES]
BRANCHES = [
    run for scale in SCALES.values() for run in catalogue.list_runs(FIGURES, scale) if isinstance(run, Branch)
]
# by arm: accuracy in the rounds of a band; imp leads reinit by 10 points
ACCURACY = {"imp": 0.9, "reinit": 0.8, "signs": 0.89, "magnitudes": 0.81, "constant": 0.85}
ACCURACY |= {"trained_signs": 0.7}


def make_tables(run, scale_of_noise=0.0, accuracy=ACCURACY):
    return tables(run, accuracy=lambda arm, r, n: accuracy.get(arm, 0.5) + scale_of_noise * (r - 1))


def compare_signs(finished):
    return {one.words: one for one in controls.compare(MINI, signs.make_branch(MINI), signs.EXPECTED)}


def test_the_part_of_the_lead_is_that_of_the_mean_accuracies():
    finished = {run: make_tables(run) for run in signs.list_runs(MINI)}
    for band in comparison.BANDS:
        parts = {name: part_of_lead(one, finished, band) for name, one in compare_signs(finished).items()}
        assert {name: part.round(6).unique().tolist() for name, part in parts.items()} == {
            **{"IMP": [100], "random reinitialisation": [0], "signs": [90]},
            **{"magnitudes": [10], "constant": [50], "trained_signs": [-100]},
        }
        assert [judge(part) for part in parts.values()] == [
            *("reaches IMP", "like reinit", "reaches IMP", "like reinit", "between", "below reinit")
        ]


def test_the_table_states_ranges_and_the_predictions_of_the_literature():
    trunk, arms = signs.list_runs(MINI)
    finished = {trunk: make_tables(trunk), arms: make_tables(arms, 0.01)}
    rows = [[cell.strip() for cell in line.split("|")] for line in signs.tabulate(MINI, finished).splitlines()]
    by_arm = {row[1]: row[2:-1] for row in rows}
    assert by_arm["signs"][:4] == [
        *("89.0 (88.0 to 90.0)", "90 (80 to 100)", "reaches IMP", "mean > 75: agrees")
    ]
    assert by_arm["magnitudes"][7] == "mean < 25: agrees"
    assert by_arm["constant"][3] == "mean > 75: differs"


def test_only_rounds_of_the_branch_within_the_band_count():
    trunk, arms = controls.list_runs(MINI)
    high = 0.8 ** min(number for number in arms.numbers if 0.8**number < 0.03)

    def accuracy(arm, replicate, number):
        if number not in arms.numbers:
            return 0.0  # would change every mean
        return {"imp": 0.9, "reinit": 0.8}.get(arm, 0.9 if 0.8**number <= high else 0.8)

    finished = {run: tables(run, accuracy=accuracy) for run in (trunk, arms)}
    (one,) = (one for one in controls.compare(MINI, arms) if one.words == "shuffled")
    assert part_of_lead(one, finished, "medium").round(6).tolist() == [0, 0, 0]
    assert part_of_lead(one, finished, "high").round(6).tolist() == [100, 100, 100]


def test_without_a_lead_or_with_too_few_replicates_there_is_no_verdict():
    trunk, arms = signs.list_runs(MINI)
    (one,) = (one for name, one in compare_signs({}).items() if name == "signs")
    level = {run: make_tables(run, accuracy={"imp": 0.8, "reinit": 0.8, "signs": 0.8}) for run in (trunk, arms)}
    assert part_of_lead(one, level, "medium") == NO_LEAD
    assert part_of_lead(one, {}, "medium") == TOO_LITTLE
    assert part_of_lead(one, {trunk: make_tables(trunk)}, "medium") == TOO_LITTLE
    first_rounds = {trunk: make_tables(trunk), arms: tables(arms, rounds=9)}
    assert part_of_lead(one, first_rounds, "high") == TOO_LITTLE
    assert judge(NO_LEAD) == NO_LEAD


def test_shuffling_loses_accuracy_or_has_no_effect():
    finished = {run: make_tables(run) for run in at_initialisation.list_runs(MINI)}
    run = at_initialisation.make_run(MINI, "snip")
    finished[run] = make_tables(run, accuracy={"imp": 0.9, "shuffled": 0.905, "reinit": 0.85})
    rows = [line.split("|") for line in at_initialisation.tabulate(MINI, finished).splitlines()]
    (snip,) = ([cell.strip() for cell in row] for row in rows if "SNIP" in row[1])
    assert snip[2:7] == [
        *("90.0 (90.0 to 90.0)", "+0.5 (+0.5 to +0.5)", "no effect", "-5.0 (-5.0 to -5.0)", "loses")
    ]


def test_methods_at_initialisation_have_the_fields_of_their_names():
    config = at_initialisation.make_run(PAPER, "synflow").config
    assert (config.pruning.network, config.pruning.score, config.pruning.steps) == ("initial", "synflow", 100)
    assert config.arms == ("imp", "shuffled", "reinit")


@pytest.mark.parametrize("figure", [f for f in FIGURES if f.name != "bfloat16"], ids=lambda figure: figure.name)
def test_every_experiment_has_a_figure_and_a_table(figure):
    panels = {"controls": 3, "at_initialisation": 5, "signs": 1, "transfer": 2, "effort": 2}[figure.name]
    finished = {run: make_tables(run) for run in figure.runs(MINI)}
    drawn = figure.draw(MINI, finished)
    assert isinstance(drawn, matplotlib.figure.Figure)
    assert len(drawn.axes) == panels
    assert not [text for axes in drawn.axes for text in axes.texts]
    lines = sum(len(axes.containers) for axes in drawn.axes)
    expected = {"controls": 14 + 3 * 2, "at_initialisation": 15, "signs": 6, "transfer": 4 + 3, "effort": 8}
    assert lines == expected[figure.name]
    assert TOO_LITTLE not in figure.table(MINI, finished)
    empty = figure.draw(MINI, {})
    assert [text.get_text() for axes in empty.axes for text in axes.texts] == [NOT_RUN] * panels
    assert TOO_LITTLE in figure.table(MINI, {})


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_run_comes_before_its_branches(figure):
    for scale in SCALES.values():
        runs = figure.runs(scale)
        for index, run in enumerate(runs):
            assert set(run.needs) <= set(runs[:index])


def test_the_command_of_a_branch_makes_its_config(tmp_path, monkeypatch):
    """The command line, parsed by `imp_jax.branch`, gives the config by which a sweep knows the branch."""
    for run in BRANCHES:
        _, *command = run.command(tmp_path / run.folder, "/data")
        assert command[:2] == ["-m", "imp_jax.branch"]
        received = []

        def receive(*arguments, received=received, **_):
            received.append(arguments)
            raise branch.UserError("received")

        monkeypatch.setattr(branch, "run", receive)
        monkeypatch.setattr(branch, "stored_config", lambda workdir, run=run: run.trunk.config)
        monkeypatch.setattr(branch, "stored_config_file", lambda *_, **__: None)
        with pytest.raises(SystemExit, match="received"):
            branch.main(command[2:])
        ((workdir, arms, rounds, name, mask_from, overrides),) = received
        assert workdir == tmp_path / run.trunk.folder
        config = branch.make_config(run.trunk.config, arms, rounds, name, mask_from, overrides)
        assert config_files.differences(run.config, config.to_dict()) == []
        assert config.dataset.data_dir == "/data"
        assert workdir / "branches" / name == tmp_path / run.folder


def test_a_branch_starts_after_its_runs(tmp_path, monkeypatch):
    """Two workers: the run of another seed trains beside the trunk, and a branch that needs both waits."""
    trunk, other_seed, _, needs_both, *_ = transfer.list_runs(SMOKE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for kind in (type(trunk), Branch):
        monkeypatch.setattr(kind, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(0.5)"])
    lines = []
    assert launchers.train_locally(Sweep(tmp_path), [needs_both, trunk, other_seed], None, lines.append) == 0
    order = [line.split()[:2] for line in lines]
    assert order[:2] == [["started", trunk.name], ["started", other_seed.name]]
    assert order[4:] == [["started", needs_both.name], ["done", needs_both.name]]


def test_branches_of_unfinished_runs_are_not_submitted(tmp_path, monkeypatch, capsys):
    trunk, arms = controls.list_runs(SMOKE)
    submitted = []
    monkeypatch.setattr(launchers, "submit_to_slurm", lambda _, runs, *__: submitted.append(runs) or ["1_0"])
    monkeypatch.setattr(commands, "check_data", lambda *_: None)
    commands.submit_to_slurm([trunk, arms], Sweep(tmp_path), None, {})
    assert submitted == [[trunk]]
    assert f"not submitted: {arms.name}, a branch; the same command submits it after {trunk.name}" in (
        capsys.readouterr().out
    )


def test_series_of_a_run_that_is_missing_are_empty():
    series = Series(MINI.trunk)
    assert series.measure({}, [1]).empty
    assert Comparison("", series, series, series, (1,)).expected is None


def test_a_branch_is_done_if_each_round_is_recorded_or_diverged(tmp_path):
    _, arms = controls.list_runs(SMOKE)
    sweep = Sweep(tmp_path)
    workdir = sweep.workdir(arms)
    assert workdir == tmp_path / SMOKE.trunk.name / "branches" / "controls"
    workdir.mkdir(parents=True)
    assert sweep.read_states([arms])[arms] == ("missing", 0, "")
    tables(arms, rounds=1).results.to_csv(workdir / "results.csv", index=False)
    (workdir / "report.html").touch()
    assert sweep.read_states([arms])[arms] == ("missing", 1, "")
    diverged = f"replicate,arm,round,step,what\n0,random,{arms.numbers[1]},4,nan\n"
    (workdir / "divergences.csv").write_text(diverged)
    assert sweep.read_states([arms])[arms] == ("done", 2, "")


def make_effort_tables(epochs, accuracy):
    """Return the tables of all runs of `effort`, with these epochs per round and accuracies in %, by name."""
    finished = {}
    for name, run in effort.make_runs(MINI).items():
        table = tables(run, accuracy=lambda arm, r, n, name=name: accuracy.get(name, 90) / 100 + 0.01 * (r - 1))
        table.results["epochs"] = [epochs.get(name, 10) if n else 10 for n in table.results["round"]]
        finished[run] = table
    return finished


def test_the_table_of_effort_states_what_is_saved_at_equal_accuracy():
    """Epochs are summed from the dense network on; the lowest replicate of full IMP is the limit."""
    accuracy = {"short": 88.9, "evidence": 89.1, "learning-rate rewinding": 93}
    finished = make_effort_tables({"short": 3, "evidence": 5}, accuracy)
    lines = effort.tabulate(MINI, finished).splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines)}
    assert rows["full"] == [*("90.0 (89.0 to 91.0)", "160", "–"), *("90.0 (89.0 to 91.0)", "250", "–")]
    assert rows["short"][:3] == ["88.9 (87.9 to 89.9)", str(10 + 15 * 3), "1.1 points lower"]
    assert rows["evidence"][1:3] == [str(10 + 15 * 5), "saves 47%"]
    assert rows["evidence"][4:] == [str(10 + 24 * 5), "saves 48%"]
    assert rows["learning-rate rewinding"][2] == "saves nothing, 3.0 points higher"
    assert rows["weight decay until 10 %"][2] == "saves nothing"


def test_effort_has_no_verdict_without_its_reference():
    finished = make_effort_tables({}, {})
    del finished[MINI.effort]
    lines = effort.tabulate(MINI, finished).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["full", *("–",) * 6]
    assert lines[5].split("|")[4].strip() == TOO_LITTLE


def test_weight_decay_is_compared_with_weight_decay():
    finished = make_effort_tables({}, {effort.DECAY: 80, "weight decay until 10 %": 79.5})
    assert "saves nothing" in effort.tabulate(MINI, finished).splitlines()[-1]


def test_bfloat16_is_compared_with_float32_replicate_by_replicate():
    exact, rounded = precision.list_runs(MINI)
    assert (exact.config.dtype, rounded.config.dtype) == ("float32", "bfloat16")
    finished = {
        exact: tables(exact, accuracy=lambda arm, replicate, number: 0.9 + 0.01 * replicate),
        rounded: tables(rounded, accuracy=lambda arm, replicate, number: 0.895 + 0.012 * replicate),
    }
    rows = [line.split(" | ") for line in precision.tabulate(MINI, finished).splitlines()[2:]]
    assert len(rows) == 5 * 3
    assert rows[0][0] == "| accuracy of IMP (%)"
    assert rows[0][1:] == ["low", "91.0 (90.0 to 92.0)", "90.7 (89.5 to 91.9)", "-0.3 (-0.5 to -0.1) |"]
    assert rows[6] == [
        "| threshold of IMP / reinit",
        "low",
        *["1.00 (1.00 to 1.00)"] * 2,
        "+0.00 (+0.00 to +0.00) |",
    ]
    drawn = precision.draw(MINI, finished)
    assert [axes.get_ylabel() for axes in drawn.axes] == [
        *("Test accuracy (%)", "Pruning threshold", "Angle to the round before")
    ]
    assert [len(axes.containers) for axes in drawn.axes] == [4, 4, 2]
    empty = precision.draw(MINI, {})
    assert [text.get_text() for axes in empty.axes for text in axes.texts] == [NOT_RUN] * 3
    assert "| – | – | – |" in precision.tabulate(MINI, {})
