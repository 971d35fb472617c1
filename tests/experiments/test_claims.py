"""The claims, judged on made-up tables."""

import dataclasses
import sys

import pandas as pd
import pytest
from scipy import stats

from experiments import claims as command
from experiments.paper import claims_report as claims
from experiments.paper import evidence, quantities, repellent
from experiments.paper.claims_report import FAILS, HOLDS, UNDECIDED, UNKNOWN
from experiments.paper.quantities import HIGH, LOW, MEDIUM, VERY_HIGH
from experiments.paper.scales import MINI, PAPER
from imp_jax import config_files
from tests.helpers.tables import tables

RUN = MINI.lenet


def make_paper_like_tables(run):
    """Make tables of a run of `PAPER` on which all claims of the paper hold."""
    config = run.config
    unstable = run.base == "resnet20" and config.batch_size == PAPER.unstable
    strength = config.repulsion.strength
    rewound = bool(config.rewind_step)
    without_decay = config.optimizer.weight_decay == 0

    def accuracy(arm, replicate, number):
        if arm == "reinit":
            return 0.8 - 0.1 * (strength < 0) + 0.001 * replicate
        if strength > 0:
            return 0.8
        if unstable:
            return 0.8 - 0.001 + 0.05 * (strength < 0) + 0.1 * rewound
        return 0.9 - 0.02 * max(0, number - 15 - 3 * without_decay)

    def threshold(arm, replicate, number):
        return 0.1 if arm == "reinit" else 0.2 + 0.01 * min(number, 24 - number + 6 * without_decay)

    def angle(arm, round_a, round_b):
        if config.repulsion.memory == "last":
            return 0.2 if (round_a - round_b) % 2 == 0 else 0.95
        if arm == "reinit" or unstable:
            return 0.95
        return 0.1 if 5 <= max(round_a, round_b) <= 15 else 0.3

    return tables(
        run,
        accuracy,
        threshold,
        angle,
        barrier=lambda number: 0.001 if 5 <= number <= 15 else 0.1,
        instability=lambda number: (0.2 if unstable else 0.005) + 0.01 * (number != 10),
        counts=lambda arm: (3, 9, 1, 9, 3) if arm == "imp" else (1, 5, 9, 5, 1),
    )


@pytest.fixture(scope="module")
def finished():
    """Return paper-like tables of all runs of the scale `PAPER`, by run."""
    return {run: make_paper_like_tables(run) for run in claims.list_claim_runs(PAPER)}


def test_bands_of_density_contain_the_documented_rounds():
    rounds = [[n for n in range(25) if low <= 0.8**n < high] for low, high in (LOW, MEDIUM, HIGH, VERY_HIGH)]
    assert rounds == [[*range(5)], [*range(5, 16)], [*range(16, 21)], [*range(21, 25)]]


def test_quantities_are_means_over_rounds_for_each_replicate():
    def accuracy(arm, replicate, number):
        return 0.5 + 0.01 * number * (arm == "imp") + 0.1 * replicate

    run = tables(
        RUN,
        accuracy,
        threshold=lambda arm, r, n: (2.0 if arm == "imp" else 0.5) + 0 * r,
        angle=lambda arm, a, b: abs(a - b) * (0.1 if arm == "imp" else 0.3) + 0.01 * max(a, b),
        barrier=lambda n: 0.001 * n,
        instability=lambda n: 0.002 * n,
        counts=lambda arm: (0, 8, 2, 5, 0) if arm == "imp" else (0, 0, 7, 0, 0),
    )
    expected = [
        (quantities.accuracy(run, "imp", MEDIUM), [60, 70, 80]),  # the mean round of 5 to 15 is 10
        (quantities.accuracy(run, "imp", MEDIUM, HIGH), [62.5, 72.5, 82.5]),  # of 5 to 20 it is 12.5
        (quantities.imp_minus_reinit(run, HIGH), [18] * 3),
        (quantities.threshold_ratio(run, MEDIUM), [4] * 3),
        (quantities.instability(run, 10), [2] * 3),
        (quantities.barrier(run, LOW), [0.25] * 3),  # of the paths to rounds 1 to 4
        (quantities.barrier(run, VERY_HIGH), [2.25] * 3),
        (quantities.angle(run, "imp", LOW), [0.1 + 0.025] * 3),
        (quantities.angle(run, "reinit", VERY_HIGH, apart=2), [0.6 + 0.225] * 3),
        (quantities.zero_bin_over_peak(run, "imp"), [0.25] * 3),
        (quantities.zero_bin_over_peak(run, "reinit"), [1] * 3),
    ]
    for values, numbers in expected:
        assert values.tolist() == pytest.approx(numbers)
        assert values.index.tolist() == [0, 1, 2]


