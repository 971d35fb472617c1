"""`setup` resolves the names in a config and rejects values that do not fit together."""

import numpy as np
import pytest

from imp_jax import data, experiment, runs
from imp_jax.errors import UserError
from tests.conftest import quick_config
from tests.helpers import folders


def test_spec_has_the_normalization_and_augmentation_of_the_config(data_dir, tmp_path):
    folders.write_cifar10(tmp_path)
    config = quick_config(str(tmp_path), batch_size=10, **{"model.name": "conv4", "dataset.name": "cifar10"})
    assert experiment.setup(config).spec.normalize == data.Normalize()
    assert experiment.setup(config).spec.augmentation == ("crop", "flip")
    config.dataset.normalize, config.dataset.augmentation = True, ("flip",)
    spec = experiment.setup(config).spec
    pixels = np.asarray(data.load("cifar10", tmp_path).train.images) / 255
    np.testing.assert_allclose(spec.normalize.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(spec.normalize.std, pixels.std((0, 1, 2)), rtol=1e-5)
    assert spec.augmentation == ("flip",)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"batch_size": 4001},
            "batch_size is 4001; mnist5k has 4000 training images, so it should be at most 4000",
        ),
        ({"rewind_step": 8}, "rewind_step is 8; a training has 8 steps, so it should be at most 7"),
        (
            {"instability.steps": (0, 8), "instability.rounds": (1,), "analysis.also": ("instability",)},
            r"instability.steps is \(0, 8\); a training has 8 steps, so they should be at most 7",
        ),
        ({"arms": ("imp", "twinn")}, r"arms is \('imp', 'twinn'\); it should contain imp, .* such as .*imp"),
        ({"arms": ("reinit",)}, "it should contain imp"),
        ({"arms": ("imp", "imp")}, "without repetition"),
        ({"pruning.score": "magnitud"}, r"pruning.score is 'magnitud'.*did you mean magnitude"),
        ({"model.name": "vgg"}, "model.name is 'vgg'; it should be one of lenet"),
        ({"rounds": 0}, "rounds is 0; it should be at least 1"),
        ({"dataset.image_side": 64}, "image_side is 64; only streamed sets read it, .* so it should be 224"),
        ({"checkpoint_every_steps": 5}, "checkpoint_every_steps is 5; only streamed sets read it"),
    ],
)
def test_bad_config_is_rejected_before_anything_is_written(data_dir, tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        runs.run(quick_config(data_dir, **overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
