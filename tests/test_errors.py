"""Names that are looked up or imported, in every registry."""

import optax
import pytest

from imp_jax import errors, models, optimizers, scores
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
