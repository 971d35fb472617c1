import contextlib
import errno
import os
import random
import shutil
import string

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imp_jax import divergence, repulsion
from imp_jax.errors import UserError
from imp_jax.training import TrainState
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError, MidRoundState, RoundNetworks
from tests.helpers.checkpoints import forget_definition

ROWS = [{"replicate": 0, "arm": "imp", "round": 0, "threshold": 0.1234567, "cosine": float("nan")}]
STEPS = 10  # of a training


def networks(seed=0):
    params = {
        "Dense_0": {"kernel": jax.random.normal(jax.random.key(seed), (2, 3, 4)), "bias": jnp.zeros((2, 4))}
    }
    variables = {"params": params, "batch_stats": {"norm": {"mean": jnp.arange(2.0)}}}
    mask = jax.tree.map(lambda p: p > 0, params)
    return RoundNetworks(initial=variables, trained=jax.tree.map(lambda x: 2 * x, variables), mask=mask)


def progress(step, seed=0):
    variables = networks(seed).trained
    optimizer = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    state = TrainState(
        variables["params"], {"batch_stats": variables["batch_stats"]}, optimizer.init(variables["params"])
    )
    return MidRoundState(step, networks(seed).initial, state, divergence.init_history(2), 1.5 * step)


@pytest.fixture
def checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path)
    yield checkpoints
    checkpoints.close()


@pytest.fixture
def reopened(tmp_path):
    """A function that opens the folder as a later process would."""
    opened = []

    def reopen():
        opened.append(Checkpoints(tmp_path))
        return opened[-1]

    yield reopen
    for checkpoints in opened:
        checkpoints.close()


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    dtypes = [[jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)] for tree in (got, expected)]
    assert dtypes[0] == dtypes[1]


def test_a_round_comes_back_as_it_went(checkpoints, reopened):
    assert checkpoints.rounds() == []
    for number in range(2):
        checkpoints.save(number, networks(number), ROWS * (number + 1))
    again = reopened()
    assert again.rounds() == [0, 1]
    assert str(again.rows(1)) == str(ROWS * 2)  # nan, which is not equal to itself, included
    for number in range(2):
        assert_same(again.restore(number), networks(number))
        assert again.optima(number) is None
        assert again.next_masks(number) is None  # as in rounds of earlier versions


def test_next_masks_come_back_as_they_went(checkpoints, tmp_path, reopened):
    masks = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], networks().mask)  # of the imps alone
    checkpoints.save(0, networks(), ROWS, next_masks=masks)
    assert_same(reopened().next_masks(0), masks)
    checkpoints.save(1, networks(), ROWS, next_masks=masks)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "next_masks")
    (said,) = reopened().quarantine_damaged_rounds()
    assert "checkpoints/1 is damaged" in said


def test_optima_come_back_as_they_went(checkpoints, reopened):
    params = networks().trained["params"]
    optima = repulsion.add_optimum(None, params, networks().mask, max_optima=3, dtype="bfloat16")
    checkpoints.save(0, networks(), ROWS, optima=optima)
    got = reopened().optima(0)
    assert_same(got, optima)
    assert got.shape == optima.shape


def test_optima_of_an_older_definition_are_not_taken(checkpoints, tmp_path, reopened):
    optima = repulsion.add_optimum(None, networks().trained["params"], networks().mask, max_optima=3)
    checkpoints.save(0, networks(), ROWS, optima=optima)
    assert reopened().similarity_definition(0) == 2
    forget_definition(tmp_path / "checkpoints" / "0")
    again = reopened()
    assert again.quarantine_damaged_rounds() == []  # it is whole
    assert again.similarity_definition(0) == 1
    assert again.optima(0) is None
    assert_same(again.restore(0), networks())


def test_the_state_of_a_round_comes_back_as_it_went(checkpoints, reopened):
    assert checkpoints.progress(0, progress(0), STEPS) is None
    for step in (3, STEPS):
        checkpoints.save_progress(4, progress(step, seed=step), STEPS)
    again = reopened()
    got = again.progress(4, like=progress(0), steps=STEPS)
    assert (got.step, got.seconds) == (STEPS, 1.5 * STEPS)
    assert_same(got, progress(STEPS, seed=STEPS))
    assert again.progress(3, progress(0), STEPS) is again.progress(5, progress(0), STEPS) is None
    again.discard_progress()
    assert again.progress(4, progress(0), STEPS) is None
    again.save_progress(0, progress(1), STEPS)  # an earlier one than before
    assert again.progress(0, progress(0), STEPS).step == 1


def test_another_format_is_refused_in_words(checkpoints, reopened, monkeypatch):
    checkpoints.save(0, networks(), ROWS)
    checkpoints.save_progress(1, progress(3), STEPS)
    monkeypatch.setattr("imp_jax.workdir.checkpoints.FORMAT", 3)
    again = reopened()
    for read in (
        lambda: again.restore(0),
        lambda: again.quarantine_damaged_rounds(),
        lambda: again.progress(1, progress(0), STEPS),
    ):
        with pytest.raises(UserError, match=r"has format 2, of imp_jax .*, which reads format 3") as error:
            read()
        assert not isinstance(error.value, DamagedError)
    assert again.rounds() == [0]


