"""Checkpoints: rounds and mid-round states are restored as saved, and damage is detected."""

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
from imp_jax.workdir.results import Results, read_results
from tests.helpers.checkpoints import forget_definition

ROWS = [{"replicate": 0, "arm": "imp", "round": 0, "threshold": 0.1234567, "cosine": float("nan")}]
STEPS = 10  # in the training of a round


def make_networks(seed=0):
    params = {
        "Dense_0": {"kernel": jax.random.normal(jax.random.key(seed), (2, 3, 4)), "bias": jnp.zeros((2, 4))}
    }
    variables = {"params": params, "batch_stats": {"norm": {"mean": jnp.arange(2.0)}}}
    mask = jax.tree.map(lambda p: p > 0, params)
    return RoundNetworks(initial=variables, trained=jax.tree.map(lambda x: 2 * x, variables), mask=mask)


def make_progress(step, seed=0):
    variables = make_networks(seed).trained
    optimizer = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    state = TrainState(
        variables["params"], {"batch_stats": variables["batch_stats"]}, optimizer.init(variables["params"])
    )
    return MidRoundState(step, make_networks(seed).initial, state, divergence.init_history(2), 1.5 * step)


@pytest.fixture
def checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path)
    yield checkpoints
    checkpoints.close()


@pytest.fixture
def reopen(tmp_path):
    """Return a function that opens the folder as a later process would."""
    opened = []

    def open_checkpoints():
        opened.append(Checkpoints(tmp_path))
        return opened[-1]

    yield open_checkpoints
    for checkpoints in opened:
        checkpoints.close()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    dtypes = [[jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)] for tree in (actual, expected)]
    assert dtypes[0] == dtypes[1]


def test_a_round_is_restored_as_saved(checkpoints, reopen):
    assert checkpoints.rounds() == []
    for number in range(2):
        checkpoints.save(number, make_networks(number), ROWS * (number + 1))
    reopened = reopen()
    assert reopened.rounds() == [0, 1]
    assert str(reopened.rows(1)) == str(ROWS * 2)  # as strings, because nan is not equal to itself
    for number in range(2):
        assert_same(reopened.restore(number), make_networks(number))
        assert reopened.optima(number) is None
        assert reopened.next_masks(number) is None  # none was saved, as in earlier versions


def test_next_masks_are_restored_as_saved(checkpoints, tmp_path, reopen):
    masks = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], make_networks().mask)  # those of arm imp
    checkpoints.save(0, make_networks(), ROWS, next_masks=masks)
    assert_same(reopen().next_masks(0), masks)
    checkpoints.save(1, make_networks(), ROWS, next_masks=masks)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "next_masks")
    (message,) = reopen().quarantine_damaged_rounds()
    assert "checkpoints/1 is damaged" in message


def test_optima_are_restored_as_saved(checkpoints, reopen):
    params = make_networks().trained["params"]
    optima = repulsion.add_optimum(None, params, make_networks().mask, max_optima=3, dtype="bfloat16")
    checkpoints.save(0, make_networks(), ROWS, optima=optima)
    restored = reopen().optima(0)
    assert_same(restored, optima)
    assert restored.shape == optima.shape


def test_optima_of_an_older_similarity_definition_are_not_restored(checkpoints, tmp_path, reopen):
    optima = repulsion.add_optimum(None, make_networks().trained["params"], make_networks().mask, max_optima=3)
    checkpoints.save(0, make_networks(), ROWS, optima=optima)
    assert reopen().similarity_definition(0) == 2
    forget_definition(tmp_path / "checkpoints" / "0")
    reopened = reopen()
    assert reopened.quarantine_damaged_rounds() == []  # nothing is damaged
    assert reopened.similarity_definition(0) == 1
    assert reopened.optima(0) is None
    assert_same(reopened.restore(0), make_networks())


