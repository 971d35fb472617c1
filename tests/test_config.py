import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from imp_jax import config as configs
from imp_jax import config_files, errors
from imp_jax.errors import UserError
from tests.helpers.epochs import learning_rates_of

CONFIG_FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_config_files_are_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    configs.validate(module.get_config())
    assert f"--config=configs/{path.name}" in module.__doc__


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("roundz", 3, r"there is no config field roundz \(did you mean rounds\?\)"),
        (
            "optimizer.lerning_rate",
            1.0,
            r"no config field optimizer.lerning_rate \(did you mean optimizer.learning_rate",
        ),
        (
            "optimizer.lr",
            1.0,
            "no config field optimizer.lr; optimizer has learning_rate, milestones, momentum",
        ),
        ("nosuch", 1.0, "no config field nosuch; the config has accumulate_steps, arms, batch_size"),
        ("rounds", "five", "rounds is 'five'; it should be of type int, like 25"),
        ("rounds", 2.5, "rounds is 2.5; it should be of type int"),
        ("rounds", True, "rounds is True; it should be of type int"),
        ("rounds", 0, "rounds is 0; it should be at least 1"),
        ("epochs", 0, "epochs is 0; it should be at least 1"),
        ("replicates", -3, "replicates is -3; it should be at least 1"),
        ("batch_size", 0, "batch_size is 0; it should be at least 1"),
        ("seed", -1, "seed is -1; it should be from 0"),
        ("dtype", "float16", "dtype is 'float16'; it should be float32 or bfloat16"),
        ("rewind_step", -1, "rewind_step is -1; it should be a step of the dense training from 0, or None"),
        ("rewind_step", 1.5, "rewind_step is 1.5; it should be of type int or None"),
        ("arms", "imp", r"arms is 'imp'; it should be of type tuple, like \('imp', 'reinit'\)"),
        ("dataset.data_dir", 3, "dataset.data_dir is 3; it should be of type str or None"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate is 0.0; it should be above 0"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate is nan"),
        ("optimizer.momentum", 1.0, r"optimizer.momentum is 1.0; it should be in \[0, 1\)"),
        ("optimizer.weight_decay", -1e-4, "optimizer.weight_decay is -0.0001; it should be at least 0"),
        ("optimizer.warmup_epochs", -1.0, "optimizer.warmup_epochs is -1.0"),
        (
            "optimizer.milestones",
            (71, 56),
            r"optimizer.milestones is \(71, 56\); it should be increasing epochs",
        ),
        ("optimizer.milestones", ("56",), "increasing epochs above 0"),
        ("pruning.fraction", 0.0, "pruning.fraction is 0.0; it should be between 0 and 1"),
        ("repulsion.strength", float("inf"), "repulsion.strength is inf; it should be finite"),
        ("repulsion.strength", "2", "repulsion.strength is '2'; it should be of type float"),
        ("repulsion.memory", "first", "repulsion.memory is 'first'; it should be all or last"),
        ("repulsion.dtype", "float16", "repulsion.dtype is 'float16'; it should be float32 or bfloat16"),
        ("pruning.fraction", 1.0, "pruning.fraction is 1.0; it should be between 0 and 1"),
        (
            "optimizer.momentum",
            "0.9",
            "optimizer.momentum is '0.9'; it should be of type float or of type int or",
        ),
        ("dataset.data_dir", "", "dataset.data_dir is ''; it should be the path of a folder, or None"),
        # what would do nothing
        (
            "optimizer.schedule",
            "step",
            r"optimizer.milestones is \(\); the schedule step divides the rate at these",
        ),
        (
            "optimizer.milestones",
            (5, 9),
            r"is \(5, 9\); only the schedule step has milestones, .*so it should be \(\)",
        ),
        (
            "optimizer.warmup_epochs",
            26.0,
            "warmup_epochs is 26.0; a training has 25 epochs, so it should be at most",
        ),
        ("repulsion.memory", "last", "repulsion.memory is 'last'; repulsion.strength is 0, .* should be 'all'"),
        ("repulsion.dtype", "bfloat16", "repulsion.dtype is 'bfloat16'; repulsion.strength is 0"),
    ],
)
def test_a_wrong_field_is_one_sentence(field, value, sentence):
    plain = configs.default().to_dict()
    *groups, name = field.split(".")
    group = plain
    for part in groups:
        group = group[part]
    group[name] = value
    with pytest.raises(UserError, match=sentence) as error:
        configs.validate(ConfigDict(plain))
    assert "\n" not in str(error.value)


