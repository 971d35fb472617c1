"""Folders of images by class: which images a set has, which are kept in memory, and which are refused."""

import pickle

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imp_jax import config as configs
from imp_jax import config_files, data, experiment, runs
from imp_jax.data import folder
from imp_jax.errors import UserError
from tests.conftest import quick_config


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_set(root, shape=(6, 5, 3), suffix=".png", classes=("ant", "bee", "cat"), test="val"):
    """Write two training images and one test image of each class, all different."""
    for number, name in enumerate(classes):
        for image in range(2):
            write(root / "train" / name / f"{image}{suffix}", noise(10 * number + image, shape))
        write(root / test / name / f"0{suffix}", noise(10 * number + 9, shape))


def test_small_images_of_one_size_are_kept_in_memory(tmp_path, capsys):
    write_set(tmp_path)
    write(tmp_path / "train" / "bee" / "more" / "deep.PNG", noise(99))  # Tiny ImageNet has such folders
    for path in (
        "train/bee/notes.txt",
        "train/.hidden/0.png",
        "train/bee/._0.png",
    ):  # macOS writes ._ files
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"no image")
    times = {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    dataset = data.load("folder", tmp_path)
    assert f"{tmp_path}/train: skipped 1 files whose suffix is not " in capsys.readouterr().out
    np.testing.assert_array_equal(dataset.train.images, [noise(n) for n in (0, 1, 10, 11, 99, 20, 21)])
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(dataset.test.images, [noise(n) for n in (9, 19, 29)])
    np.testing.assert_array_equal(dataset.test.labels, [0, 1, 2])
    assert (dataset.num_classes, dataset.augmentation) == (3, ())
    pixels = np.asarray(dataset.train.images) / 255
    np.testing.assert_allclose(data.channel_statistics(dataset).mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    assert {path: path.stat().st_mtime for path in tmp_path.rglob("*")} == times  # nothing is written


def test_images_have_one_channel_if_all_are_grey(tmp_path):
    grey = noise(5, (4, 4))
    for name in ("a", "b"):
        write(tmp_path / "train" / name / "0.png", grey)
        write(tmp_path / "test" / name / "0.png", grey.astype(np.uint16) * 257)
    dataset = data.load("folder", tmp_path)
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.images, [grey[..., None]] * 2)
    rgba = noise(6, (4, 4, 4))
    write(tmp_path / "test" / "b" / "1.png", rgba)
    dataset = data.load("folder", tmp_path)
    np.testing.assert_array_equal(dataset.train.images, [np.stack([grey] * 3, -1)] * 2)
    np.testing.assert_array_equal(dataset.test.images[2], rgba[..., :3])


def test_images_of_various_sizes_are_streamed(tmp_path):
    write_set(tmp_path, (40, 40, 3), ".jpg")
    flat = np.full((30, 50), 70 * 257, np.uint16)
    write(tmp_path / "val" / "cat" / "1.png", flat)
    dataset = data.load("folder", str(tmp_path), image_side=16, workers=0)
    assert (dataset.train.examples, dataset.test.examples, dataset.num_classes) == (6, 4, 3)
    assert dataset.augmentation == ("crop", "flip")
    ((images, labels),) = dataset.test.evaluation_batches(4)
    assert images.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(labels, [0, 1, 2, 2])
    np.testing.assert_array_equal(images[3], 70)  # a 16-bit value divided by 257, and not clipped to 255
    source = pickle.loads(pickle.dumps(dataset.train.source))
    assert [source[i]["label"] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert source[3]["image"] == (tmp_path / "train" / "bee" / "1.jpg").read_bytes()
    config = quick_config(str(tmp_path), batch_size=2, **{"dataset.name": "folder", "dataset.normalize": True})
    config.dataset.image_side, config.dataset.workers = 16, 0
    spec = experiment.setup(config).spec
    assert spec.augmentation == ("crop", "flip")
    assert len(spec.normalize.std) == 3


@pytest.mark.parametrize(
    ("shape", "limits", "in_memory", "headers"),
    [
        ((6, 5, 3), {}, True, 9),
        ((96, 1, 3), {}, True, 9),
        ((97, 1, 3), {}, False, 1),
        ((6, 5, 3), {"MAX_BYTES": 9 * 6 * 5 * 3}, True, 9),
        ((6, 5, 3), {"MAX_BYTES": 9 * 6 * 5 * 3 - 1}, False, 1),
        ((6, 5), {"MAX_BYTES": 9 * 6 * 5}, True, 9),
    ],
)
def test_reading_of_headers_stops_once_streaming_is_certain(
    tmp_path, monkeypatch, shape, limits, in_memory, headers
):
    write_set(tmp_path, shape)
    for name, value in limits.items():
        monkeypatch.setattr(folder, name, value)
    calls = []
    header = folder.ImageFolder.header
    monkeypatch.setattr(folder.ImageFolder, "header", lambda self, i: calls.append(i) or header(self, i))
    expected = (*shape[:2], 3 if len(shape) == 3 else 1) if in_memory else None
    assert folder.in_memory_shape(folder.open_splits(str(tmp_path))) == expected
    assert len(calls) == headers


def test_the_test_split_is_val_or_validation_or_test(tmp_path):
    write_set(tmp_path, test="test")
    assert folder.open_splits(str(tmp_path))[1].name == f"test of {tmp_path}"
    write_set(tmp_path, test="validation")
    assert folder.open_splits(str(tmp_path))[1].name == f"validation of {tmp_path}"
    write_set(tmp_path, test="val", classes=("ant",))  # a class without test images
    _, test = folder.open_splits(str(tmp_path))
    assert (test.name, len(test), test.num_classes) == (f"val of {tmp_path}", 1, 3)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda root: (root / "train").rename(root / "training"), "train, and val.*; it has training, val"),
        (lambda root: (root / "val").rename(root / "eval"), "validation or test.*; it has eval, train"),
        (lambda root: root.rename(root.with_name("other")), "it should be a folder .*; it does not exist"),
        (lambda root: touch(root / "train/dog/0.txt"), r"train/dog has no images \(1 such classes\).* \.jpg"),
        (lambda root: touch(root / "val/dog/0.png"), r"/val has the class dog, which train does not"),
        (lambda root: touch(root / "train/bee/3.png"), "train/bee/3.png is empty; replace or remove it"),
        (
            lambda root: (root / "train/bee/3.png").write_text("no image"),
            "cannot read train of .*, .*train/bee/3.png: UnidentifiedImageError.*; replace or remove it",
        ),
        (lambda root: truncate(root / "val/cat/0.png"), "read val of .*, .*/val/cat/0.png: example 2 cannot"),
        (lambda root: (root / "val/cat/1.png").symlink_to("gone"), "read val of .*, .*/val/cat/1.png: File"),
    ],
)  # fmt: skip
def test_an_unusable_folder_or_file_is_named(tmp_path, change, sentence):
    root = tmp_path / "set"
    write_set(root)
    change(root)
    with pytest.raises(UserError, match=sentence):
        data.load("folder", root)


