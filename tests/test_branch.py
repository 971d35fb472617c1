"""Branches train arms on the masks of a run, with the same bits as beside imp."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

from imp_jax import analysis, arms, branch, imp, runs
from imp_jax import config as configs
from imp_jax.arms import ARMS, Arm
from imp_jax.errors import UserError
from imp_jax.runtime.signals import Stopped
from imp_jax.workdir.checkpoints import Checkpoints
from tests.conftest import make_tiny_config, make_tiny_dataset
from tests.helpers.rounds import assert_trees_equal, take_member
from tests.helpers.stops import StopsAtFirstCheck

CONTROLS = tuple(name for name in ARMS if name not in ("imp", "twin", "reinit"))
METRICS = ["density", "threshold", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]


def make_config(**overrides):
    return make_tiny_config(**{"instability.rounds": (), "epochs": 1, **overrides})


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """Return the workdir of a finished run of three rounds."""
    workdir = tmp_path_factory.mktemp("trunk") / "run"
    runs.run(make_config(), workdir, dataset=make_tiny_dataset())
    return workdir


@pytest.fixture
def own_trunk(trunk, tmp_path):
    """Return a copy of the run without branches."""
    return shutil.copytree(trunk, tmp_path / "run", ignore=shutil.ignore_patterns("branches"))


def assert_same_members(whole, part, loss_rtol=0.0):
    """Check that all networks and rows of the workdir `part` are in the workdir `whole`, to the bit.

    Args:
      loss_rtol: relative tolerance of the losses in the rows.
    """
    whole, part = analysis.load(whole), analysis.load(part)
    keys = ["replicate", "arm", "round"]
    rows, expected = (run.results.set_index(keys)[METRICS] for run in (part, whole))
    assert len(rows)
    exact = [column for column in METRICS if not (loss_rtol and column.endswith("_loss"))]
    assert expected.loc[rows.index, exact].equals(rows[exact])
    np.testing.assert_allclose(rows, expected.loc[rows.index], rtol=loss_rtol)
    for number in part.results["round"].unique():
        for i, member in enumerate(part.members(number)):
            j = whole.members(number).index(member)
            assert_trees_equal(take_member(part.round(number), i), take_member(whole.round(number), j))


@pytest.mark.parametrize(
    ("rewind_step", "controls"),
    [(0, CONTROLS), (3, ("shuffled", "permuted")), (None, ("random", "trained_signs"))],
)
def test_arms_of_a_branch_equal_those_beside_imp_to_the_bit(tmp_path, rewind_step, controls):
    dataset, fields = make_tiny_dataset(), {"rewind_step": rewind_step}
    beside, trunk = tmp_path / "beside", tmp_path / "trunk"
    runs.run(make_config(arms=("imp", "reinit", *controls), **fields), beside, dataset=dataset)
    runs.run(make_config(**fields), trunk, dataset=dataset)
    workdir = branch.run(trunk, controls, dataset=dataset)
    assert_same_members(beside, workdir)
    results = analysis.load(workdir).results
    rounds = {0, 1, 2} if rewind_step in (0, None) else {1, 2}  # other arms join imp within round 0
    assert set(results["round"]) == rounds
    assert len(results) == len(rounds) * len(controls) * 2


def test_stopped_branch_resumes_to_the_same_bits(own_trunk, monkeypatch):
    dataset = make_tiny_dataset()
    monkeypatch.setattr(branch, "members_that_fit", lambda experiment: 8)  # two groups, of 8 and of 4 members
    whole = branch.run(own_trunk, ("shuffled", "signs"), name="whole", dataset=dataset)
    stops = 0
    while True:
        try:
            resumed = branch.run(
                own_trunk, ("shuffled", "signs"), name="resumed", dataset=dataset, stop=StopsAtFirstCheck()
            )
            break
        except Stopped:
            stops += 1
    assert stops == 2  # each group once: its saved state is found again
    assert_same_members(whole, resumed)
    assert_same_members(resumed, whole)


def test_branch_records_the_epochs_of_all_its_rounds(tmp_path, monkeypatch):
    """With the same numbers as beside imp, also if it is stopped within a group of rounds."""
    dataset, fields = make_tiny_dataset(), {"epochs": 2, "evaluate_epochs": True}
    beside, trunk = tmp_path / "beside", tmp_path / "trunk"
    runs.run(make_config(arms=("imp", "shuffled"), **fields), beside, dataset=dataset)
    runs.run(make_config(**fields), trunk, dataset=dataset)
    monkeypatch.setattr(branch, "members_that_fit", lambda experiment: 4)  # two groups, of two rounds and one
    with pytest.raises(Stopped):
        branch.run(trunk, ("shuffled",), dataset=dataset, stop=StopsAtFirstCheck())
    epochs = analysis.load(branch.run(trunk, ("shuffled",), dataset=dataset)).epochs
    expected = analysis.load(beside).epochs.query("arm == 'shuffled'").reset_index(drop=True)
    pd.testing.assert_frame_equal(epochs, expected, rtol=1e-6)
    assert len(epochs) == 3 * 2 * 2


def test_number_of_groups_does_not_change_bits(own_trunk, monkeypatch, capsys):
    dataset = make_tiny_dataset()
    one = branch.run(own_trunk, ("random",), name="one", dataset=dataset)
    monkeypatch.setattr(branch, "members_that_fit", lambda experiment: 2)
    three = branch.run(own_trunk, ("random",), name="three", dataset=dataset)
    assert_same_members(one, three, loss_rtol=1e-6)  # on some processors, their sum depends on the group
    out = capsys.readouterr().out
    assert "on the masks of 3 rounds; 1 group of 6 members" in out
    assert "on the masks of 3 rounds; 3 groups of 2 members" in out


def test_arms_equal_those_beside_imp_if_masks_come_from_another_network(tmp_path):
    dataset, fields = make_tiny_dataset(), {"pruning.network": "initial", "pruning.score": "taylor"}
    fields["pruning.images"] = 20
    beside, trunk = tmp_path / "beside", tmp_path / "trunk"
    runs.run(make_config(arms=("imp", "shuffled"), **fields), beside, dataset=dataset)
    runs.run(make_config(**fields), trunk, dataset=dataset)
    assert_same_members(beside, branch.run(trunk, ("shuffled",), dataset=dataset))


def test_branch_keeps_the_images_of_its_run_for_arms_without_images(tmp_path):
    dataset = make_tiny_dataset()
    runs.run(make_config(rounds=2, arms=("imp", "snip"), **{"pruning.images": 20}), tmp_path, dataset=dataset)
    assert len(analysis.load(branch.run(tmp_path, ("shuffled",), dataset=dataset)).results) == 4


def test_branch_grows_with_its_run(own_trunk, tmp_path, capsys):
    dataset = make_tiny_dataset()
    workdir = branch.run(own_trunk, ("shuffled",), dataset=dataset)
    branch.run(own_trunk, ("shuffled",), dataset=dataset)
    assert "is finished: all 3 rounds are trained, nothing to do" in capsys.readouterr().out
    runs.run(make_config(rounds=5), own_trunk, dataset=dataset)
    assert branch.run(own_trunk, ("shuffled",), dataset=dataset) == workdir
    longer = tmp_path / "longer"
    runs.run(make_config(rounds=5, arms=("imp", "shuffled")), longer, dataset=dataset)
    assert_same_members(longer, workdir)
    assert set(analysis.load(workdir).results["round"]) == set(range(5))


def test_chosen_rounds_have_a_branch_of_their_own(own_trunk):
    workdir = branch.run(own_trunk, ("shuffled",), rounds=(2, 1), dataset=make_tiny_dataset())
    assert workdir.name == "shuffled,rounds=1-2"
    assert set(analysis.load(workdir).results["round"]) == {1, 2}
    assert list(analysis.load(own_trunk).branches) == ["shuffled,rounds=1-2"]


def test_masks_of_another_run_are_used_with_the_tickets_of_this_one(own_trunk, tmp_path):
    dataset, other = make_tiny_dataset(), tmp_path / "other"
    runs.run(make_config(seed=5), other, dataset=dataset)
    workdir = branch.run(own_trunk, ("imp", "reinit"), mask_from=other, dataset=dataset)
    assert workdir.name == "imp-reinit,mask_from=other"
    run, trunk, source = (analysis.load(path) for path in (workdir, own_trunk, other))
    dense = trunk.round(0)
    for number in range(3):
        for i, member in enumerate(run.members(number)):
            networks = take_member(run.round(number), i)
            mask = take_member(source.round(number).mask, source.members(number).index(member))
            assert_trees_equal(networks.mask, mask)
            ticket = take_member(dense.initial["params"], trunk.members(0).index(member))
            expected = jax.tree.map(lambda p, m: np.where(m, p, 0), ticket, mask)
            assert_trees_equal(networks.initial["params"], expected)


def test_overridden_fields_are_used_and_said_in_the_config(own_trunk):
    overrides = {"epochs": 2, "optimizer.learning_rate": 1e-3}
    workdir = branch.run(own_trunk, ("imp",), rounds=(1,), overrides=overrides, dataset=make_tiny_dataset())
    assert workdir.name == "imp,rounds=1,epochs=2,optimizer.learning_rate=0.001"
    config = json.loads((workdir / "config.json").read_text())
    assert (config["epochs"], config["optimizer"]["learning_rate"], config["arms"]) == (2, 1e-3, ["imp"])
    run, trunk = analysis.load(workdir), analysis.load(own_trunk)
    first, second = (take_member(r.round(1), 0) for r in (run, trunk))
    assert_trees_equal((first.initial, first.mask), (second.initial, second.mask))
    assert not np.array_equal(*(n.trained["params"]["Dense_0"]["kernel"] for n in (first, second)))


def test_branch_is_analysed_and_drawn_with_its_run(own_trunk, data_dir, monkeypatch):
    monkeypatch.setattr(analysis, "setup", lambda config, use_mesh: runs.setup(config, make_tiny_dataset()))
    workdir = branch.run(own_trunk, ("shuffled", "magnitudes"), dataset=make_tiny_dataset())
    analysis.run(workdir)
    analysis.run(own_trunk)
    tables = analysis.load(workdir).tables
    assert set(tables["distances"]["arm"]) == {"shuffled", "magnitudes"}
    assert set(tables["weights"]["round"]) == {0, 1, 2}
    assert "shuffled: test accuracy" in (workdir / "report.html").read_text()
    assert (own_trunk / "figures" / "branches.png").exists()
    assert 'alt="branches"' in (own_trunk / "report.html").read_text()
    labels = analysis.paper.results_with_branches(analysis.load(own_trunk))["arm"].unique()
    assert list(labels) == ["imp", "reinit", "shuffled", "magnitudes"]


def test_users_arm_trains_in_a_branch(own_trunk, monkeypatch):
    monkeypatch.setattr(arms, "ARMS", dict(ARMS))
    arms.register("negated", Arm(100, lambda i: jax.tree.map(lambda leaf: -leaf, i.ticket)))
    run = analysis.load(branch.run(own_trunk, ("negated",), dataset=make_tiny_dataset()))
    dense, networks = analysis.load(own_trunk).round(0), run.round(2)
    mask = networks.mask["Dense_0"]["kernel"]
    expected = np.where(mask, -np.asarray(dense.initial["params"]["Dense_0"]["kernel"])[:2], 0)
    np.testing.assert_array_equal(networks.initial["params"]["Dense_0"]["kernel"], expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"arms": ("shufled",)}, "there is no arm 'shufled'; there are imp, reinit, twin, shuffled"),
        ({"arms": ()}, "it should have at least one arm, without repetition"),
        ({"name": "a/b"}, "--name is 'a/b'; it should be the name of a folder: no slash, at most 200"),
        ({"rounds": (1, 7)}, "--rounds has 7; its mask or ticket is not on disk"),
        ({"overrides": {"rounds": 5}}, "--config.rounds is given; a branch has the rounds of its run"),
        ({"overrides": {"model.width": 2.0}}, "--config.model.width is given; a branch has the model.width"),
        ({"overrides": {"epoch": 5}}, "there is no config field epoch"),
        ({"overrides": {"epochs": 0}}, "epochs is 0; it should be at least 1"),
        ({"overrides": {"repulsion.strength": 2.0}}, "--config.repulsion.strength=0 should be given"),
        ({"overrides": {"seed": 1}}, "--config.seed is given; a branch has the seed of its run"),
        ({"overrides": {"on_divergence": "stop"}}, "a branch has the on_divergence of its run"),
        ({"overrides": {"mesh.member": 1}}, "a branch has the mesh.member of its run"),
        ({"overrides": {"execution": "scan"}}, "a branch has the execution of its run"),
        ({"mask_from": "nowhere"}, "has no finished round, whose mask a branch could use"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(own_trunk, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        branch.run(own_trunk, **{"arms": ("shuffled",), **arguments}, dataset=make_tiny_dataset())
    assert "\n" not in str(error.value)
    assert not (own_trunk / "branches").exists()


def test_permuted_needs_reinit_in_the_run(tmp_path):
    runs.run(make_config(arms=("imp",), rounds=1), tmp_path / "run", dataset=make_tiny_dataset())
    runs.run(make_config(arms=("imp",), rounds=2), tmp_path / "run", dataset=make_tiny_dataset())
    with pytest.raises(UserError, match="needs the dense network of reinit, and replicate 0 has none"):
        branch.run(tmp_path / "run", ("permuted",), dataset=make_tiny_dataset())


def test_a_run_cannot_be_started_as_a_branch(tmp_path):
    with pytest.raises(UserError, match=r"branches are trained by python -m imp_jax\.branch"):
        runs.run(make_config(**{"branch.name": "mine"}), tmp_path, dataset=make_tiny_dataset())


def test_command_trains_a_branch(own_trunk, monkeypatch, capsys):
    calls = {}

    def run(workdir, arms, rounds, name, mask_from, overrides, stop):
        calls.update(arms=arms, rounds=rounds, name=name, overrides=overrides)
        return workdir

    monkeypatch.setattr(branch, "run", run)
    monkeypatch.setattr(analysis, "run", lambda workdir: None)
    branch.main(
        [
            f"--workdir={own_trunk}",
            "--arms=shuffled,signs",
            "--rounds=1,2",
            "--config.optimizer.learning_rate=1e-2",
        ]
    )
    assert calls == {
        "arms": ["shuffled", "signs"],
        "rounds": (1, 2),
        "name": None,
        "overrides": {"optimizer.learning_rate": 0.01},
    }
    for arguments, sentence in (
        (["--rounds=1,x"], "--rounds is '1,x'; it should be rounds separated by commas, such as 1,5,10"),
        (["--config.epochs=many"], "epochs is 'many'; it should be of type int, like 25"),
        (["--config.epoch=2"], "there is no config field epoch"),
        (["--epochs=2"], "'--epochs=2' is not a flag; fields are set by --config.FIELD=VALUE"),
    ):
        with pytest.raises(SystemExit) as error, contextlib.redirect_stdout(None):
            branch.main([f"--workdir={own_trunk}", "--arms=shuffled", *arguments])
        assert str(error.value).startswith(f"error: {sentence}")


def test_members_of_a_group_fit_in_half_of_the_memory(tiny_experiment, monkeypatch):
    experiment = tiny_experiment(epochs=1)
    parameters = 16 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3
    monkeypatch.setattr(branch, "_MAX_MEMBERS", 10**9)
    monkeypatch.setattr(branch, "available_bytes", lambda: 10**9)
    fits = branch.members_that_fit(experiment)
    # at least six copies of the parameters and of the two moments of Adam, in float32
    assert 1 < fits <= 0.5e9 / (6 * 3 * 4 * parameters)
    monkeypatch.setattr(branch, "available_bytes", lambda: 2 * 10**9)
    assert branch.members_that_fit(experiment) == pytest.approx(2 * fits, abs=1)
    monkeypatch.setattr(branch, "_MAX_MEMBERS", 12)
    assert branch.members_that_fit(experiment) == 12
    monkeypatch.setattr(branch, "available_bytes", lambda: 0)
    assert branch.members_that_fit(experiment) == 1


def test_a_branch_is_not_a_run_with_masks(own_trunk):
    dataset = make_tiny_dataset()
    workdir = branch.run(own_trunk, ("imp", "signs"), name="one", dataset=dataset)
    with pytest.raises(UserError, match="--workdir has the branch 'one'; it should be the workdir of a run"):
        branch.run(workdir, ("shuffled",), dataset=dataset)
    with pytest.raises(UserError, match="one is not the workdir of a run, which has the masks of imp"):
        branch.run(own_trunk, ("shuffled",), mask_from=str(workdir), dataset=dataset)


def test_the_default_name_has_what_changes_the_trainings(tmp_path):
    config = make_config()

    def name(**options):
        return branch.make_config(config, ("shuffled",), **options).branch.name

    assert name(rounds=(2, 1, 2)) == "shuffled,rounds=1-2"
    assert name(overrides={"epochs": 2, "dataset.data_dir": "/data"}) == "shuffled,epochs=2"
    assert name(mask_from="runs/other") == "shuffled,mask_from=other"
    long = name(overrides={"dataset.name": "d" * 300})
    assert len(long) <= 200
    assert long != name(overrides={"dataset.name": "d" * 299})


def test_a_branch_does_not_repeat_the_twins_of_its_run():
    config = make_config(**{"instability.rounds": (1,), "instability.steps": (3,), "instability.noise": 0.1})
    config.analysis.also = ("sharpness", "instability")
    of_branch = branch.make_config(config, ("shuffled",))
    configs.validate(of_branch)
    assert of_branch.analysis.also == ("sharpness",)
    assert config.instability.steps == (3,)


def test_a_round_is_trained_once_however_often_it_is_named(own_trunk):
    workdir = branch.run(own_trunk, ("signs",), rounds=(1, 1), dataset=make_tiny_dataset())
    assert len(analysis.load(workdir).results) == 2


def test_a_branch_keeps_the_config_file_of_its_run(own_trunk, tmp_path):
    config_file = tmp_path / "mine.py"
    config_file.write_text("def get_config():\n    pass\n")
    (own_trunk / "config_file.txt").write_text(f"{config_file}\n")
    workdir = branch.run(own_trunk, ("signs",), rounds=(1,), dataset=make_tiny_dataset())
    assert (workdir / "config_file.txt").read_text() == f"{config_file}\n"
    assert (workdir / "config_file.py").read_text() == config_file.read_text()


def test_a_round_without_a_member_that_converges_is_recorded_and_finished(own_trunk, monkeypatch, capsys):
    find = imp.find_diverged

    def find_all_of_round_1(experiment, number, members, *arguments):
        found = find(experiment, number, members, *arguments)
        return found | {m: (3, "the loss is nan") for m in members if m.round == 1}

    monkeypatch.setattr(imp, "find_diverged", find_all_of_round_1)
    workdir = branch.run(own_trunk, ("signs", "random"), dataset=make_tiny_dataset())
    assert set(analysis.load(workdir).results["round"]) == {0, 2}
    rows = pd.read_csv(workdir / "divergences.csv")
    assert (rows["round"] == 1).all()
    assert len(rows) == 4
    assert branch.run(own_trunk, ("signs", "random"), dataset=make_tiny_dataset()) == workdir
    assert "is finished: all 3 rounds are trained, nothing to do" in capsys.readouterr().out


def test_a_stop_between_the_rounds_of_a_group_loses_nothing(own_trunk, monkeypatch):
    """The rounds of a group are recorded one by one; a saved state of the whole group is left behind."""
    dataset, whole = (
        make_tiny_dataset(),
        branch.run(own_trunk, ("signs",), name="w", dataset=make_tiny_dataset()),
    )
    train = branch.train

    def train_and_lose_the_last_round(*arguments, **options):
        ends, diverged = train(*arguments, **options)
        raised.append(ends)
        return ends[:-1], diverged

    raised = []
    with monkeypatch.context() as patch:
        patch.setattr(branch, "train", train_and_lose_the_last_round)
        patch.setattr(Checkpoints, "discard_progress", lambda self: None)
        with contextlib.suppress(Stopped):
            branch.run(own_trunk, ("signs",), name="n", dataset=dataset, stop=StopsAtFirstCheck())
        branch.run(own_trunk, ("signs",), name="n", dataset=dataset)
    assert len(raised[-1]) == 3
    resumed = branch.run(own_trunk, ("signs",), name="n", dataset=dataset)
    assert_same_members(whole, resumed)
    assert_same_members(resumed, whole)