def test_every_field_has_a_meaning_and_a_valid_default():
    for name, field in configs.FIELDS.items():
        assert field.meaning, name
        assert field.has_type(field.default), name
        assert field.check(field.default), name
        assert bool(field.words) == (configs.Field.check is not field.check), name
    assert set(configs.flatten(configs.default())) == set(configs.FIELDS)


def test_fields_of_more_than_one_type_may_be_set_to_each():
    config = configs.default()
    for name, field in configs.FIELDS.items():
        for type_ in field.types:
            config.update_from_flattened_dict({name: type_()})
    config.rewind_step, config.dataset.workers, config.optimizer.momentum = 3, 2, 0.5
    config.dataset.data_dir, config.dataset.augmentation = "folder", ("flip",)
    configs.validate(config)


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("mesh.data", True),
        ("dataset.workers", True),
        ("keep_checkpoints", True),
        ("analysis.baseline", True),
        ("analysis.later", True),  # of another version
        ("seed", False),
        ("dataset.name", False),
        ("dataset.later", False),
        ("later", False),
    ],
)
def test_what_may_change_on_resume(name, may):
    assert configs.may_change_on_resume(name) is may


def test_what_a_field_holds():
    assert configs.describe_type("batch_size") == "of type int, like 60"
    assert configs.describe_type("dataset.data_dir") == "of type str or None"
    assert configs.describe_type("dataset") == "a group of fields, set one by one"
    assert configs.describe_type("data") == ""


def test_a_missing_field_and_no_config_at_all():
    config = configs.default()
    del config.rounds
    with pytest.raises(UserError, match="lacks the field rounds"):
        configs.validate(config)
    with pytest.raises(UserError, match="returned int"):
        configs.validate(3)


def test_whole_numbers_serve_where_a_float_is_due():
    plain = configs.default().to_dict()
    plain["optimizer"]["warmup_epochs"] = 10
    configs.validate(ConfigDict(plain))


def test_choose():
    assert errors.lookup({"a": 1}, "field", "a") == 1
    with pytest.raises(UserError, match="field is 3; it should be one of a, b"):
        errors.lookup({"a": 1, "b": 2}, "field", 3)


def test_milestones_lie_within_the_training():
    config = configs.default()
    config.update_from_flattened_dict({"optimizer.schedule": "step", "optimizer.milestones": (5, 24)})
    configs.validate(config)
    config.epochs = 24
    with pytest.raises(
        UserError, match=r"milestones is \(5, 24\); a training has 24 epochs, so they should lie below"
    ):
        configs.validate(config)


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


def test_rounds_may_grow_and_not_shrink_and_other_fields_change_no_result():
    stored = json.loads(config_files.to_json(configs.default()))
    config = configs.default()
    config.update_from_flattened_dict(
        {"rounds": 30, "analysis.baseline": "max", "dataset.data_dir": "/elsewhere", "mesh.data": -1}
    )
    assert config_files.differences(config, stored) == []
    config.rounds = 24
    assert config_files.differences(config, stored) == ["rounds is 25 there and 24 here"]


