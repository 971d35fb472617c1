"""Configs on disk: config.json of this and of earlier versions, and the names of runs."""

import json

import numpy as np
import pytest

from imp_jax import config as configs
from imp_jax import config_files
from imp_jax.errors import UserError
from tests.helpers.epochs import learning_rates_of


def test_differences_name_both_values():
    config = configs.default()
    stored = json.loads(config_files.to_json(config))
    assert config_files.differences(config, stored) == []
    config.epochs = 3
    stored["pruning"]["fraction"] = 0.5
    stored["later"] = 1
    assert config_files.differences(config, stored) == [
        "epochs is 25 there and 3 here",
        "later is 1 there and absent here",
        "pruning.fraction is 0.5 there and 0.2 here",
    ]


def test_more_rounds_and_fields_without_effect_are_no_difference():
    stored = json.loads(config_files.to_json(configs.default()))
    config = configs.default()
    config.update_from_flattened_dict(
        {"rounds": 30, "analysis.baseline": "max", "dataset.data_dir": "/elsewhere", "mesh.data": -1}
    )
    assert config_files.differences(config, stored) == []
    config.rounds = 24
    assert config_files.differences(config, stored) == ["rounds is 25 there and 24 here"]


def test_folder_dataset_is_identified_by_its_folder_name():
    config = configs.default()
    config.update_from_flattened_dict({"dataset.name": "folder", "dataset.data_dir": "/data/birds"})
    stored = json.loads(config_files.to_json(config))
    config.dataset.data_dir = "/moved/birds"
    assert config_files.differences(config, stored) == []
    config.dataset.data_dir = "/data/cars"
    assert config_files.differences(config, stored) == [
        "dataset.data_dir is '/data/birds' there and '/data/cars' here"
    ]


def test_field_missing_in_an_earlier_version_gets_its_default():
    stored = configs.default().to_dict()
    del stored["mesh"], stored["seed"], stored["model"]["norm_parts"]
    assert config_files.from_json(json.loads(json.dumps(stored))) == configs.default()
    assert config_files.differences(configs.default(), stored) == []
    stored["seed"] = 3
    assert config_files.differences(configs.default(), stored) == ["seed is 3 there and 0 here"]


def test_format_1_values_that_are_rejected_now_get_defaults():
    """Momentum of other optimizers, milestones beyond the training, memory without repulsion."""
    stored = configs.default().to_dict()
    stored["epochs"] = 60
    stored["optimizer"] |= {"name": "sgd", "momentum": 0.9, "schedule": "step", "milestones": [56, 71]}
    stored["repulsion"]["memory"] = "last"
    config = config_files.from_json(stored)
    assert (config.optimizer.momentum, config.optimizer.milestones) == (None, (56,))
    assert config.repulsion.memory == "all"
    stored["epochs"] = 5
    assert config_files.from_json(stored).optimizer.schedule == "constant"
    stored["optimizer"]["name"] = "momentum"
    assert config_files.from_json(stored).optimizer.momentum == 0.9
    config = config_files.from_json(stored)
    config.optimizer.momentum = None  # means 0.9
    assert config_files.differences(config, stored) == []
    with pytest.raises(UserError, match="format 3, of a later version"):
        config_files.from_json({**stored, "format": 3})


def test_format_1_fields_that_had_no_effect_get_defaults():
    stored = configs.default().to_dict()
    stored["dataset"] |= {"image_side": 64, "workers": 2}
    stored["model"]["norm_momentum"] = 0.5
    stored["analysis"]["batch_norm"] = "reestimate"
    stored["checkpoint_every_steps"] = 7
    assert config_files.from_json(stored) == configs.default()
    stored["dataset"]["name"], stored["model"]["name"] = "imagenet2012", "resnet20"  # both use these fields
    config = config_files.from_json(stored)
    assert (config.dataset.image_side, config.model.norm_momentum) == (64, 0.5)
    rates = learning_rates_of(config, 4)
    stored["optimizer"]["warmup_epochs"] = 2.0 * stored["epochs"]  # rejected in format 2
    epochs = np.arange(rates.size) / 4
    upgraded_rates = learning_rates_of(config_files.from_json(stored), 4)
    np.testing.assert_allclose(upgraded_rates.ravel(), rates.ravel() * epochs / 50, rtol=1e-6)


def test_run_name_lists_the_overridden_fields():
    base, config = configs.default(), configs.default()
    assert config_files.run_name("conv4", base, config) == "conv4"
    config.update_from_flattened_dict(
        {
            "batch_size": 1024,
            "optimizer.learning_rate": 0.02,
            "pruning.exclude": ("projection_*", "Dense_2"),
            "repulsion.strength": -1.0,
            "rewind_step": None,
            "dataset.data_dir": "/not/in/the/name",
            "mesh.member": 2,
        }
    )
    assert config_files.run_name("conv4", base, config) == (
        "conv4,batch_size=1024,optimizer.learning_rate=0.02,pruning.exclude=projection_--Dense_2,"
        "repulsion.strength=-1,rewind_step=None"
    )
    config = configs.default()
    config.update_from_flattened_dict({"dataset.name": "folder", "dataset.data_dir": "/data/birds/"})
    assert config_files.run_name("vgg", base, config) == "vgg,dataset.data_dir=birds,dataset.name=folder"


def test_long_run_name_is_shortened_and_unique():
    base, config, other_config = (configs.default() for _ in range(3))
    config.pruning.exclude = tuple(f"layer_{i}" for i in range(50))
    other_config.pruning.exclude = tuple(f"layer_{i}" for i in range(51))
    names = [config_files.run_name("vgg", base, values) for values in (config, other_config)]
    assert names[0] != names[1]
    assert max(map(len, names)) <= 200
