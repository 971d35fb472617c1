"""The Python blocks and the quick commands of the READMEs run, and the files and fields they name exist."""

import ast
import functools
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from imp_jax import analysis, arms, data, imp, models, optimizers, runs, scores
from imp_jax import config as configs
from imp_jax.experiment import setup
from tests.conftest import quick_config
from tests.helpers import ROOT

MAX_LINES = 220  # of README.md
REGISTRIES = (
    models.MODELS,
    data.DATASETS,
    data.AUGMENTATIONS,
    scores.SCORES,
    arms.ARMS,
    analysis.ANALYSES,
    analysis.FIGURES,
    optimizers.OPTIMIZERS,
)
READMES = [
    ROOT / "README.md",
    *sorted(
        path
        for top in ("configs", "experiments", "imp_jax", "tests")
        for path in (ROOT / top).rglob("README.md")
    ),
]
# paths in backticks that are not files of the repository: those of a run, a data folder or a user
NOT_OF_THE_REPOSITORY = re.compile(
    r"^(runs|checkpoints|events|figures|analysis|progress|set-aside|downloads|PATH|validation|train|~|/)(/|$)"
    r"|^(\w+\.png|\w+\.csv|\w+\.html|(config|dataset|execution|statistics)\.json|config_file\.\w+|\*)"
)
SUFFIXES = ("py", "md", "json", "ipynb", "png", "zip", "toml")


def relative(path):
    return str(path.relative_to(ROOT))


def find_blocks(language):
    """Return the blocks of a language in all READMEs as parameters: path, text, HTML comment before it."""
    parameters, pattern = [], rf"(?:<!-- ([\w ]+) -->\n)?^```{language}\n(.*?)^```"
    for path in READMES:
        for number, match in enumerate(re.finditer(pattern, path.read_text(), re.DOTALL | re.MULTILINE)):
            comment, text = match.groups()
            parameters.append(pytest.param(path, text, comment or "", id=f"{relative(path)}-{number}"))
    return parameters


def find_programs():
    """Return the Python programs of all READMEs as parameters: path, texts of a block and its continuations."""
    parameters = []
    for parameter in find_blocks("python"):
        path, text, comment = parameter.values
        if comment == "continues":
            parameters[-1].values[1].append(text)
        else:
            parameters.append(pytest.param(path, [text], id=parameter.id))
    return parameters


