"""Streams of JPEGs: geometry of the crops, order, exact resumption, damage; on a small ImageNet."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from imp_jax import data
from imp_jax.data import streaming
from imp_jax.errors import UserError
from tests.helpers import folders

SEEDS = np.array([[1, 2], [3, 4]], np.uint32)  # of two members


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagenet")
    folders.write_imagenet(path)
    return path


def load(path, workers=0, image_side=32, **options):
    return data.load("imagenet2012", path, image_side=image_side, workers=workers, **options)


def listed(batches):
    return [(np.asarray(images), np.asarray(labels)) for images, labels in batches]


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


# --- geometry ---


def test_random_boxes_have_the_areas_and_shapes_of_inception_crops():
    rng = np.random.default_rng(0)
    boxes = np.array([streaming.random_box(draw, 400, 300) for _ in range(2000)])
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
    small = area < 0.3  # fits in any shape
    assert np.median(np.log(ratio[small])) == pytest.approx(0, abs=0.04)
    assert np.median(area[small]) == pytest.approx(0.19, abs=0.01)


@pytest.mark.parametrize(("size", "box"), [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520))])
def test_an_image_too_long_for_ten_draws_gives_its_middle(size, box):
    assert streaming.random_box(np.random.default_rng(0), *size) == pytest.approx(box)


def test_the_central_box_is_resize_256_crop_224():
    assert streaming.central_box(256, 256) == (16, 16, 240, 240)
    assert streaming.central_box(512, 256) == (144, 16, 368, 240)
    left, upper, right, lower = streaming.central_box(300, 500)
    assert (right - left, lower - upper) == pytest.approx((300 * 224 / 256,) * 2)
    assert (left + right, upper + lower) == pytest.approx((300, 500))


def ramp(width, height):
    """Red rises from top to bottom, green from left to right, so a crop shows where it was taken."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack(
        [255 * rows / (height - 1), 255 * columns / (width - 1), np.full((height, width), 99)], -1
    )
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("encoding", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "side", [32, 200]
)  # below and above the half of the box, where JPEGs are decoded smaller
def test_a_crop_shows_its_box(encoding, side):
    image = Image.open(folders.encoded(ramp(600, 400), encoding))
    crop = streaming.resized(image, (150, 100, 450, 300), side).astype(float)
    assert crop.shape == (side, side, 3)
    centres = (np.arange(side) + 0.5) / side
    np.testing.assert_allclose(crop[..., 0].mean(1), 255 * (100 + 200 * centres) / 400, atol=3)
    np.testing.assert_allclose(crop[..., 1].mean(0), 255 * (150 + 300 * centres) / 600, atol=3)
    np.testing.assert_allclose(crop[..., 2], 99, atol=4)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16"])
def test_images_of_other_modes_become_rgb(mode):
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
    assert difference.mean() < (6 if mode == "P" else 3)  # of 256 colours, and of a JPEG


# --- order ---


def test_imagenet_is_tested_on_its_validation_split(imagenet):
    dataset = load(imagenet)
    assert (dataset.train.examples, dataset.test.examples, dataset.num_classes) == (12, 6, 1000)
    assert dataset.train.image_shape == (32, 32, 3)
    assert dataset.train.augmentation == ("crop", "flip")
    images, labels = listed(dataset.test.evaluation_batches(4))[0]
    np.testing.assert_array_equal(labels, [dataset.test.source[i]["label"] for i in range(4)])
    np.testing.assert_allclose(
        images[..., 2], np.broadcast_to(20 + 60 * labels[:, None, None], (4, 32, 32)), atol=5
    )


def test_evaluation_sees_every_example_once_in_order(imagenet):
    test = load(imagenet).test
    batches = listed(test.evaluation_batches(4))
    assert [len(labels) for _, labels in batches] == [4, 2]
    ramp_of_rows = batches[0][0][0, :, :, 0].mean(1)
    assert (np.diff(ramp_of_rows) > 0).all()  # not flipped, the same for all
    assert_same(batches, listed(test.evaluation_batches(4)))


