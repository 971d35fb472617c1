"""Streamed splits on a small ImageNet: geometry of crops, order, exact resumption, damaged files."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from imp_jax import data
from imp_jax.data import streaming
from imp_jax.errors import UserError
from tests.helpers import folders

SEEDS = np.array([[1, 2], [3, 4]], np.uint32)  # two members


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagenet")
    folders.write_imagenet(path)
    return path


def load(path, workers=0, image_side=32, **options):
    return data.load("imagenet2012", path, image_side=image_side, workers=workers, **options)


def to_list(batches):
    return [(np.asarray(images), np.asarray(labels)) for images, labels in batches]


def assert_same(batches, expected):
    for batch, expected_batch in zip(batches, expected, strict=True):
        for a, b in zip(batch, expected_batch, strict=True):
            np.testing.assert_array_equal(a, b)


# --- geometry ---


def test_random_boxes_have_the_areas_and_shapes_of_inception_crops():
    rng = np.random.default_rng(0)
    boxes = np.array([streaming.random_box(rng, 400, 300) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    assert (left >= 0).all()
    assert (upper >= 0).all()
    assert (right <= 400).all()
    assert (lower <= 300).all()
    width, height = right - left, lower - upper
    area, ratio = width * height / (400 * 300), width / height
    assert 0.075 < area.min() < 0.1  # rounding to pixels
    assert area.max() > 0.9
    assert 0.74 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.35
    small = area < 0.3  # these fit with any aspect ratio
    assert np.median(np.log(ratio[small])) == pytest.approx(0, abs=0.04)
    assert np.median(area[small]) == pytest.approx(0.19, abs=0.01)


@pytest.mark.parametrize(("size", "box"), [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520))])
def test_the_random_box_of_an_extremely_long_image_is_its_centre(size, box):
    assert streaming.random_box(np.random.default_rng(0), *size) == pytest.approx(box)


def test_the_central_box_equals_resize_256_and_crop_224():
    assert streaming.central_box(256, 256) == (16, 16, 240, 240)
    assert streaming.central_box(512, 256) == (144, 16, 368, 240)
    left, upper, right, lower = streaming.central_box(300, 500)
    assert (right - left, lower - upper) == pytest.approx((300 * 224 / 256,) * 2)
    assert (left + right, upper + lower) == pytest.approx((300, 500))


def ramp(width, height):
    """Make an image whose red rises from top to bottom and green from left to right."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack(
        [255 * rows / (height - 1), 255 * columns / (width - 1), np.full((height, width), 99)], -1
    )
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("encoding", ["JPEG", "PNG"])
# smaller and larger than half of the box
@pytest.mark.parametrize("side", [32, 200])
def test_resized_returns_the_part_in_the_box(encoding, side):
    image = Image.open(folders.encoded(ramp(600, 400), encoding))
    crop = streaming.resized(image, (150, 100, 450, 300), side).astype(float)
    assert crop.shape == (side, side, 3)
    centres = (np.arange(side) + 0.5) / side
    np.testing.assert_allclose(crop[..., 0].mean(1), 255 * (100 + 200 * centres) / 400, atol=3)
    np.testing.assert_allclose(crop[..., 1].mean(0), 255 * (150 + 300 * centres) / 600, atol=3)
    np.testing.assert_allclose(crop[..., 2], 99, atol=4)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16"])
def test_resized_converts_images_of_any_mode_to_rgb(mode):
    file, image = io.BytesIO(), Image.fromarray(ramp(80, 60))
    expected = image.convert("L") if mode in ("L", "I;16") else image
    if mode == "I;16":
        converted = Image.fromarray(np.asarray(expected).astype(np.uint16) * 257)
    else:
        converted = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    converted.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG")
    crop = streaming.resized(Image.open(file), (0, 0, 80, 60), 16)
    assert crop.dtype == np.uint8
    expected = expected.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    difference = np.abs(crop.astype(int) - np.asarray(expected))
    assert difference.mean() < (6 if mode == "P" else 3)  # errors of a palette of 256 colours, and of a JPEG


# --- order ---


def test_the_test_split_of_imagenet_is_its_validation_split(imagenet):
    dataset = load(imagenet)
    assert (dataset.train.examples, dataset.test.examples, dataset.num_classes) == (12, 6, 1000)
    assert dataset.train.image_shape == (32, 32, 3)
    assert dataset.train.augmentation == ("crop", "flip")
    images, labels = to_list(dataset.test.evaluation_batches(4))[0]
    np.testing.assert_array_equal(labels, [dataset.test.source[i]["label"] for i in range(4)])
    np.testing.assert_allclose(
        images[..., 2], np.broadcast_to(20 + 60 * labels[:, None, None], (4, 32, 32)), atol=5
    )


