"""The catalogue of figures, and which modules of experiments/ may import which."""

import ast
from types import SimpleNamespace

import pytest

from experiments.paper import catalogue
from experiments.paper.panels import PaperFigure
from tests.helpers import ROOT

COMMANDS = {"run", "claims", "anchors", "benchmark", "faults"}


def make_group(*names):
    figures = tuple(PaperFigure(name, "", lambda scale: [], lambda scale, finished: "") for name in names)
    return SimpleNamespace(__name__="group", FIGURES=figures)


def test_every_figure_of_every_group_is_in_the_catalogue():
    assert list(catalogue.FIGURES) == [
        *(f"fig{n}" for n in range(1, 24)),
        *("table1", "tablec", "claims", "controls", "at_initialisation", "signs", "transfer", "effort"),
        "bfloat16",
    ]


def test_other_figures_follow_those_of_the_paper():
    groups = [make_group("mine", "claims", "fig10"), make_group("ablation", "table1", "fig2")]
    assert list(catalogue.collect_figures(groups)) == ["fig2", "fig10", "table1", "claims", "mine", "ablation"]


def test_two_figures_with_the_same_name_raise_an_error():
    with pytest.raises(ValueError, match="two figures are called 'fig2'; the second is in group"):
        catalogue.collect_figures([make_group("fig1", "fig2"), make_group("fig2")])


def list_modules():
    return [path for path in (ROOT / "experiments").rglob("*.py") if path.name != "__init__.py"]


def test_no_module_imports_a_command():
    for path in list_modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "experiments":
                assert not COMMANDS & {alias.name for alias in node.names}, path
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert not {f"experiments.{command}" for command in COMMANDS} & set(names), path


def test_sweeps_import_nothing_of_the_paper():
    for path in (ROOT / "experiments" / "sweeps").glob("*.py"):
        assert "experiments.paper" not in path.read_text(), path
        assert "experiments.literature" not in path.read_text(), path
