"""Random labels, subsets, validation splits and blurred images."""

import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import config as configs
from imp_jax import data
from imp_jax.data.variations import vary
from imp_jax.errors import UserError
from imp_jax.experiment import setup
from tests.conftest import make_tiny_config, make_tiny_dataset


def random_dataset(dtype=np.uint8, examples=3000):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (examples, 8, 8, 3)).astype(dtype)
    labels = generator.integers(0, 5, examples)
    return data.from_arrays(images, labels, images[:50], labels[:50])


def test_random_labels_are_uniform_fixed_and_independent_of_the_true_ones():
    dataset = random_dataset()
    varied = vary(dataset, labels="random")
    labels = np.asarray(varied.train.labels)
    np.testing.assert_array_equal(labels, vary(dataset, labels="random").train.labels)
    np.testing.assert_array_equal(varied.train.images, dataset.train.images)
    np.testing.assert_array_equal(varied.test.labels, dataset.test.labels)
    counts = np.bincount(labels, minlength=5)
    assert ((counts - 600) ** 2 / 600).sum() < 18.5  # χ² with 4 degrees of freedom, 0.1 %
    agreement = (labels == np.asarray(dataset.train.labels)).mean()
    assert abs(agreement - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 3000)


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 1500), (0.1, 300), (0.0005, 2)])
def test_a_subset_has_the_fraction_of_the_examples(fraction, kept):
    dataset = random_dataset()
    train = vary(dataset, subset=fraction).train
    assert train.examples == kept
    pairs = {
        (image.tobytes(), int(label)) for image, label in zip(*map(np.asarray, dataset.train), strict=True)
    }
    chosen = [(image.tobytes(), int(label)) for image, label in zip(*map(np.asarray, train), strict=True)]
    assert len(set(chosen)) == kept
    assert set(chosen) <= pairs


def examples_of(split):
    """Return the images of a split as bytes, each with its label."""
    return [(image.tobytes(), int(label)) for image, label in zip(*map(np.asarray, split), strict=True)]


def test_a_validation_split_is_held_out_of_the_training_images():
    dataset = random_dataset()
    varied = vary(dataset, validation=0.1)
    assert (varied.train.examples, varied.validation.examples) == (2700, 300)
    train, validation = examples_of(varied.train), examples_of(varied.validation)
    assert sorted(train + validation) == sorted(examples_of(dataset.train))
    assert not set(train) & set(validation)
    assert examples_of(varied.test) == examples_of(dataset.test)
    assert examples_of(vary(dataset, validation=0.1).validation) == validation  # the same in every run
    assert list(varied.splits()) == ["train", "test", "validation"]
    assert list(dataset.splits()) == ["train", "test"]
    half = vary(dataset, subset=0.5, labels="random", validation=0.2)
    whole = vary(dataset, subset=0.5, labels="random")
    assert (half.train.examples, half.validation.examples) == (1200, 300)
    assert sorted(examples_of(half.train) + examples_of(half.validation)) == sorted(examples_of(whole.train))


def test_statistics_are_those_of_the_remaining_training_images(tmp_path):
    dataset = random_dataset(examples=30)._replace(folder=tmp_path)
    experiment = setup(make_tiny_config(**{"dataset.normalize": True, "dataset.validation": 0.5}), dataset)
    images = np.asarray(experiment.dataset.train.images, np.float64) / 255
    np.testing.assert_allclose(experiment.spec.normalize.mean, images.mean((0, 1, 2)))
    assert len(images) == 15
    assert not any(tmp_path.iterdir())  # these are not the statistics of the set


def test_a_validation_split_of_the_set_itself_is_kept():
    dataset = random_dataset()
    dataset = dataset._replace(validation=dataset.test.take(np.arange(20)))
    blurred = vary(dataset, blur=2)
    np.testing.assert_array_equal(blurred.validation.images, blurred.test.images[:20])
    assert setup(make_tiny_config(), dataset).dataset.validation.examples == 20
    with pytest.raises(UserError, match=r"has a validation split of 20 images, so it should be 0\.0"):
        vary(dataset, validation=0.1)


@pytest.mark.parametrize(("fraction", "count"), [(0.0001, 0), (0.9999, 3000)])
def test_an_empty_split_is_refused(fraction, count):
    with pytest.raises(UserError, match=f"dataset.validation is {fraction}, which holds out {count} of 3000"):
        vary(random_dataset(), validation=fraction)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_blurring_keeps_the_mean_and_removes_detail(dtype):
    checkerboard = np.indices((8, 8)).sum(0) % 2 * 200
    images = np.broadcast_to(checkerboard[None, :, :, None], (4, 8, 8, 1)).astype(dtype)
    dataset = data.from_arrays(images, [0, 1, 0, 1], images, [0, 1, 0, 1])
    varied = vary(dataset, blur=4)
    for split in (varied.train, varied.test):
        assert split.images.dtype == dtype
        assert split.images.shape == (4, 8, 8, 1)
        np.testing.assert_allclose(np.asarray(split.images, float), 100, atol=8)
    flat = data.from_arrays(np.full((4, 8, 8, 1), 7, dtype), [0, 1, 0, 1], images, [0, 1, 0, 1])
    np.testing.assert_allclose(vary(flat, blur=2).train.images, flat.train.images, rtol=1e-6)


def test_setup_varies_the_data_of_a_config():
    config = make_tiny_config(**{"dataset.labels": "random", "dataset.subset": 0.5, "dataset.blur": 2})
    experiment = setup(config, make_tiny_dataset())
    assert experiment.dataset.train.examples == 23
    assert not jnp.array_equal(experiment.dataset.test.images, make_tiny_dataset().test.images)
    assert setup(make_tiny_config(), make_tiny_dataset()).dataset.train.examples == 46


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dataset.labels": "permuted"}, "dataset.labels is 'permuted'; it should be true or random"),
        ({"dataset.subset": 0.0}, "dataset.subset is 0.0; it should be above 0 and at most 1"),
        ({"dataset.blur": 0}, "dataset.blur is 0; it should be at least 1"),
        ({"dataset.validation": 1.0}, "dataset.validation is 1.0; it should be at least 0 and below 1"),
    ],
)
def test_invalid_variations_are_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        configs.validate(make_tiny_config(**fields))


def test_nothing_left_and_streamed_sets_are_refused():
    with pytest.raises(UserError, match=r"dataset\.subset is 0\.0001, which leaves none of 3000 images"):
        vary(random_dataset(), subset=1e-4)

    class Streamed:
        in_memory = False

    with pytest.raises(UserError, match="vary sets in memory; this one is streamed"):
        vary(random_dataset()._replace(train=Streamed()), blur=2)
    with pytest.raises(UserError, match=r"this one is streamed, so they should be 'true', 1\.0, 0\.0 and 1"):
        vary(random_dataset()._replace(train=Streamed()), validation=0.1)
