"""Modules import only from their own or lower layers, and no module is too long."""

import ast

import pytest

from tests.helpers import ROOT

# from bottom to top; a package stands for all its modules; modules of one layer may import each other
LAYERS = (
    ("errors",),
    (
        "config",
        "config_field",
        "config_fields",
        "config_rules",
        "config_files",
        "methods",
        "runtime",
        "figures",
    ),
    ("masking", "members", "permutations", "similarity", "data", "models"),
    ("pruning", "layer_densities", "weights", "repulsion", "optimizers", "divergence"),
    ("training",),
    ("scores", "arms", "connectivity", "curvature", "gradient_noise"),
    ("experiment", "setup_checks"),
    ("workdir",),
    ("round_state", "round_end", "next_masks", "evidence", "imp"),
    ("runs", "replay", "tuning", "packing"),
    ("branch_start",),
    ("analysis",),
    ("cli",),
    ("branch", "command"),
    ("main",),
)
EXCEPTIONS = {
    ("runtime", "models"),  # the execution mode depends on the convolutions of a model
    ("data", "cli"),  # the command `imp_jax.data`
    ("data", "workdir"),
    ("analysis", "cli"),
}
PACKAGE = ROOT / "imp_jax"


def layer_number(name):
    """Return the index in `LAYERS` of the layer of a top-level module."""
    return next(number for number, names in enumerate(LAYERS) if name in names)


def find_imports(path):
    """Yield the top-level modules of imp_jax that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, rest = node.module.partition(".")
            if package == "imp_jax":
                yield from [rest.split(".")[0]] if rest else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("imp_jax."))


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_nothing_from_higher_layers(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in set(find_imports(path)) - {own, "__version__"}:
        assert layer_number(name) <= layer_number(own) or (own, name) in EXCEPTIONS, f"{own} imports {name}"


def test_modules_that_train_do_not_import_analyses():
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] in (
            "training.py",
            "imp.py",
            "round_state.py",
            "runs.py",
            "workdir",
        ):
            assert "analysis" not in find_imports(path), path


def test_only_modules_that_handle_configs_import_ml_collections():
    """`setup` resolves a config; lower layers do not see it."""
    importing = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(
            isinstance(node, ast.ImportFrom | ast.Import) and "ml_collections" in ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    allowed = {"config.py", "config_files.py", "methods.py", "cli.py", "command.py", "main.py"}
    allowed |= {"experiment.py", "runs.py", "packing.py", "branch.py"}
    assert {name for name in importing if not name.startswith(("workdir/", "analysis/"))} <= allowed


@pytest.mark.parametrize("folder", ["imp_jax", "experiments"])
def test_no_module_has_more_than_420_lines(folder):
    lengths = {str(p): len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert not {path: length for path, length in lengths.items() if length > 420}