def test_rounds_of_the_end_of_the_plateau_and_of_the_highest_threshold():
    run = tables(
        RUN,
        accuracy=lambda arm, r, n: 0.9 - (0.0099 if n <= 12 + r else 0.0101) * (n > 0) + 0.05 * (n == 3),
        threshold=lambda arm, r, n: -abs(n - 7 - r) if arm == "imp" else n,
    )
    assert quantities.plateau_end_round(run).tolist() == [12, 13, 14]
    assert quantities.threshold_peak_round(run).tolist() == [7, 8, 9]
    assert quantities.threshold_peak_round(tables(RUN, rounds=20)).isna().all()  # it may still rise


def test_all_claims_hold_on_tables_like_those_of_the_paper(finished):
    rows = claims.measure_claims(PAPER, finished)
    assert [(row.claim.id, row.quantity.words) for row in rows if row.verdict != HOLDS] == []
    assert list(dict.fromkeys(row.claim.id for row in rows)) == [f"C{n}" for n in range(1, 12)]


def test_a_claim_fails_if_one_of_its_quantities_fails(finished):
    stable = PAPER.make_resnet20_run(PAPER.stable)
    worse = finished | {
        stable: tables(
            stable, lambda arm, r, n: 0.9 - (0.1 if n > 15 and arm == "imp" else -0.01 * (arm == "imp"))
        )
    }
    rows = [row for row in claims.measure_claims(PAPER, worse) if row.claim.id == "C1"]
    assert [row.verdict for row in rows] == [HOLDS, FAILS]
    assert claims.judge_claim(rows) == "does not hold (1 of 2 hold)"
    assert rows[0].mean == pytest.approx(1)
    assert rows[1].high == pytest.approx(-10)


def test_a_claim_cannot_be_told_if_one_replicate_deviates(finished):
    stable = PAPER.make_resnet20_run(PAPER.stable)
    lead = {0: 0.1, 1: 0.1, 2: -0.01}
    mixed = tables(stable, lambda arm, r, n: 0.8 + lead[r] * (arm == "imp"))
    rows = [row for row in claims.measure_claims(PAPER, finished | {stable: mixed}) if row.claim.id == "C1"]
    row = rows[0]
    assert (row.mean, row.low, row.high) == pytest.approx((19 / 3, -1, 10))
    deviation = (2 * (11 / 3) ** 2 + (22 / 3) ** 2) ** 0.5 / 2**0.5
    assert (row.error, row.effect) == pytest.approx((deviation / 3**0.5, 19 / 3 / deviation))
    assert row.verdict == UNDECIDED
    assert claims.judge_claim(rows) == "cannot be told"
    one_holds = [rows[0], rows[1]._replace(verdict=HOLDS)]
    assert claims.judge_claim(one_holds) == "cannot be told (1 of 2 hold)"
    assert claims.judge_claim([rows[0], rows[1]._replace(verdict=FAILS)]) == "does not hold"


@pytest.mark.parametrize("shift", [-3, -1, -0.5, 0, 0.5, 1, 3])
def test_verdicts_are_those_of_one_sided_t_tests(shift):
    values = pd.Series([0.1, 0.7, -0.4, 0.2]) + shift

    def is_significant(limit, alternative):
        return stats.ttest_1samp(values, limit, alternative=alternative).pvalue < 0.05

    above, below = is_significant(0, "greater"), is_significant(0, "less")
    expected = HOLDS if above else FAILS if below else UNDECIDED
    assert claims.judge_quantity(values, evidence.expect_above(0)) == expected
    opposite = {HOLDS: FAILS, FAILS: HOLDS}.get(expected, UNDECIDED)
    assert claims.judge_quantity(values, evidence.expect_below(0)) == opposite
    within = is_significant(-2, "greater") and is_significant(2, "less")
    outside = is_significant(-2, "less") or is_significant(2, "greater")
    expected = HOLDS if within else FAILS if outside else UNDECIDED
    assert claims.judge_quantity(values, evidence.expect_within(2)) == expected


def test_equal_values_at_the_limit_do_not_hold():
    assert claims.judge_quantity(pd.Series([0.0, 0.0, 0.0]), evidence.expect_above(0)) == FAILS
    assert claims.judge_quantity(pd.Series([0.1, 0.1, 0.1]), evidence.expect_above(0)) == HOLDS


def test_histograms_are_of_the_density_of_round_10():
    for fraction, number in ((0.2, 10), (0.36, 5), (0.5, 3)):
        config = MINI.lenet.with_overrides(pruning__fraction=fraction).config
        assert quantities.find_round(config, quantities.HISTOGRAM_DENSITY) == number