def test_folders_without_classes_are_refused(tmp_path):
    write_set(tmp_path, classes=("ant",))
    with pytest.raises(UserError, match="train has 1 class folder; it should have at least two"):
        data.load("folder", tmp_path)
    write_set(tmp_path, test="elsewhere")
    (tmp_path / "val" / "ant" / "0.png").rename(tmp_path / "val" / "0.png")  # the layout of ImageNet's archive
    with pytest.raises(UserError, match="val has no images in class folders; it should have a folder for each"):
        data.load("folder", tmp_path)
    for data_dir, sentence in (
        (None, "'folder' and dataset.data_dir is None"),
        ("", "dataset.data_dir is empty"),
    ):
        with pytest.raises(UserError, match=sentence):
            data.load("folder", data_dir)


def test_a_damaged_image_of_a_streamed_set_is_named_when_it_is_decoded(tmp_path, monkeypatch):
    write_set(tmp_path, (40, 100, 3), ".jpg")
    file = tmp_path / "val" / "bee" / "0.jpg"
    file.write_bytes(file.read_bytes()[:500])
    dataset = data.load("folder", tmp_path, image_side=8, workers=0)
    with pytest.raises(UserError, match=f"cannot decode example 1 of val of {tmp_path}, {file}: OSError"):
        list(dataset.test.evaluation_batches(1))
    monkeypatch.setattr(folder, "MAX_STATS", 1)  # with more files than this, sizes are not checked first
    file.write_bytes(b"")
    dataset = data.load("folder", tmp_path, image_side=8, workers=0)
    with pytest.raises(UserError, match=f"{file} is empty"):
        list(dataset.test.evaluation_batches(1))
    file.unlink()
    with pytest.raises(UserError, match=f"cannot read val of {tmp_path}, {file}: FileNotFoundError"):
        list(dataset.test.evaluation_batches(1))