def test_a_mid_round_state_is_restored_as_saved(checkpoints, reopen):
    assert checkpoints.progress(0, make_progress(0), STEPS) is None
    for step in (3, STEPS):
        checkpoints.save_progress(4, make_progress(step, seed=step), STEPS)
    reopened = reopen()
    restored = reopened.progress(4, like=make_progress(0), steps=STEPS)
    assert (restored.step, restored.seconds) == (STEPS, 1.5 * STEPS)
    assert_same(restored, make_progress(STEPS, seed=STEPS))
    for number in (3, 5):
        assert reopened.progress(number, make_progress(0), STEPS) is None
    reopened.discard_progress()
    assert reopened.progress(4, make_progress(0), STEPS) is None
    reopened.save_progress(0, make_progress(1), STEPS)  # of an earlier round than the state saved last
    assert reopened.progress(0, make_progress(0), STEPS).step == 1


def test_rows_of_epochs_are_restored_as_saved(checkpoints, reopen):
    rows = [{"replicate": 0, "arm": "imp", "round": 0, "epoch": 1, "test_loss": float("nan")}]
    checkpoints.save(0, make_networks(), ROWS, epoch_rows=rows)
    checkpoints.save(1, make_networks(), ROWS)
    checkpoints.save_progress(4, make_progress(3)._replace(epoch_rows=rows), STEPS)
    reopened = reopen()
    assert str(reopened.epoch_rows(0)) == str(rows)
    assert reopened.epoch_rows(1) == []
    restored = reopened.progress(4, like=make_progress(0), steps=STEPS)
    assert str(restored.epoch_rows) == str(rows)
    assert_same(restored._replace(epoch_rows=()), make_progress(3))


def test_another_format_raises_a_user_error(checkpoints, reopen, monkeypatch):
    checkpoints.save(0, make_networks(), ROWS)
    checkpoints.save_progress(1, make_progress(3), STEPS)
    monkeypatch.setattr("imp_jax.workdir.checkpoints.FORMAT", 3)
    reopened = reopen()
    for read in (
        lambda: reopened.restore(0),
        lambda: reopened.quarantine_damaged_rounds(),
        lambda: reopened.progress(1, make_progress(0), STEPS),
    ):
        with pytest.raises(UserError, match=r"has format 2, of imp_jax .*, which reads format 3") as error:
            read()
        assert not isinstance(error.value, DamagedError)
    assert reopened.rounds() == [0]


def truncate(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def delete(path, rng):
    path.unlink()


def truncate_or_delete(path, rng):
    rng.choice([truncate, delete])(path, rng)


def remove_manifests(workdir):
    """Remove the manifests, which earlier versions did not write."""
    for path in workdir.glob("*/*/files.json"):
        path.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from Orbax's event loops
@pytest.mark.parametrize(
    ("damage", "manifest"),
    [(truncate, True), (flip_bit, True), (delete, True), (truncate_or_delete, False)],
)
def test_damage_of_any_file_is_reported_or_without_effect(checkpoints, tmp_path, reopen, damage, manifest):
    """Damage each file of a checkpoint in turn: either it is reported, or all is read as it was written."""
    for number in range(2):
        checkpoints.save(number, make_networks(number), ROWS, next_masks=make_networks(number + 2).mask)
    if not manifest:
        remove_manifests(tmp_path)
    folder, intact = tmp_path / "checkpoints" / "1", tmp_path / "intact"
    shutil.copytree(folder, intact)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.stat().st_size)
    files = [path for path in files if (folder / path).is_file()]
    rng, reported = random.Random(0), 0
    for path in files:
        damage(folder / path, rng)
        reopened = reopen()
        messages = reopened.quarantine_damaged_rounds()
        if messages:
            reported += 1
            assert messages[0].startswith(f"the checkpoint {folder} is damaged: ")
            name = "checkpoints-1" if reported == 1 else f"checkpoints-1-{reported}"
            assert messages[0].endswith(f"it is moved to {tmp_path / 'set-aside' / name}")
            assert reopened.rounds() == [0]
        else:
            assert_same(reopened.restore(1), make_networks(1))
            assert_same(reopened.next_masks(1), jax.tree.map(np.asarray, make_networks(3).mask))
            assert str(reopened.rows(1)) == str(ROWS)
            shutil.rmtree(folder)
        assert_same(reopened.restore(0), make_networks(0))
        shutil.copytree(intact, folder)
    assert reported >= 4  # arrays, rows, version; Orbax also writes files on which nothing depends
    assert len(list((tmp_path / "set-aside").iterdir())) == reported