def test_every_member_visits_the_epoch_in_an_order_of_its_own(imagenet):
    train = load(imagenet, augmentation=()).train
    batches = listed(train.training_batches(SEEDS, epochs=2, batch_size=4))
    assert len(batches) == 6
    assert batches[0][0].shape == (2, 4, 32, 32, 3)
    whole = np.concatenate([images for images, _ in listed(train.evaluation_batches(12))])

    def example(image):
        return np.argmin(np.abs(whole - image.astype(float)).sum((1, 2, 3)))

    visits = np.array([[[example(image) for image in of_member] for of_member in step] for step, _ in batches])
    # from [steps of two epochs, members, batch] to an order of 12 examples a member and epoch
    orders = visits.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3).reshape(4, 12)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(12))
    assert len({tuple(order) for order in orders}) == 4


def test_a_member_sees_the_same_beside_any_other(imagenet):
    train = load(imagenet).train
    both = listed(train.training_batches(SEEDS, 1, 4))
    alone = listed(train.training_batches(SEEDS[1:], 1, 4))
    assert_same([(images[1:], labels[1:]) for images, labels in both], alone)


def test_what_does_not_fill_a_batch_is_left_out(imagenet):
    assert len(listed(load(imagenet).train.training_batches(SEEDS, epochs=3, batch_size=5))) == 3 * 2


def test_a_stream_is_the_same_with_any_workers_and_from_any_step_on(imagenet):
    expected = listed(load(imagenet).train.training_batches(SEEDS, 2, 4))
    for workers in (0, 2):
        train = load(imagenet, workers=workers).train
        for first_step in (0, 4):
            batches = train.training_batches(SEEDS, 2, 4, first_step=first_step)
            assert_same(listed(batches), expected[first_step:])


def test_augmentation_is_drawn_anew_and_can_be_left_out(imagenet):
    augmented = [images for images, _ in listed(load(imagenet).train.training_batches(SEEDS, 1, 4))]
    flips = np.array(
        [np.diff(image[..., 1].astype(float).mean(0)).mean() < 0 for image in np.concatenate(augmented, 1)[0]]
    )
    assert 0 < flips.sum() < 12
    plain = [
        images for images, _ in listed(load(imagenet, augmentation=()).train.training_batches(SEEDS, 1, 4))
    ]
    rises = np.diff(np.concatenate(plain, 1)[..., 1].astype(float).mean(2), axis=-1).mean(-1)
    assert (rises > 0).all()


# --- statistics and damage ---


def test_statistics_of_a_stream_are_kept(imagenet):
    dataset = load(imagenet)
    images = np.concatenate([images for images, _ in listed(dataset.train.evaluation_batches(5))]) / 255
    computed = data.channel_statistics(dataset)
    np.testing.assert_allclose(computed.mean, images.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(computed.std, images.std((0, 1, 2)), rtol=1e-5)
    assert next(imagenet.glob("imagenet2012/*/statistics.json")).exists()
    assert data.channel_statistics(dataset) == computed
    smaller = load(imagenet, image_side=8)
    images = np.concatenate([images for images, _ in listed(smaller.train.evaluation_batches(5))]) / 255
    np.testing.assert_allclose(data.channel_statistics(smaller).std, images.std((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_with_its_file(tmp_path, workers):
    broken = [{"file_name": "a", "image": io.BytesIO(b"\xff\xd8 no JPEG"), "label": 1}]
    whole = [{"file_name": "b", "image": folders.encoded(ramp(50, 50), "JPEG"), "label": 1}]
    folders.write("imagenet2012", tmp_path, {"train": whole, "validation": broken})
    dataset = load(tmp_path, workers=workers)
    with pytest.raises(
        UserError, match=r"cannot decode example 0 of validation of imagenet2012, .*validation.array"
    ):
        listed(dataset.test.evaluation_batches(2))


def test_a_label_outside_of_the_classes_is_said(imagenet):
    source = load(imagenet).train.source
    source.num_classes = 2
    with pytest.raises(UserError, match=r"example \d+ of train of imagenet2012 has the label [23].* 0 to 1"):
        _ = [source[i] for i in range(12)]


def test_a_source_travels_to_other_processes(imagenet):
    source = load(imagenet).train.source
    assert pickle.loads(pickle.dumps(source))[3]["label"] == source[3]["label"]