def truncate(path, draw):
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def delete(path, draw):
    path.unlink()


def truncate_or_delete(path, draw):
    draw.choice([truncate, delete])(path, draw)


def remove_manifests(workdir):
    """As in a workdir of an earlier version."""
    for path in workdir.glob("*/*/files.json"):
        path.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's closed event loops
@pytest.mark.parametrize(
    ("damage", "manifest"),
    [(truncate, True), (flip, True), (delete, True), (truncate_or_delete, False)],
)
def test_whatever_happens_to_a_file_no_other_bits_are_read(checkpoints, tmp_path, reopened, damage, manifest):
    """Each file of a checkpoint in turn: it is either said to be damaged, or read as it was written."""
    for number in range(2):
        checkpoints.save(number, networks(number), ROWS, next_masks=networks(number + 2).mask)
    if not manifest:
        remove_manifests(tmp_path)
    folder, whole = tmp_path / "checkpoints" / "1", tmp_path / "whole"
    shutil.copytree(folder, whole)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.stat().st_size)
    files = [path for path in files if (folder / path).is_file()]
    draw, found = random.Random(0), 0
    for path in files:
        damage(folder / path, draw)
        again = reopened()
        said = again.quarantine_damaged_rounds()
        if said:
            found += 1
            assert said[0].startswith(f"the checkpoint {folder} is damaged: ")
            place = tmp_path / "set-aside" / ("checkpoints-1" if found == 1 else f"checkpoints-1-{found}")
            assert said[0].endswith(f"it is moved to {place}")
            assert again.rounds() == [0]
        else:
            assert_same(again.restore(1), networks(1))
            assert_same(again.next_masks(1), jax.tree.map(np.asarray, networks(3).mask))
            assert str(again.rows(1)) == str(ROWS)
            shutil.rmtree(folder)
        assert_same(again.restore(0), networks(0))
        shutil.copytree(whole, folder)
    assert found >= 4  # arrays, rows, version; Orbax keeps notes that nothing depends on
    assert len(list((tmp_path / "set-aside").iterdir())) == found


IO_ERROR = "NOT_FOUND: Error reading local file [source locations='…'] [os_error_code='5']"  # of TensorStore


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (
            OSError(errno.EIO, os.strerror(errno.EIO)),
            UserError,
            "cannot read the checkpoint .*Input/output error",
        ),
        (
            ValueError(IO_ERROR),
            UserError,
            r"the checkpoint .*/\d+: Input/output error; nothing is changed",
        ),
        (PermissionError(errno.EACCES, "denied"), UserError, "cannot read the checkpoint .*denied"),
        (TypeError("PyTreeRestore() got an unexpected argument"), TypeError, "unexpected argument"),
        (KeyError("a new field"), KeyError, "a new field"),
        (MemoryError(), MemoryError, None),
    ],
)
@pytest.mark.parametrize("manifest", [True, False])
def test_what_is_no_damage_is_raised_and_moves_nothing(
    checkpoints, tmp_path, reopened, monkeypatch, error, raised, words, manifest
):
    for number in range(2):
        checkpoints.save(number, networks(number), ROWS)
    checkpoints.save_progress(2, progress(3), STEPS)
    if not manifest:
        remove_manifests(tmp_path)

    def fail(*_, **__):
        raise error

    again = reopened()
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
        for read in (
            again.quarantine_damaged_rounds,
            lambda: again.restore(1),
            lambda: again.progress(2, progress(0), STEPS),
        ):
            with pytest.raises(raised, match=words) as caught:
                read()
            assert not isinstance(caught.value, DamagedError)
    assert not (tmp_path / "set-aside").exists()
    assert again.quarantine_damaged_rounds() == []
    assert_same(again.restore(1), networks(1))