def test_too_little_data_gives_no_verdict(finished):
    assert {row.verdict for row in claims.measure_claims(PAPER, {})} == {UNKNOWN}
    stable = PAPER.make_resnet20_run(PAPER.stable)
    unfinished = finished | {stable: tables(stable, rounds=18)}
    verdicts = [row.verdict for row in claims.measure_claims(PAPER, unfinished) if row.claim.id == "C1"]
    assert verdicts[1] == UNKNOWN  # round 20 is missing
    empty_tables = {name: table.iloc[:0] for name, table in tables(stable).tables.items()}
    not_analysed = dataclasses.replace(tables(stable), tables=empty_tables)
    rows = claims.measure_claims(PAPER, finished | {stable: not_analysed})
    rows = [row for row in rows if stable in row.quantity.runs]
    assert [row.verdict for row in rows if row.claim.id in ("C3", "C7", "C10")] == [UNKNOWN] * 7
    complete = tables(stable)
    one = dataclasses.replace(complete, results=complete.results.query("replicate == 0"))
    assert claims.measure_claims(PAPER, finished | {stable: one})[0].verdict == UNKNOWN
    two = dataclasses.replace(complete, results=complete.results.query("replicate < 2"))  # the third diverged
    assert claims.measure_claims(PAPER, finished | {stable: two})[0].verdict == FAILS  # both show no lead


def test_repulsion_is_measured_against_the_lead_without_it(finished):
    plain, repelled = repellent.list_lenet_runs(PAPER)
    plain_accuracy = {"imp": 0.9, "reinit": 0.7}
    repelled_accuracy = {"imp": 0.75, "reinit": 0.68}
    changed = finished | {
        plain: tables(plain, lambda arm, r, n: plain_accuracy[arm]),
        repelled: tables(repelled, lambda arm, r, n: repelled_accuracy[arm]),
    }
    rows = [row for row in claims.measure_claims(PAPER, changed) if row.claim.id == "C4"]
    lead, remaining, control = rows[3:6]
    assert (lead.mean, lead.verdict) == (pytest.approx(20), HOLDS)
    assert (remaining.mean, remaining.verdict) == (pytest.approx(25), FAILS)  # 5 of 20 points are left
    assert (control.mean, control.verdict) == (pytest.approx(-2), FAILS)


def test_repulsion_that_pushes_imp_far_below_reinit_fails(finished):
    plain, repelled = repellent.list_lenet_runs(PAPER)
    plain_tables = tables(plain, lambda arm, r, n: 0.9 if arm == "imp" else 0.7)
    repelled_tables = tables(repelled, lambda arm, r, n: 0.3 if arm == "imp" else 0.7)
    changed = finished | {plain: plain_tables, repelled: repelled_tables}
    verdicts = [row.verdict for row in claims.measure_claims(PAPER, changed) if row.claim.id == "C4"][3:6]
    assert verdicts == [HOLDS, FAILS, HOLDS]


def test_a_network_that_stands_for_several_is_measured_once():
    (repelled,) = [claim for claim in claims.CLAIMS if claim.id == "C4"]
    assert len(repelled.quantities(PAPER)) == 9
    assert len(repelled.quantities(MINI)) == 6
    assert "LeNet" in repelled.quantities(MINI)[3].words


def test_the_table_is_markdown_and_names_its_runs_by_letters(finished):
    lines = claims.format_claims(PAPER, finished).splitlines()
    assert {line.count("|") for line in lines[: lines.index("")]} == {10}
    assert (
        "| **C1** | **Stable IMP beats its reinit at medium and high sparsity** | | | | | | **holds** | |"
        in lines
    )
    assert (
        "| | IMP − reinit at medium sparsity (points) | 9.9 ± 0.1 | 9.8 | 10.0 | > 0 | +99.0 | holds | a |"
        in lines
    )
    assert "Runs: a: `resnet20,batch_size=2048`, b: `resnet20`" in lines[-1]


def run_claims(*arguments):
    """Run `python -m experiments.claims` with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["claims", *map(str, arguments)])
        command.main()


def test_the_scale_is_that_of_the_runs_in_the_folder(tmp_path, capsys):
    with pytest.raises(SystemExit, match="holds no run that a claim is about; choose the scale with --scale"):
        run_claims(f"--root={tmp_path}")
    run = MINI.make_resnet20_run(MINI.stable)
    workdir = tmp_path / run.name
    (workdir / "analysis").mkdir(parents=True)
    (workdir / "config.json").write_text(config_files.to_json(run.config))
    with pytest.raises(SystemExit, match="nothing that the claims are about has been run in"):
        run_claims(f"--root={tmp_path}")
    pd.DataFrame(tables(run).results).to_csv(workdir / "results.csv", index=False)
    run_claims(f"--root={tmp_path}")
    out = capsys.readouterr().out
    assert "C11" in out
    assert f"{run.name}\n" in out
    assert "too little data" in (tmp_path / "claims.md").read_text()
    (tmp_path / MINI.lenet.name).mkdir()  # a run of midi, too
    assert claims.choose_scale(tmp_path, None) is MINI
    (tmp_path / PAPER.lenet.name).mkdir()
    with pytest.raises(SystemExit, match="holds runs of the scales paper, mini; choose the scale with --scale"):
        run_claims(f"--root={tmp_path}")