@pytest.mark.parametrize("shape", [(6, 6, 3), (40, 100, 3)])  # in memory, streamed
def test_a_run_refuses_to_resume_with_another_data_set(tmp_path, shape):
    for name, classes in (("pets", ("ant", "bee")), ("wood", ("ash", "elm"))):
        write_set(tmp_path / name / "images", shape, classes=classes)
    config = quick_config(
        str(tmp_path / "pets" / "images"),
        **{"dataset.name": "folder", "batch_size": 2, "rounds": 1, "model.width": 0.02},
    )
    if shape[0] == 40:
        config.update_from_flattened_dict({"dataset.image_side": 8, "dataset.workers": 1})
    runs.run(config, tmp_path / "run")
    assert len(pd.read_csv(tmp_path / "run" / "results.csv")) == 2
    config.rounds = 2
    config.dataset.data_dir = str(tmp_path / "wood" / "images")
    with pytest.raises(
        UserError, match=r"another data set: .* there, and as many of other classes, such as ash"
    ):
        runs.run(config, tmp_path / "run")
    write(tmp_path / "pets" / "images" / "train" / "ant" / "9.png", noise(3, shape))
    config.dataset.data_dir = str((tmp_path / "pets").rename(tmp_path / "moved") / "images")
    with pytest.raises(UserError, match="4 training and 2 test images of 2 classes there, and 5 training"):
        runs.run(config, tmp_path / "run")
    (tmp_path / "moved" / "images" / "train" / "ant" / "9.png").unlink()
    runs.run(config, tmp_path / "run")
    assert len(pd.read_csv(tmp_path / "run" / "results.csv")) == 4


def test_a_worker_process_names_a_damaged_image(tmp_path):
    write_set(tmp_path / "set", (40, 100, 3), ".jpg")
    for file in (tmp_path / "set").glob("train/bee/*.jpg"):
        file.write_bytes(file.read_bytes()[:500])
    config = quick_config(
        str(tmp_path / "set"),
        **{"dataset.name": "folder", "dataset.image_side": 8, "dataset.workers": 1, "batch_size": 6},
    )
    with pytest.raises(UserError, match=r"cannot decode example \d+ of train of .*/bee/\d.jpg: OSError"):
        runs.run(config, tmp_path / "run")


def test_the_run_name_has_the_name_of_the_data_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = quick_config(".", **{"dataset.name": "folder"})
    name = config_files.run_name("own", configs.default(), config)
    assert name.startswith(f"own,batch_size=500,dataset.data_dir={tmp_path.name},dataset.name=folder")


def test_the_home_folder_in_data_dir_is_expanded(tmp_path, monkeypatch):
    write_set(tmp_path / "set")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.load("folder", "~/set").train.examples == 6
    with pytest.raises(UserError, match=r"dataset.data_dir is .~nobody-here/set., and there is no home"):
        data.load("folder", "~nobody-here/set")
