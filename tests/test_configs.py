"""The config files have the hyperparameters of table 1 of the paper."""

import importlib.util
import re

import pytest

from configs import conv4, lenet, mnist5k, resnet20, resnet50
from experiments.paper import analysis_table, config_table
from imp_jax import config as configs
from tests.helpers import ROOT

CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))
# model, data set, epochs, batch size, optimizer, learning rate, schedule, milestones, weight decay,
# pruned fraction
TABLE_1 = {
    lenet: ("lenet", "mnist", 25, 60, "adam", 12e-4, "constant", (), 0, 0.2),
    resnet20: ("resnet20", "cifar10", 85, 128, "momentum", 0.1, "step", (56, 71), 1e-5, 0.2),
    conv4: ("conv4", "cifar10", 75, 128, "momentum", 0.01, "cosine", (), 1e-5, 0.2),
    resnet50: ("resnet50", "imagenet2012", 90, 1024, "momentum", 0.4, "step", (30, 60, 80), 1e-5, 0.7),
}


@pytest.mark.parametrize("module", TABLE_1, ids=lambda module: module.__name__)
def test_config_has_the_values_of_table_1(module):
    config = module.get_config()
    configs.validate(config)
    optimizer = config.optimizer
    assert TABLE_1[module] == (
        config.model.name,
        config.dataset.name,
        config.epochs,
        config.batch_size,
        optimizer.name,
        optimizer.learning_rate,
        optimizer.schedule,
        optimizer.milestones,
        optimizer.weight_decay,
        config.pruning.fraction,
    )
    assert config.model.norm_affine is False  # our reading of the paper
    assert config.model.width == 1
    assert config.dataset.normalize is True
    assert config.dataset.augmentation is None
    assert config.replicates == (1 if module is resnet50 else 3)
    assert config.arms == (("imp",) if module is resnet50 else ("imp", "reinit"))
    assert config.rewind_step == 0
    assert optimizer.momentum == (None if module is lenet else 0.9)
    assert optimizer.warmup_epochs == 0
    assert config.rounds == (2 if module is resnet50 else 25)


def test_mnist5k_normalises_its_images():
    """As in OpenLTH; table 1 is based on Frankle et al. (2020)."""
    assert mnist5k.get_config().dataset.normalize is True


@pytest.mark.parametrize("module", [conv4, resnet20, resnet50], ids=lambda module: module.__name__)
def test_docstring_has_the_cost_of_the_config(module):
    config, train_images = module.get_config(), {"cifar10": 50_000, "imagenet2012": 1_281_167}
    steps = train_images[config.dataset.name] // config.batch_size
    members = len(config.arms) * config.replicates * config.rounds
    twins = config.replicates * sum(number < config.rounds for number in config.instability.rounds)
    images = (members + twins) * config.epochs * steps * config.batch_size
    assert f"\nCost: {images / 1e6:.0f} million images;" in module.__doc__


@pytest.mark.parametrize("module", [*TABLE_1, mnist5k], ids=lambda module: module.__name__)
def test_docstring_has_the_command(module):
    name = module.__name__.replace("configs.", "")
    assert f"python -m imp_jax.main --config=configs/{name}.py" in module.__doc__
    if module not in (lenet, mnist5k):
        assert "\nExpected" in module.__doc__
        assert "\nCost: " in module.__doc__
        # this command lists the times, so the docstring has none
        assert "python -m experiments.run list" in module.__doc__
        assert not re.search(r"\d (days|hours|images/s)", module.__doc__)


def test_generated_readmes_are_up_to_date():
    assert config_table.README.read_text() == config_table.format_readme(), f"run {config_table.COMMAND}"
    assert analysis_table.README.read_text() == analysis_table.format_readme(), f"run {analysis_table.COMMAND}"
    rows = config_table.format_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f"{name}.py" for name in config_table.list_config_names()]
    assert rows[0].startswith("| `conv4.py` | Conv-4 | cifar10 | 75 | 128 | 159 | 595.3 million | ")


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_config_files_are_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    configs.validate(module.get_config())
    assert f"--config=configs/{path.name}" in module.__doc__
