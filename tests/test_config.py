import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from imp_jax import config as configs
from imp_jax.config import UserError

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
        ("optimizer.milestones", (71, 56), r"optimizer.milestones is \(71, 56\); it should be rising epochs"),
        ("optimizer.milestones", ("56",), "rising epochs above 0"),
        ("pruning.fraction", 0.0, "pruning.fraction is 0.0; it should be between 0 and 1"),
        ("repulsion.strength", float("inf"), "repulsion.strength is inf; it should be finite"),
        ("repulsion.strength", "2", "repulsion.strength is '2'; it should be of type float"),
        ("repulsion.memory", "first", "repulsion.memory is 'first'; it should be all or last"),
        ("repulsion.dtype", "float16", "repulsion.dtype is 'float16'; it should be float32 or bfloat16"),
        ("pruning.fraction", 1.0, "pruning.fraction is 1.0; it should be between 0 and 1"),
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
    assert configs.choose({"a": 1}, "field", "a") == 1
    with pytest.raises(UserError, match="field is 3; it should be one of a, b"):
        configs.choose({"a": 1, "b": 2}, "field", 3)


def test_differences_are_said_both_ways():
    import json

    config = configs.default()
    stored = json.loads(configs.to_json(config))
    assert configs.differences(config, stored) == []
    config.rounds = 3
    stored["pruning"]["fraction"] = 0.5
    del stored["seed"]
    assert configs.differences(config, stored) == [
        "pruning.fraction is 0.5 there and 0.2 here",
        "rounds is 25 there and 3 here",
        "seed is absent there and 0 here",
    ]
