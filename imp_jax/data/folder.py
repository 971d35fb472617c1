"""Folders of images by class in the layout of torchvision: train/CLASS/IMAGE and val/CLASS/IMAGE."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imp_jax.errors import UserError, one_line

TEST_FOLDERS = ("val", "validation", "test")  # the first of them that exists is the test split
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's

# Images of one size are held in memory up to these limits. They do not depend on the machine: whether a set is
# streamed changes results.
MAX_SIDE = 96  # pixels
MAX_BYTES = 4 * 2**30  # of the decoded pixels of both splits

# Empty files are looked for before training if there are at most so many files; of more, this may take minutes.
MAX_STATS = 200_000

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")  # of Pillow


class ImageFolder:
    """The images of a split by number, {"image": bytes of an image file, "label": int}; can be pickled.

    Labels number `classes`. The images of a class are ordered by folder and name. Hidden files are left out, as
    are those whose suffix is not in `SUFFIXES`.

    Raises:
      UserError: no image, an empty file, a class that is not in `classes`; later, a file that cannot be read.
    """

    def __init__(self, folder: Path, classes: list[str]):
        self.name, self.classes = f"{folder.name} of {folder.parent}", tuple(classes)
        self.num_classes = len(classes)
        self._folder = os.path.abspath(folder)
        found = _classes(folder)
        if unknown := sorted(set(found) - set(classes)):
            raise UserError(
                f"{folder} has the class {unknown[0]}, which train lacks ({len(unknown)} such); it should have "
                f"folders named as those of train, such as {classes[0]}"
            )
        files, labels, others = [], [], Counter()
        for label, name in enumerate(classes):
            for path in _files(self._folder, name) if name in found else ():
                suffix = os.path.splitext(path)[1]
                if suffix.lower() in SUFFIXES:
                    files.append(os.fsencode(path))
                    labels.append(label)
                else:
                    others[suffix or "no suffix"] += 1
        if not files:
            raise UserError(
                f"{folder} has no images in class folders; it should have a folder for each class, with files "
                f"ending in {', '.join(SUFFIXES)}"
            )
        if others:
            print(
                f"{folder}: {others.total()} files are left out, as their names are not those of images "
                f"({', '.join(sorted(others))})"
            )
        self._files = np.array(files, np.bytes_)  # one array, which is pickled faster than a list
        self.labels = np.array(labels, np.int32)
        if len(files) <= MAX_STATS:
            for index in range(len(files)):
                self._require_content(index)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with open(self.file(index), "rb") as file:
                content = file.read()
        except OSError as error:
            raise self._unreadable(index, error) from error
        if not content:
            self._require_content(index)
        return {"image": content, "label": int(self.labels[index])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def file(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self._folder, os.fsdecode(self._files[index]))

    def header(self, index: int) -> tuple[int, int, bool]:
        """Height and width of an image in pixels, and whether it is grey, without decoding it."""
        try:
            with Image.open(self.file(index)) as image:
                return image.height, image.width, image.mode in _GREY_MODES
        except Exception as error:  # Pillow raises many kinds on a damaged image
            raise self._unreadable(index, error) from error

    def _require_content(self, index):
        try:
            if os.path.getsize(self.file(index)):
                return
        except OSError as error:
            raise self._unreadable(index, error) from error
        raise UserError(f"{self.file(index)} is empty; replace or remove it")

    def _unreadable(self, index, error):
        return UserError(
            f"cannot read {self.name}, {self.file(index)}: {one_line(error)}; replace or remove it"
        )


def open_splits(data_dir: str | os.PathLike | None) -> tuple[ImageFolder, ImageFolder]:
    """Open the training and the test split of a folder. Classes are the sorted names of the folders in train.

    Raises:
      UserError: a missing folder; fewer than two classes; a class without images; see `ImageFolder`.
    """
    if data_dir is None:
        raise UserError(
            "dataset.name is 'folder' and dataset.data_dir is None; dataset.data_dir should be a folder of "
            "images by class, with train/CLASS/IMAGE and val/CLASS/IMAGE"
        )
    root = Path(data_dir)
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise UserError(
            f"dataset.data_dir is {data_dir}; it should be a folder with train, and val, validation or test, "
            f"each with a folder of images for every class; {_content(root)}"
        )
    classes = _classes(root / "train")
    if len(classes) < 2:
        raise UserError(
            f"{root / 'train'} has {len(classes)} class folder{'s' * (len(classes) != 1)}; it should have at "
            f"least two, one for each class"
        )
    train = ImageFolder(root / "train", classes)
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(classes)) == 0)
    if len(empty):
        raise UserError(
            f"{root / 'train' / classes[empty[0]]} has no images ({len(empty)} such classes); it should have "
            f"files ending in {', '.join(SUFFIXES)}, or be removed"
        )
    return train, ImageFolder(test, classes)


def in_memory_shape(splits: tuple[ImageFolder, ...]) -> tuple[int, int, int] | None:
    """Height, width and channels of images that are to be held in memory; None if they are to be streamed.

    Images are held in memory if all have one size, of at most `MAX_SIDE` pixels a side, and take at most
    `MAX_BYTES`. They have one channel if all are grey. Headers are read up to the first image that decides.
    """
    examples = sum(map(len, splits))
    sizes, all_grey = set(), True
    for split in splits:
        for index in range(len(split)):
            height, width, grey = split.header(index)
            sizes.add((height, width))
            all_grey &= grey
            num_bytes = examples * height * width * (1 if all_grey else 3)
            if len(sizes) > 1 or max(height, width) > MAX_SIDE or num_bytes > MAX_BYTES:
                return None
    return (height, width, 1 if all_grey else 3)


def _classes(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {one_line(error)}") from error


def _files(folder: str, name: str) -> Iterator[str]:
    """The paths of all files below folder/name, from `folder` on, without hidden ones."""

    def fail(error):
        raise UserError(f"cannot read {error.filename}: {one_line(error)}") from error

    for directory, folders, files in os.walk(os.path.join(folder, name), onerror=fail, followlinks=True):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        below = os.path.relpath(directory, folder)
        yield from (os.path.join(below, entry) for entry in sorted(files) if not entry.startswith("."))


def _content(folder: Path) -> str:
    """What a folder has in it, shortly."""
    if not folder.is_dir():
        return "it does not exist"
    entries = sorted(os.listdir(folder))
    return f"it has {', '.join(entries[:5]) or 'nothing'}{', …' * (len(entries) > 5)}"
