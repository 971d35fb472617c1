import pytest
from ml_collections import ConfigDict

from imp_jax import config as configs
from imp_jax.config_field import Field
from imp_jax.errors import UserError


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
            "no config field optimizer.lr; optimizer has finetune, learning_rate, milestones, momentum",
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
        ("rewind_step", -1, "rewind_step is -1; it should be at least 0, or None"),
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
        ("matmul_precision", "high", "matmul_precision is 'high'; it should be default or highest"),
        # settings that would have no effect
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
        (
            "analysis.images",
            500,
            "analysis.images is 500; analysis.also does not have sharpness or noise, .* should be 1000",
        ),
        ("analysis.noise_rounds", (0,), r"noise_rounds is \(0,\); .* not have noise, .* be \(0, 5, 10, 15\)"),
        ("analysis.noise_epochs", (0,), r"noise_epochs is \(0,\); .* not have noise, .* be \(0, 1, 5\)"),
        ("instability.steps", (0,), r"instability.steps is \(0,\); .* not have instability, .* should be \(\)"),
        ("instability.noise", 0.1, "instability.noise is 0.1; .* not have instability, .* should be 0.0"),
        ("analysis.noise_rounds", (), r"noise_rounds is \(\); it should be distinct rounds, counted from 0"),
        ("analysis.noise_epochs", (1, 1), r"noise_epochs is \(1, 1\); it should be distinct numbers of epochs"),
        ("instability.steps", (5, -1), r"instability.steps is \(5, -1\); it should be distinct steps"),
        ("repulsion.dtype", "bfloat16", "repulsion.dtype is 'bfloat16'; repulsion.strength is 0"),
    ],
)
def test_wrong_field_raises_one_sentence(field, value, sentence):
    plain = configs.default().to_dict()
    *groups, name = field.split(".")
    group = plain
    for part in groups:
        group = group[part]
    group[name] = value
    with pytest.raises(UserError, match=sentence) as error:
        configs.validate(ConfigDict(plain))
    assert "\n" not in str(error.value)


def test_matmul_precision_without_float32_raises_one_sentence():
    config = configs.default()
    config.update(dtype="bfloat16", matmul_precision="highest")
    with pytest.raises(UserError, match=r"dtype is 'bfloat16', and only products of float32 .* be 'default'"):
        configs.validate(config)


def test_every_field_has_a_meaning_and_a_valid_default():
    for name, field in configs.FIELDS.items():
        assert field.meaning, name
        assert field.has_type(field.default), name
        assert field.check(field.default), name
        assert bool(field.words) == (Field.check is not field.check), name
    assert set(configs.flatten(configs.default())) == set(configs.FIELDS)


def test_field_with_several_types_accepts_each():
    config = configs.default()
    for name, field in configs.FIELDS.items():
        for type_ in field.types:
            config.update_from_flattened_dict({name: type_()})
    config.rewind_step, config.dataset.workers, config.optimizer.momentum = 3, 2, 0.5
    config.dataset.data_dir, config.dataset.augmentation = "folder", ("flip",)
    configs.validate(config)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("mesh.data", True),
        ("dataset.workers", True),
        ("keep_checkpoints", True),
        ("analysis.baseline", True),
        ("analysis.later", True),  # of a later version
        ("seed", False),
        ("dataset.name", False),
        ("dataset.later", False),
        ("later", False),
    ],
)
def test_fields_that_may_change_on_resume(name, allowed):
    assert configs.may_change_on_resume(name) is allowed


def test_describe_type_names_the_types_of_a_field():
    assert configs.describe_type("batch_size") == "of type int, like 60"
    assert configs.describe_type("dataset.data_dir") == "of type str or None"
    assert configs.describe_type("dataset") == "a group of fields, set one by one"
    assert configs.describe_type("data") == ""


def test_validate_rejects_missing_fields_and_other_types():
    config = configs.default()
    del config.rounds
    with pytest.raises(UserError, match="lacks the field rounds"):
        configs.validate(config)
    with pytest.raises(UserError, match="returned int"):
        configs.validate(3)


def test_float_fields_accept_integers():
    plain = configs.default().to_dict()
    plain["optimizer"]["warmup_epochs"] = 10
    configs.validate(ConfigDict(plain))


def test_milestones_beyond_the_training_are_rejected():
    config = configs.default()
    config.update_from_flattened_dict({"optimizer.schedule": "step", "optimizer.milestones": (5, 24)})
    configs.validate(config)
    config.epochs = 24
    with pytest.raises(
        UserError, match=r"milestones is \(5, 24\); a training has 24 epochs, so they should lie below"
    ):
        configs.validate(config)


REQUESTS = {
    "analysis.also": ("noise", "instability"),
    "analysis.images": 500,
    "analysis.noise_rounds": (2,),
    "analysis.noise_epochs": (0, 25),
    "instability.steps": (3, 100),
    "instability.noise": 0.1,
    "rewind_step": 3,
}


def test_settings_of_requested_analyses_are_accepted():
    config = configs.default()
    config.update_from_flattened_dict(REQUESTS)
    configs.validate(config)
    config.update_from_flattened_dict({"epochs": 1, "analysis.also": (), "analysis.images": 1000})
    for name in ("analysis.noise_rounds", "analysis.noise_epochs", "instability.steps", "instability.noise"):
        config.update_from_flattened_dict({name: configs.FIELDS[name].default})
    configs.validate(config)  # default epochs beyond the training matter only if noise is requested


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"epochs": 24}, r"noise_epochs is \(0, 25\); a training has 24 epochs, so they should be at most 24"),
        (
            {"repulsion.strength": 2.0},
            "analysis.also has noise, which repeats trainings; .* should be 0, and it is 2",
        ),
        ({"instability.steps": ()}, r"instability.steps is \(\); .* it should have at least one, such as"),
        ({"instability.noise": 0.0, "instability.steps": ()}, r"instability.steps is \(\)"),
        ({"rewind_step": 4}, r"instability.steps is \(3, 100\); .* start at the rewind step, .* at least 4"),
        ({"instability.rounds": (25, 30)}, r"instability.rounds is \(25, 30\); .* should have one below 25"),
        ({"instability.rounds": ()}, r"instability.rounds is \(\); .* should have one below 25"),
    ],
)
def test_requested_analyses_that_cannot_be_computed_are_refused(overrides, sentence):
    config = configs.default()
    config.update_from_flattened_dict(REQUESTS)
    config.update_from_flattened_dict(overrides)
    with pytest.raises(UserError, match=sentence) as error:
        configs.validate(config)
    assert "\n" not in str(error.value)
