"""Registering analyses and figures: which names and arguments are accepted."""

import pytest

from imp_jax import analysis
from imp_jax.analysis import registry, weights
from imp_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("norms", {"columns": ("a",), "needs": "rounds"}, "needs 'rounds'; it should need one of round"),
        ("norms", {"columns": ("round",)}, "without repetition and none of replicate, arm, round"),
        ("a/b", {"columns": ("a",)}, "should have a name of letters"),
        ("weights", {"columns": ("a",)}, "should have a name of letters, .* none of distances"),
    ],
)
def test_a_bad_registration_raises_a_user_error(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        analysis.register(name, lambda inputs: [], **options)


def test_figures_of_imp_jax_cannot_be_replaced():
    with pytest.raises(
        UserError, match=r"the figure 'accuracy' should have a name .* none of accuracy, branches, thresh"
    ):
        analysis.register_figure("accuracy", lambda run: None)


def test_functions_of_imp_jax_can_be_registered_again_by_another_name(monkeypatch):
    """As when a config file that uses one is executed twice."""
    options = {"columns": ("survivors", "bimodality", "near_zero")}
    monkeypatch.setitem(registry.ANALYSES, "mine", None)  # removed after the test
    for _ in range(2):
        analysis.register("mine", weights.compute_statistics, **options)
    assert registry.ANALYSES["mine"].columns == registry.ANALYSES["weights"].columns
