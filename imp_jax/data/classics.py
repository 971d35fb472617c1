"""TFDS builders of MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 that need no TensorFlow.

They derive from TFDS's own builders and have the same names, versions, features, URLs and checksums. So both
can read a folder that the other has prepared. TFDS's own builders unpack files and encode images with
TensorFlow; these builders parse the original files in memory with NumPy.
"""

import dataclasses
import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from rich.progress import MofNCompleteColumn, Progress
from tensorflow_datasets.image_classification import cifar, mnist

from imp_jax.data import download


class Classic:
    """Mixin for builders whose original files `download.fetch` finds or downloads."""

    _progress: Progress

    def fetch(self) -> None:
        """Download all original files, so that `download_and_prepare` needs no network.

        Raises:
          UserError, OSError: see `download.fetch`.
        """
        folder = Path(self.data_dir_root, "downloads").absolute()
        paths = download.fetch(self.url_infos, folder / self.name, folder / "manual")
        # TFDS searches for `filename` below `downloads/manual`, unless it is an absolute path
        self.url_infos = {
            url: dataclasses.replace(info, filename=str(paths[url])) for url, info in self.url_infos.items()
        }

    def download_and_prepare(self, **options) -> None:
        """Prepare the set as TFDS does. On a terminal, show a progress bar for each split."""
        with download.progress_bar(MofNCompleteColumn()) as self._progress:
            super().download_and_prepare(**options)

    def _generate_examples(self, split, images, labels) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the numbered examples of a split. `labels` holds one array per label feature."""
        description = f"preparing {split} of {self.name}"
        for index in self._progress.track(range(len(images)), description=description):
            # TFDS encodes PIL images without TensorFlow, but needs it for arrays
            example = {"image": Image.fromarray(images[index])}
            if "id" in self.info.features:
                example["id"] = f"{split}_{index:05d}"
            yield index, example | {feature: values[index] for feature, values in labels.items()}


class _Idx(Classic):
    """Builder of a set of four gzipped IDX files: images and labels of train and test."""

    def _split_generators(self, dl_manager):
        paths = {url.rpartition("/")[2]: dl_manager.download(url) for url in self.url_infos}
        splits = {"train": "train", "test": "t10k"}
        return {
            split: self._generate_examples(
                split,
                _read_idx(paths[f"{prefix}-images-idx3-ubyte.gz"]),
                {"label": _read_idx(paths[f"{prefix}-labels-idx1-ubyte.gz"])},
            )
            for split, prefix in splits.items()
        }


class _Cifar(Classic):
    """Builder of a tar file with records: label bytes, then 32 × 32 bytes each of red, green and blue."""

    LABEL_FEATURES: tuple[str, ...]  # in the order of a record's label bytes
    LABEL_FILES: tuple[str, ...]  # files with the names of the classes, in the same order
    TRAIN_FILES: tuple[str, ...]
    TEST_FILES: tuple[str, ...]

    def _split_generators(self, dl_manager):
        (url,) = self.url_infos
        with tarfile.open(dl_manager.download(url)) as archive:
            contents = {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()}
        for feature, file in zip(self.LABEL_FEATURES, self.LABEL_FILES, strict=True):
            self.info.features[feature].names = contents[file].decode().split()
        splits = {"train": self.TRAIN_FILES, "test": self.TEST_FILES}
        return {
            split: self._generate_examples(split, *self._parse(b"".join(contents[file] for file in files)))
            for split, files in splits.items()
        }

    def _parse(self, records: bytes):
        """Return the images of concatenated records, and their labels by feature."""
        num_labels = len(self.LABEL_FEATURES)
        records = np.frombuffer(records, np.uint8).reshape(-1, num_labels + 3 * 32 * 32)
        images = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, dict(zip(self.LABEL_FEATURES, records[:, :num_labels].T, strict=True))


def _read_idx(path) -> UInt8[np.ndarray, "..."]:
    """Read a gzipped IDX file of bytes: its rank in byte 3, its shape as big-endian int32, then the values."""
    with gzip.open(path) as file:
        content = file.read()
    rank = content[3]
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


with tfds.core.registered.skip_registration():  # `tfds.builder` should still return TFDS's own

    class MNIST(_Idx, mnist.MNIST):
        url_infos = mnist.MNIST.url_infos

    class FashionMNIST(_Idx, mnist.FashionMNIST):
        url_infos = mnist.FashionMNIST.url_infos

    class Cifar10(_Cifar, cifar.Cifar10):
        url_infos = cifar.Cifar10.url_infos
        LABEL_FEATURES = ("label",)
        LABEL_FILES = ("batches.meta.txt",)
        TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
        TEST_FILES = ("test_batch.bin",)

    class Cifar100(_Cifar, cifar.Cifar100):
        url_infos = cifar.Cifar100.url_infos
        LABEL_FEATURES = ("coarse_label", "label")
        LABEL_FILES = ("coarse_label_names.txt", "fine_label_names.txt")
        TRAIN_FILES = ("train.bin",)
        TEST_FILES = ("test.bin",)
