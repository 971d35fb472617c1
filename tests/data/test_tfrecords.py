"""Sets in TFRecord format: the same examples as in ArrayRecord format, and errors that name damaged files."""

import json
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorboardX.record_writer import RecordWriter

from imp_jax import data
from imp_jax.data import tfrecords
from imp_jax.errors import UserError
from tests.helpers import folders


def write_records(path, records):
    writer = RecordWriter(str(path))  # event files have the same format
    for record in records:
        writer.write(record)
    writer.close()


def convert(name, data_dir, shards=1):
    """Convert a prepared set from ArrayRecord to the TFRecord format of TFDS."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    file = builder.data_path / "dataset_info.json"
    info = json.loads(file.read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        raw = builder.as_data_source(split["name"], deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        records = [raw[i] for i in range(len(raw))]
        ends = np.linspace(0, len(raw), shards + 1).astype(int)
        split["shardLengths"] = [str(n) for n in np.diff(ends)]
        for shard in range(shards):
            path = builder.data_path / f"{name}-{split['name']}.tfrecord-{shard:05}-of-{shards:05}"
            write_records(path, records[ends[shard] : ends[shard + 1]])
    file.write_text(json.dumps(info))
    for path in builder.data_path.glob("*.array_record*"):
        path.unlink()
    return builder.data_path


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Folders of the same MNIST: in ArrayRecord format, and in three TFRecord files per split."""
    array_record, tfrecord = (tmp_path_factory.mktemp(name) for name in ("array_record", "tfrecord"))
    folders.write_mnist(array_record)
    shutil.copytree(array_record / "mnist", tfrecord / "mnist")
    convert("mnist", tfrecord, shards=3)
    return array_record, tfrecord


def assert_same(one, other):
    for split in ("train", "test"):
        for a, b in zip(getattr(one, split), getattr(other, split), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_tfrecord_set_in_memory_equals_the_arrayrecord_set(mnist):
    array_record, tfrecord = mnist
    expected = data.load("mnist", array_record)
    assert expected.train.examples == 30
    assert_same(data.load("mnist", tfrecord), expected)
    assert_same(data.load("mnist:3.0.1", tfrecord), expected)  # TFDS opens a version from its folder
    assert data.prepare("mnist", tfrecord) == next(tfrecord.glob("mnist/*"))  # already prepared


def test_a_streamed_tfrecord_set_equals_the_arrayrecord_set_and_can_be_pickled(tmp_path):
    folders.write_imagenet(tmp_path)

    def load():
        train = data.load("imagenet2012", tmp_path, image_side=8, workers=0).train
        source = pickle.loads(pickle.dumps(train.source))
        batches = train.training_batches(np.array([[1, 2]], np.uint32), 1, 4)
        return [source[i] for i in (11, 3, 0)], [tuple(map(np.asarray, batch)) for batch in batches]

    examples, batches = load()
    convert("imagenet2012", tmp_path, shards=2)
    converted_examples, converted_batches = load()
    assert converted_examples == examples
    assert len(batches) == 3
    for (images, labels), (converted_images, converted_labels) in zip(batches, converted_batches, strict=True):
        np.testing.assert_array_equal(images, converted_images)
        np.testing.assert_array_equal(labels, converted_labels)


def test_records_of_several_files_are_read_in_any_order(tmp_path):
    records = [bytes([i]) * i for i in range(9)]  # of 0 to 8 bytes
    lengths = [2, 0, 6, 1]
    ends = np.cumsum([0, *lengths])
    files = [str(tmp_path / str(i)) for i in range(4)]
    for file, start, end in zip(files, ends[:-1], ends[1:], strict=True):
        write_records(file, records[start:end])
    order = [8, 0, 3, 3, 2, 7, 1]
    stored = tfrecords._Records(files, lengths)
    assert len(stored) == 9
    assert stored.__getitems__(order) == [records[i] for i in order]
    assert [stored[i] for i in range(9)] == records
    for index in (9, -1):
        with pytest.raises(IndexError):
            stored[index]


def flip_first_byte(content):
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda content: content[:-1], "the file is cut off within record 9"),
        (lambda content: content[: len(content) // 2], r"the file is cut off within record \d"),
        (lambda content: content + b"abc", "the file is cut off within record 10"),
        (lambda content: b"", "the file has 0 records, not 10"),
        (flip_first_byte, "the length of record 0 does not match its checksum"),
        (lambda content: content * 2, "the file has 20 records, not 10"),
    ],
)
def test_load_names_a_damaged_file(mnist, tmp_path, damage, sentence):
    shutil.copytree(mnist[1] / "mnist", tmp_path / "mnist")
    (file,) = tmp_path.glob("mnist/*/mnist-train.tfrecord-00001-of-00003")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"cannot read train of mnist, {file}: ValueError: {sentence}; remove "):
        data.load("mnist", tmp_path)


def test_load_names_a_missing_file(mnist, tmp_path):
    shutil.copytree(mnist[1] / "mnist", tmp_path / "mnist")
    (file,) = tmp_path.glob("mnist/*/mnist-train.tfrecord-00001-of-00003")
    file.unlink()
    with pytest.raises(UserError, match=f"mnist is incomplete: {file} is missing .1 of 3 files of train"):
        data.load("mnist", tmp_path)


def test_the_format_is_found_from_the_files(mnist, tmp_path):
    """dataset_info.json does not matter; ArrayRecord is preferred if there are files of both formats."""
    array_record, tfrecord = mnist
    expected = data.load("mnist", array_record)
    shutil.copytree(tfrecord / "mnist", tmp_path / "mnist")
    (folder,) = tmp_path.glob("mnist/*")
    info = json.loads((folder / "dataset_info.json").read_text())
    del info["fileFormat"]  # as older versions of TFDS write it
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert_same(data.load("mnist", tmp_path), expected)

    # files and dataset_info.json as after `tfds convert_format`
    shutil.rmtree(tmp_path / "mnist")
    shutil.copytree(array_record / "mnist", tmp_path / "mnist")
    for split in ("train", "test"):
        (folder / f"mnist-{split}.tfrecord-00000-of-00001").write_bytes(b"damaged")
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert_same(data.load("mnist", tmp_path), expected)