@pytest.mark.parametrize("place", ["checkpoints/1/networks", "progress"])
def test_a_folder_that_cannot_be_read_now_is_no_damage(checkpoints, tmp_path, reopened, monkeypatch, place):
    """As after an expired ticket of a network's file system, under which os.walk and rglob see nothing."""
    for number in range(2):
        checkpoints.save(number, networks(number), ROWS)
    checkpoints.save_progress(2, progress(3), STEPS)
    scandir = os.scandir

    def denied(path="."):
        if str(tmp_path / place) in os.fspath(path):
            raise PermissionError(errno.EACCES, "denied", path)
        return scandir(path)

    def fail(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file", "d/manifest.ocdbt")

    again = reopened()
    read = (
        again.quarantine_damaged_rounds
        if "checkpoints" in place
        else lambda: again.progress(2, progress(0), STEPS)
    )
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
        patch.setattr(os, "scandir", denied)
        with pytest.raises(UserError, match=r"cannot read the checkpoint .*denied.*; nothing is changed"):
            read()
    assert not (tmp_path / "set-aside").exists()
    assert again.quarantine_damaged_rounds() == []


def test_a_round_that_is_not_there_is_said(checkpoints, tmp_path):
    checkpoints.save(0, networks(), ROWS)
    with pytest.raises(
        DamagedError, match=f"the checkpoint {tmp_path}/checkpoints/3 is damaged: it is missing"
    ):
        checkpoints.restore(3)


def test_paths_that_orbax_takes_for_others_are_refused(tmp_path):
    """All other signs work."""
    for name in ("try[1]", "a*", "b?", "back\\slash", "bytes\udcff", "gs:"):
        with pytest.raises(UserError, match=r"which Orbax cannot read back; give a --workdir on this") as error:
            Checkpoints(tmp_path / name / "run")
        str(error.value).encode()
    assert not any(tmp_path.iterdir())
    rest = "".join(sign for sign in string.punctuation if sign not in "*?[\\/")
    workdir = tmp_path / f"{rest} é\n%20s3:"
    (workdir / "checkpoints").mkdir(parents=True)
    for read in (False, True):
        with contextlib.closing(Checkpoints(workdir)) as opened:
            if read:
                assert_same(opened.restore(0), networks())
            else:
                opened.save(0, networks(), ROWS)


@pytest.mark.parametrize("word", ["networks", "rows", "format", "sha256"])
def test_a_damaged_version_is_no_other_version(checkpoints, tmp_path, reopened, word):
    checkpoints.save(0, networks(), ROWS)
    path = tmp_path / "checkpoints" / "0" / "version" / "metadata"
    path.write_text(path.read_text().replace(word, word[:-1] + "x"))
    (said,) = reopened().quarantine_damaged_rounds()
    assert "checkpoints/0 is damaged" in said


def test_a_damaged_state_is_said_and_can_be_set_aside(checkpoints, tmp_path, reopened):
    checkpoints.save_progress(2, progress(3), STEPS)
    data = max((tmp_path / "progress" / "25").rglob("*"), key=lambda path: path.stat().st_size)
    flip(data, random.Random(0))
    again = reopened()
    with pytest.raises(DamagedError, match="progress/25 is damaged"):
        again.progress(2, progress(0), STEPS)
    assert again.set_progress_aside() == tmp_path / "set-aside" / "progress-25"
    assert again.progress(2, progress(0), STEPS) is None
    again.save_progress(2, progress(1), STEPS)
    assert again.progress(2, progress(0), STEPS).step == 1


def test_several_damaged_rounds_are_set_aside_but_not_all(checkpoints, tmp_path, reopened):
    for number in range(3):
        checkpoints.save(number, networks(number), ROWS)
    for number in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(number) / "networks")
    again = reopened()
    assert len(again.quarantine_damaged_rounds()) == 2
    assert again.rounds() == [0]
    again.save(1, networks(1), ROWS)  # the run goes on
    for number in (0, 1):
        shutil.rmtree(tmp_path / "checkpoints" / str(number) / "rows")
    with pytest.raises(UserError, match=r"all 2 rounds are damaged; the checkpoint .*/1 is damaged"):
        reopened().quarantine_damaged_rounds()
    assert reopened().rounds() == [0, 1]


def test_what_a_crash_left_half_written_is_not_there_and_goes(checkpoints, tmp_path, reopened):
    checkpoints.save(0, networks(), ROWS)
    (tmp_path / "progress").mkdir()
    halves = [
        tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp",
        tmp_path / "progress" / "3.orbax-checkpoint-tmp-9",
    ]
    halves.append(tmp_path / "checkpoints" / "0.dropped")
    for half in halves:
        half.mkdir()
    again = reopened()
    assert again.rounds() == [0]
    assert all(half.exists() for half in halves)  # only who holds the workdir may mend it
    assert again.quarantine_damaged_rounds() == []
    assert not any(half.exists() for half in halves)


def test_the_ends_are_the_first_and_the_last_two(checkpoints, reopened):
    for number in range(6):
        checkpoints.save(number, networks(number), ROWS)
        checkpoints.delete_intermediate_rounds(number)
        kept = sorted({0, max(number - 1, 0), number})
        assert checkpoints.rounds() == reopened().rounds() == kept
    assert_same(checkpoints.restore(4), networks(4))


def test_nothing_that_is_read_can_run_code(checkpoints, tmp_path, reopened, monkeypatch):
    """No checkpoint, result or table is unpickled."""
    import pickle

    import pandas as pd

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    checkpoints.save(0, networks(), ROWS)
    checkpoints.save_progress(1, progress(3), STEPS)
    pd.DataFrame(ROWS).to_csv(tmp_path / "results.csv")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    again = reopened()
    assert_same(again.restore(0), networks())
    again.rows(0)
    again.progress(1, progress(0), STEPS)
    pd.read_csv(tmp_path / "results.csv")