# a message of TensorStore
IO_ERROR = "NOT_FOUND: Error reading local file [source locations='…'] [os_error_code='5']"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
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
def test_errors_other_than_damage_are_raised_and_move_nothing(
    checkpoints, tmp_path, reopen, monkeypatch, error, raised, message, manifest
):
    for number in range(2):
        checkpoints.save(number, make_networks(number), ROWS)
    checkpoints.save_progress(2, make_progress(3), STEPS)
    if not manifest:
        remove_manifests(tmp_path)

    def fail(*_, **__):
        raise error

    reopened = reopen()
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
        for read in (
            reopened.quarantine_damaged_rounds,
            lambda: reopened.restore(1),
            lambda: reopened.progress(2, make_progress(0), STEPS),
        ):
            with pytest.raises(raised, match=message) as caught:
                read()
            assert not isinstance(caught.value, DamagedError)
    assert not (tmp_path / "set-aside").exists()
    assert reopened.quarantine_damaged_rounds() == []
    assert_same(reopened.restore(1), make_networks(1))


@pytest.mark.parametrize("place", ["checkpoints/1/networks", "progress"])
def test_a_folder_that_cannot_be_read_at_the_moment_is_not_damaged(
    checkpoints, tmp_path, reopen, monkeypatch, place
):
    """As when the credentials of a network file system expire: os.walk and rglob then find nothing."""
    for number in range(2):
        checkpoints.save(number, make_networks(number), ROWS)
    checkpoints.save_progress(2, make_progress(3), STEPS)
    scandir = os.scandir

    def denied(path="."):
        if str(tmp_path / place) in os.fspath(path):
            raise PermissionError(errno.EACCES, "denied", path)
        return scandir(path)

    def fail(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file", "d/manifest.ocdbt")

    reopened = reopen()
    read = (
        reopened.quarantine_damaged_rounds
        if "checkpoints" in place
        else lambda: reopened.progress(2, make_progress(0), STEPS)
    )
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
        patch.setattr(os, "scandir", denied)
        with pytest.raises(UserError, match=r"cannot read the checkpoint .*denied.*; nothing is changed"):
            read()
    assert not (tmp_path / "set-aside").exists()
    assert reopened.quarantine_damaged_rounds() == []


def test_restoring_a_missing_round_raises_damaged_error(checkpoints, tmp_path):
    checkpoints.save(0, make_networks(), ROWS)
    with pytest.raises(
        DamagedError, match=f"the checkpoint {tmp_path}/checkpoints/3 is damaged: it is missing"
    ):
        checkpoints.restore(3)


def test_paths_that_orbax_misinterprets_are_refused(tmp_path):
    """All other punctuation works."""
    for name in ("try[1]", "a*", "b?", "back\\slash", "bytes\udcff", "gs:"):
        with pytest.raises(UserError, match=r"which Orbax cannot read back; give a --workdir on this") as error:
            Checkpoints(tmp_path / name / "run")
        str(error.value).encode()
    assert not any(tmp_path.iterdir())
    allowed = "".join(character for character in string.punctuation if character not in "*?[\\/")
    workdir = tmp_path / f"{allowed} é\n%20s3:"
    (workdir / "checkpoints").mkdir(parents=True)
    for read in (False, True):
        with contextlib.closing(Checkpoints(workdir)) as opened:
            if read:
                assert_same(opened.restore(0), make_networks())
            else:
                opened.save(0, make_networks(), ROWS)


@pytest.mark.parametrize("word", ["networks", "rows", "format", "sha256"])
def test_a_damaged_version_file_is_reported_as_damage(checkpoints, tmp_path, reopen, word):
    checkpoints.save(0, make_networks(), ROWS)
    path = tmp_path / "checkpoints" / "0" / "version" / "metadata"
    path.write_text(path.read_text().replace(word, word[:-1] + "x"))
    (message,) = reopen().quarantine_damaged_rounds()
    assert "checkpoints/0 is damaged" in message


def test_a_damaged_mid_round_state_is_reported_and_can_be_moved(checkpoints, tmp_path, reopen):
    checkpoints.save_progress(2, make_progress(3), STEPS)
    data = max((tmp_path / "progress" / "25").rglob("*"), key=lambda path: path.stat().st_size)
    flip_bit(data, random.Random(0))
    reopened = reopen()
    with pytest.raises(DamagedError, match="progress/25 is damaged"):
        reopened.progress(2, make_progress(0), STEPS)
    assert reopened.set_progress_aside() == tmp_path / "set-aside" / "progress-25"
    assert reopened.progress(2, make_progress(0), STEPS) is None
    reopened.save_progress(2, make_progress(1), STEPS)
    assert reopened.progress(2, make_progress(0), STEPS).step == 1


def test_damaged_rounds_are_moved_unless_all_are_damaged(checkpoints, tmp_path, reopen):
    for number in range(3):
        checkpoints.save(number, make_networks(number), ROWS)
    for number in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(number) / "networks")
    reopened = reopen()
    assert len(reopened.quarantine_damaged_rounds()) == 2
    assert reopened.rounds() == [0]
    reopened.save(1, make_networks(1), ROWS)  # the run continues
    for number in (0, 1):
        shutil.rmtree(tmp_path / "checkpoints" / str(number) / "rows")
    with pytest.raises(UserError, match=r"all 2 rounds are damaged; the checkpoint .*/1 is damaged"):
        reopen().quarantine_damaged_rounds()
    assert reopen().rounds() == [0, 1]