@functools.cache
def read_prose(path):
    """Return the text of a README without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def project(data_dir, tmp_path_factory):
    """Return a folder with a finished run in runs/mnist5k."""
    folder = tmp_path_factory.mktemp("project")
    overrides = {"rounds": 2, "instability.rounds": ()}
    runs.run(quick_config(data_dir, **overrides), folder / "runs" / "mnist5k")
    analysis.run(folder / "runs" / "mnist5k")
    return folder


@pytest.fixture
def registries():
    """Restore all registries after the test."""
    saved = [dict(entries) for entries in REGISTRIES]
    yield
    for entries, saved_entries in zip(REGISTRIES, saved, strict=True):
        entries.clear()
        entries.update(saved_entries)


@pytest.mark.parametrize(("path", "texts"), find_programs())
@pytest.mark.usefixtures("registries")
def test_python_block_runs_and_gives_the_documented_result(path, texts, project, data_dir, monkeypatch, capsys):
    code = "".join(texts)
    monkeypatch.chdir(project)
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    names = {"__name__": relative(path)}
    exec(compile(code, relative(path), "exec"), names)
    for text, check in CHECKS.items():
        if text in code:
            check(names, capsys.readouterr().out)


def check_pure_functions(names, printed):
    del printed
    params, mask, other = names["params"], names["mask"], names["other"]
    assert names["masking"].density(mask) == pytest.approx(0.8)
    pruned = ~np.asarray(mask["Dense_0"]["kernel"])
    assert not np.asarray(names["updates"]["Dense_0"]["kernel"])[pruned].any()
    assert not np.asarray(names["ticket"]["Dense_0"]["kernel"])[pruned].any()
    similarity, ticket = names["similarity"], names["ticket"]
    assert similarity.angular_distance(params, mask, other, mask) == pytest.approx(1, abs=0.01)
    assert similarity.distance_matrix([params, other, ticket], [mask, mask, mask]).shape == (3, 3)
    assert names["path"]["Dense_0"]["kernel"].shape[0] == 20
    barrier = names["connectivity"].error_barrier(names["jnp"].array([0.1, 0.4, 0.3]), baseline="mean")
    assert barrier == pytest.approx(0.2)


def check_algorithm(names, printed):
    line = r" *(\d+) density +([\d.]+)% imp ([\d.]+)% reinit ([\d.]+)% angle ([\d.]+)"
    rounds = np.array([[float(x) for x in numbers] for numbers in re.findall(line, printed)])
    assert list(rounds[:, 0]) == list(range(11))
    assert np.allclose(rounds[:, 1], 100 * 0.6 ** rounds[:, 0], atol=0.06)
    documented = re.findall(line, ROOT.joinpath("README.md").read_text())
    assert np.allclose(rounds[-1], [float(x) for x in documented[-1]], atol=8)  # other machines differ
    assert rounds[-1, 2] > rounds[-1, 3] + 3  # the ticket is better than its control
    assert (rounds[1:, 4] < 0.3).all()


def check_rounds(names, printed):
    del names
    assert re.findall(r"round (\d), (\w+): density (\d+)%", printed) == [
        ("0", "imp", "100"),
        ("0", "reinit", "100"),
        ("1", "imp", "80"),
        ("1", "reinit", "80"),
    ]


def check_loaded_run(names, printed):
    del printed
    assert set(names["imp_0"]) == {"Dense_0", "Dense_1", "Dense_2"}
    assert names["imp_0"]["Dense_0"]["kernel"].ndim == 2


# checks of a block's result, by a text that only this block contains
CHECKS = {
    "repulsion.repulsion_loss": check_pure_functions,
    "train_members": check_algorithm,
    "imp.rounds(": check_rounds,
    "analysis.load(": check_loaded_run,
}


@pytest.mark.usefixtures("registries")
def test_examples_of_extending_work_together(data_dir):
    text = (ROOT / "imp_jax" / "README.md").read_text().partition("\n## Extending\n")[2]
    examples = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for example in examples:
        exec(example, {"__name__": "example"})
    config = quick_config(data_dir, rounds=1)
    settings = re.findall(r"# then config\.(.+?) = (.+)", text)
    assert [field for field, _ in settings] == [
        "model.name",
        "dataset.name",
        "pruning.score",
        "arms",
        "optimizer.name",
        "dataset.augmentation",
    ]
    for field, value in settings:
        config.update_from_flattened_dict({field: ast.literal_eval(value)})
    config.update({"batch_size": 100, "instability": {"rounds": ()}, "dataset": {"data_dir": None}})
    (end,) = imp.rounds(setup(config))
    assert {row["arm"] for row in end.rows} == {"imp", "reinit", "negated"}
    assert "norms" in analysis.ANALYSES


def test_every_check_belongs_to_one_block():
    codes = ["".join(parameter.values[1]) for parameter in find_programs()]
    for text in CHECKS:
        assert sum(text in code for code in codes) == 1, text


def test_algorithm_of_the_readme_has_at_most_60_lines():
    (algorithm,) = ("".join(p.values[1]) for p in find_programs() if "train_members" in "".join(p.values[1]))
    assert len(algorithm.splitlines()) <= 60
    assert "config" not in algorithm


QUICK = [
    pytest.param(parameter.values[1], id=parameter.id)
    for parameter in find_blocks("sh")
    if parameter.values[2] == "runs"
]


@pytest.mark.parametrize("text", QUICK)
def test_quick_command_runs(text):
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "python", line
        command = [sys.executable, *words[1:]]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_at_least_three_blocks_of_commands_run():
    assert len(QUICK) >= 3


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_every_path_in_a_readme_exists(path):
    """Paths in backticks start at the folder of the README, the root of the repository, or imp_jax."""
    text = read_prose(path)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"\w+://", link):
            continue
        assert (path.parent / target).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (path.parent / target).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link
    for name in re.findall(r"`([^`\n]+)`", text):
        if NOT_OF_THE_REPOSITORY.match(name) or not re.fullmatch(r"[\w.*/-]+", name) or name.startswith("**"):
            continue
        if name.endswith("/") or re.search(rf"\.({'|'.join(SUFFIXES)})$", name):
            folders = (path.parent, ROOT, ROOT / "imp_jax")
            assert any(any(folder.glob(name.rstrip("/"))) for folder in folders), f"{name} in {relative(path)}"


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_every_module_run_by_a_readme_exists(path):
    for module in re.findall(r"python -m ([\w.]+)", path.read_text()):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


def test_every_override_in_a_readme_is_a_field():
    fields = {field for path in READMES for field in re.findall(r"--config\.([\w.]+)=", path.read_text())}
    assert len(fields) > 15
    for field in fields:
        assert configs.describe_type(field), field


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_every_field_in_backticks_exists(path):
    """For example `mesh.data=8` or `optimizer.name`."""
    # `analysis.` is also the prefix of functions
    groups = {name for name, value in configs.default().items() if hasattr(value, "items")} - {"analysis"}
    for name, _ in re.findall(r"`([a-z_]+\.[a-z_]+)(=[^`]*)?`", read_prose(path)):
        if name.split(".")[0] in groups and not name.endswith((".py", ".md", ".json", ".png", ".csv")):
            assert configs.describe_type(name), name


def test_readme_has_at_most_220_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_LINES


def test_main_folders_have_a_readme():
    folders = {relative(path.parent) for path in READMES}
    assert folders >= {
        ".",
        "experiments",
        "experiments/benchmarks",
        "imp_jax",
        "imp_jax/runtime",
        "imp_jax/workdir",
        "tests",
    }