def test_evaluation_batches_have_every_example_once_in_order(imagenet):
    test = load(imagenet).test
    batches = to_list(test.evaluation_batches(4))
    assert [len(labels) for _, labels in batches] == [4, 2]
    row_means = batches[0][0][0, :, :, 0].mean(1)
    assert (np.diff(row_means) > 0).all()  # as in the original image
    assert_same(batches, to_list(test.evaluation_batches(4)))


def test_the_order_of_examples_differs_between_members_and_epochs(imagenet):
    train = load(imagenet, augmentation=()).train
    batches = to_list(train.training_batches(SEEDS, epochs=2, batch_size=4))
    assert len(batches) == 6
    assert batches[0][0].shape == (2, 4, 32, 32, 3)
    images = np.concatenate([images for images, _ in to_list(train.evaluation_batches(12))])

    def find_example(image):
        return np.argmin(np.abs(images - image.astype(float)).sum((1, 2, 3)))

    examples = np.array(
        [[[find_example(image) for image in member_batch] for member_batch in step] for step, _ in batches]
    )
    # from [steps of two epochs, members, batch] to an order of 12 examples per member and epoch
    orders = examples.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3).reshape(4, 12)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(12))
    assert len({tuple(order) for order in orders}) == 4


def test_batches_of_a_member_do_not_depend_on_other_members(imagenet):
    train = load(imagenet).train
    both_members = to_list(train.training_batches(SEEDS, 1, 4))
    second_member = to_list(train.training_batches(SEEDS[1:], 1, 4))
    assert_same([(images[1:], labels[1:]) for images, labels in both_members], second_member)


def test_examples_that_do_not_fill_a_batch_are_left_out(imagenet):
    assert len(to_list(load(imagenet).train.training_batches(SEEDS, epochs=3, batch_size=5))) == 3 * 2


def test_batches_do_not_depend_on_workers_or_the_first_step(imagenet):
    expected = to_list(load(imagenet).train.training_batches(SEEDS, 2, 4))
    for workers in (0, 2):
        train = load(imagenet, workers=workers).train
        for first_step in (0, 4):
            batches = train.training_batches(SEEDS, 2, 4, first_step=first_step)
            assert_same(to_list(batches), expected[first_step:])


def test_flips_are_random_and_augmentation_can_be_disabled(imagenet):
    augmented = [images for images, _ in to_list(load(imagenet).train.training_batches(SEEDS, 1, 4))]
    flips = np.array(
        [np.diff(image[..., 1].astype(float).mean(0)).mean() < 0 for image in np.concatenate(augmented, 1)[0]]
    )
    assert 0 < flips.sum() < 12
    plain = [
        images for images, _ in to_list(load(imagenet, augmentation=()).train.training_batches(SEEDS, 1, 4))
    ]
    rises = np.diff(np.concatenate(plain, 1)[..., 1].astype(float).mean(2), axis=-1).mean(-1)
    assert (rises > 0).all()


# --- statistics and damage ---


def test_statistics_of_a_streamed_set_are_cached(imagenet):
    dataset = load(imagenet)
    images = np.concatenate([images for images, _ in to_list(dataset.train.evaluation_batches(5))]) / 255
    computed = data.channel_statistics(dataset)
    np.testing.assert_allclose(computed.mean, images.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(computed.std, images.std((0, 1, 2)), rtol=1e-5)
    assert next(imagenet.glob("imagenet2012/*/statistics.json")).exists()
    assert data.channel_statistics(dataset) == computed
    smaller = load(imagenet, image_side=8)
    images = np.concatenate([images for images, _ in to_list(smaller.train.evaluation_batches(5))]) / 255
    np.testing.assert_allclose(data.channel_statistics(smaller).std, images.std((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_for_a_damaged_image_names_its_file(tmp_path, workers):
    damaged = [{"file_name": "a", "image": io.BytesIO(b"\xff\xd8 no JPEG"), "label": 1}]
    intact = [{"file_name": "b", "image": folders.encoded(ramp(50, 50), "JPEG"), "label": 1}]
    folders.write("imagenet2012", tmp_path, {"train": intact, "validation": damaged})
    dataset = load(tmp_path, workers=workers)
    with pytest.raises(
        UserError, match=r"cannot decode example 0 of validation of imagenet2012, .*validation.array"
    ):
        to_list(dataset.test.evaluation_batches(2))


def test_a_label_out_of_range_is_reported(imagenet):
    source = load(imagenet).train.source
    source.num_classes = 2
    with pytest.raises(UserError, match=r"example \d+ of train of imagenet2012 has the label [23].* 0 to 1"):
        _ = [source[i] for i in range(12)]


def test_a_source_can_be_pickled(imagenet):
    source = load(imagenet).train.source
    assert pickle.loads(pickle.dumps(source))[3]["label"] == source[3]["label"]
