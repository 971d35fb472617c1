"""Look-up of registered names and dotted paths, and paths that users write."""

from pathlib import Path

import numpy as np
import pytest

from imp_jax import errors, models, optimizers, scores
from imp_jax.errors import UserError
from imp_jax.models.lenet import LeNet


def test_find_accepts_a_dotted_path():
    assert models.find("imp_jax.models.lenet:LeNet") is LeNet
    assert scores.find("imp_jax.scores:magnitude") is scores.magnitude
    optimizer = optimizers.make_optimizer("optax:lion", learning_rate=0.1)
    params = {"kernel": np.zeros(2)}
    assert optimizer.init(params) is not None


@pytest.mark.parametrize(
    ("find", "name", "sentence"),
    [
        (models.find, "nowhere.nets:Net", "model.name is .*, which cannot be imported: ModuleNotFoundError"),
        (scores.find, "imp_jax.scores:tayler", "pruning.score is .*, which cannot be imported: AttributeError"),
        (scores.find, "imp_jax.scores:SCORES", "is a dict; it should be a function of"),
        (scores.find, "magnitud", r"did you mean magnitude"),
    ],
)
def test_find_raises_one_sentence_for_an_unknown_name(find, name, sentence):
    with pytest.raises(errors.UserError, match=sentence):
        find(name)


def test_lookup_names_the_choices():
    assert errors.lookup({"a": 1}, "field", "a") == 1
    with pytest.raises(UserError, match="field is 3; it should be one of a, b"):
        errors.lookup({"a": 1, "b": 2}, "field", 3)


def test_only_a_leading_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir("/")
    paths = {"~/w": "/home/me/w", "~": "/home/me", "./~/w": "~/w", "a/~": "a/~", "/~": "/~"}
    assert {path: str(errors.user_path(path, "--root")) for path in paths} == paths
    with pytest.raises(UserError, match="--root is '~no_such_user/w', and there is no home directory"):
        errors.user_path("~no_such_user/w", "--root")


def test_user_path_rejects_empty_paths_and_unknown_users(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert errors.user_path("~/runs/~/w", "--workdir") == Path("/home/me/runs/~/w")
    with pytest.raises(UserError, match="--workdir is empty; it should be the path of a folder"):
        errors.user_path("", "--workdir")
    with pytest.raises(UserError, match="there is no home directory"):
        errors.user_path("~nobody_of_this_name/w", "--workdir")