def test_a_folder_of_images_is_told_by_its_name():
    config = configs.default()
    config.update_from_flattened_dict({"dataset.name": "folder", "dataset.data_dir": "/data/birds"})
    stored = json.loads(config_files.to_json(config))
    config.dataset.data_dir = "/moved/birds"
    assert config_files.differences(config, stored) == []
    config.dataset.data_dir = "/data/cars"
    assert config_files.differences(config, stored) == [
        "dataset.data_dir is '/data/birds' there and '/data/cars' here"
    ]


def test_a_field_that_an_earlier_version_lacked_has_its_default():
    stored = configs.default().to_dict()
    del stored["mesh"], stored["seed"], stored["model"]["norm_parts"]
    assert config_files.from_json(json.loads(json.dumps(stored))) == configs.default()
    assert config_files.differences(configs.default(), stored) == []
    stored["seed"] = 3
    assert config_files.differences(configs.default(), stored) == ["seed is 3 there and 0 here"]


def test_what_did_nothing_in_format_1_is_dropped():
    """The momentum of other optimizers, milestones beyond the training, the memory of no repulsion."""
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
    config.optimizer.momentum = None  # which is 0.9
    assert config_files.differences(config, stored) == []
    with pytest.raises(UserError, match="format 3, of a later version"):
        config_files.from_json({**stored, "format": 3})


def test_what_had_no_influence_in_format_1_is_dropped():
    stored = configs.default().to_dict()
    stored["dataset"] |= {"image_side": 64, "workers": 2}
    stored["model"]["norm_momentum"] = 0.5
    stored["analysis"]["batch_norm"] = "reestimate"
    stored["checkpoint_every_steps"] = 7
    assert config_files.from_json(stored) == configs.default()
    stored["dataset"]["name"], stored["model"]["name"] = "imagenet2012", "resnet20"  # where they had
    config = config_files.from_json(stored)
    assert (config.dataset.image_side, config.model.norm_momentum) == (64, 0.5)
    rates = learning_rates_of(config, 4)
    stored["optimizer"]["warmup_epochs"] = 2.0 * stored["epochs"]  # refused now, and the same line is not
    time = np.arange(rates.size) / 4
    upgraded_rates = learning_rates_of(config_files.from_json(stored), 4)
    np.testing.assert_allclose(upgraded_rates.ravel(), rates.ravel() * time / 50, rtol=1e-6)


def test_only_a_tilde_at_the_beginning_is_a_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir("/")
    paths = {"~/w": "/home/me/w", "~": "/home/me", "./~/w": "~/w", "a/~": "a/~", "/~": "/~"}
    assert {path: str(errors.user_path(path, "--root")) for path in paths} == paths
    with pytest.raises(UserError, match="--root is '~no_such_user/w', and there is no home directory"):
        errors.user_path("~no_such_user/w", "--root")


def test_run_names():
    base, config = configs.default(), configs.default()
    assert config_files.run_name("conv4", base, config) == "conv4"
    config.update_from_flattened_dict(
        {
            "batch_size": 1024,
            "optimizer.learning_rate": 0.02,
            "pruning.exclude": ("projection_*", "Dense_2"),
            "repulsion.strength": -1.0,
            "rewind_step": None,
            "dataset.data_dir": "/no/part/of/it",
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


def test_a_long_run_name_fits_into_a_file_system():
    base, one, other = (configs.default() for _ in range(3))
    one.pruning.exclude = tuple(f"layer_{i}" for i in range(50))
    other.pruning.exclude = tuple(f"layer_{i}" for i in range(51))
    names = [config_files.run_name("vgg", base, config) for config in (one, other)]
    assert names[0] != names[1]
    assert max(map(len, names)) <= 200


def test_user_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert errors.user_path("~/runs/~/w", "--workdir") == Path("/home/me/runs/~/w")
    with pytest.raises(UserError, match="--workdir is empty; it should be the path of a folder"):
        errors.user_path("", "--workdir")
    with pytest.raises(UserError, match="there is no home directory"):
        errors.user_path("~nobody_of_this_name/w", "--workdir")
