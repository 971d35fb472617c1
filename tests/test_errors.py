"""Names that are looked up or imported, in every registry; paths that users write."""

from pathlib import Path

import optax
import pytest

from imp_jax import errors, models, optimizers, scores
from imp_jax.errors import UserError
from imp_jax.models.lenet import LeNet


def test_a_dotted_path_works_where_a_registered_name_does():
    assert models.find("imp_jax.models.lenet:LeNet") is LeNet
    assert scores.find("imp_jax.scores:magnitude") is scores.magnitude
    optimizer = optimizers.make_optimizer("optax:lion", learning_rate=0.1)
    params = {"kernel": optax.tree.zeros_like({"a": 1.0})["a"]}
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
def test_what_cannot_be_found_is_one_sentence(find, name, sentence):
    with pytest.raises(errors.UserError, match=sentence):
        find(name)


def test_choose():
    assert errors.lookup({"a": 1}, "field", "a") == 1
    with pytest.raises(UserError, match="field is 3; it should be one of a, b"):
        errors.lookup({"a": 1, "b": 2}, "field", 3)


def test_only_a_tilde_at_the_beginning_is_a_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir("/")
    paths = {"~/w": "/home/me/w", "~": "/home/me", "./~/w": "~/w", "a/~": "a/~", "/~": "/~"}
    assert {path: str(errors.user_path(path, "--root")) for path in paths} == paths
    with pytest.raises(UserError, match="--root is '~no_such_user/w', and there is no home directory"):
        errors.user_path("~no_such_user/w", "--root")


def test_user_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert errors.user_path("~/runs/~/w", "--workdir") == Path("/home/me/runs/~/w")
    with pytest.raises(UserError, match="--workdir is empty; it should be the path of a folder"):
        errors.user_path("", "--workdir")
    with pytest.raises(UserError, match="there is no home directory"):
        errors.user_path("~nobody_of_this_name/w", "--workdir")