def test_half_written_checkpoints_are_ignored_and_later_removed(checkpoints, tmp_path, reopen):
    checkpoints.save(0, make_networks(), ROWS)
    (tmp_path / "progress").mkdir()
    half_written = [
        tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp",
        tmp_path / "progress" / "3.orbax-checkpoint-tmp-9",
        tmp_path / "checkpoints" / "0.dropped",
    ]
    for folder in half_written:
        folder.mkdir()
    reopened = reopen()
    assert reopened.rounds() == [0]
    assert all(folder.exists() for folder in half_written)  # only the process that holds the lock removes them
    assert reopened.quarantine_damaged_rounds() == []
    assert not any(folder.exists() for folder in half_written)


def test_all_but_the_first_and_the_last_two_rounds_can_be_deleted(checkpoints, reopen):
    for number in range(6):
        checkpoints.save(number, make_networks(number), ROWS)
        checkpoints.delete_intermediate_rounds(number)
        kept = sorted({0, max(number - 1, 0), number})
        assert checkpoints.rounds() == reopen().rounds() == kept
    assert_same(checkpoints.restore(4), make_networks(4))


def test_reading_a_workdir_unpickles_nothing(checkpoints, tmp_path, reopen, monkeypatch):
    """Unpickling a file may execute code."""
    import pickle

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    checkpoints.save(0, make_networks(), ROWS)
    checkpoints.save_progress(1, make_progress(3), STEPS)
    Results(tmp_path, ROWS)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    reopened = reopen()
    assert_same(reopened.restore(0), make_networks())
    reopened.rows(0)
    reopened.progress(1, make_progress(0), STEPS)
    read_results(tmp_path)
