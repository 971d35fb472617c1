import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax.checkpoints import Checkpoints, Round
from imp_jax.config import UserError


def networks(key):
    params = {"Dense_0": {"kernel": jax.random.normal(key, (2, 3, 4)), "bias": jnp.zeros((2, 4))}}
    variables = {"params": params, "batch_stats": {"norm": {"mean": jnp.arange(2.0)}}}
    mask = jax.tree.map(lambda p: p > 0, params)
    return Round(initial=variables, trained=jax.tree.map(lambda x: 2 * x, variables), mask=mask)


def test_a_round_comes_back_as_it_went(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    rows = [{"replicate": 0, "arm": "imp", "round": 0, "threshold": 0.1234567}]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.rounds() == []
    saved = [networks(key) for key in jax.random.split(jax.random.key(0), 2)]
    for number in range(2):
        checkpoints.save(number, saved[number], rows)
    checkpoints.close()

    again = Checkpoints(tmp_path)
    assert again.rounds() == [0, 1]
    assert again.rows(1) == rows
    for number in range(2):
        got = again.restore(number)
        assert jax.tree.structure(got) == jax.tree.structure(saved[number])
        jax.tree.map(np.testing.assert_array_equal, got, saved[number])
        assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, saved[number])
    again.close()


def test_another_format_is_refused_in_words(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, networks(jax.random.key(0)), [])
    monkeypatch.setattr("imp_jax.checkpoints.FORMAT", 2)
    with pytest.raises(UserError, match=r"checkpoints/0 has format 1, of imp_jax .*, which reads format 2"):
        checkpoints.rounds()
    checkpoints.close()
    shutil.rmtree(tmp_path / "checkpoints" / "0" / "version")
    again = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"checkpoints/0 has no format number; this is imp_jax"):
        again.rounds()
    again.close()


def test_a_round_cut_off_while_being_written_is_not_there(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, networks(jax.random.key(0)), [])
    checkpoints.close()
    (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path)
    assert again.rounds() == [0]
    again.close()
