"""Folders of images by class in the layout of torchvision: train/CLASS/IMAGE and val/CLASS/IMAGE."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imp_jax.errors import UserError, one_line

TEST_FOLDERS = ("val", "validation", "test")  # the first one that exists is the test split
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision

# Images of one size are kept in memory up to these limits. The limits do not depend on the machine, because a
# streamed set has other crops, and so other results.
MAX_SIDE = 96  # pixels
MAX_BYTES = 4 * 2**30  # size of the decoded pixels of both splits

# A set of at most this many files is checked for empty files before training; more would take minutes.
MAX_STATS = 200_000

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")  # names of modes in Pillow


class ImageFolder:
    """A split as a picklable sequence of {"image": bytes of an image file, "label": int}.

    Labels are indices into `classes`. The images of a class are ordered by folder and name. Hidden files and
    files whose suffix is not in `SUFFIXES` are skipped.

    Raises:
      UserError: there is no image, a file is empty, or a class is not in `classes`; on access, a file cannot be
        read.
    """

    def __init__(self, folder: Path, classes: list[str]):
        self.name, self.classes = f"{folder.name} of {folder.parent}", tuple(classes)
        self.num_classes = len(classes)
        self._folder = os.path.abspath(folder)
        class_folders = _classes(folder)
        if unknown := sorted(set(class_folders) - set(classes)):
            raise UserError(
                f"{folder} has the class {unknown[0]}, which train does not have ({len(unknown)} such "
                f"classes); it should have folders with the same names as train, such as {classes[0]}"
            )
        files, labels, skipped_suffixes = [], [], Counter()
        for label, name in enumerate(classes):
            for path in _files(self._folder, name) if name in class_folders else ():
                suffix = os.path.splitext(path)[1]
                if suffix.lower() in SUFFIXES:
                    files.append(os.fsencode(path))
                    labels.append(label)
                else:
                    skipped_suffixes[suffix or "no suffix"] += 1
        if not files:
            raise UserError(
                f"{folder} has no images in class folders; it should have a folder for each class, with files "
                f"ending in {', '.join(SUFFIXES)}"
            )
        if skipped_suffixes:
            print(
                f"{folder}: skipped {skipped_suffixes.total()} files whose suffix is not that of an image "
                f"({', '.join(sorted(skipped_suffixes))})"
            )
        self._files = np.array(files, np.bytes_)  # an array is pickled faster than a list
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
        """Return the path of an image."""
        return os.path.join(self._folder, os.fsdecode(self._files[index]))

    def header(self, index: int) -> tuple[int, int, bool]:
        """Return the height and width of an image in pixels, and whether it is grey, without decoding it."""
        try:
            with Image.open(self.file(index)) as image:
                return image.height, image.width, image.mode in _GREY_MODES
        except Exception as error:  # Pillow raises errors of many types for a damaged image
            raise self._unreadable(index, error) from error

    def _require_content(self, index):
        """Refuse an empty file."""
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
    """Open the training and the test split of a folder. The classes are the sorted folder names in train.

    Raises:
      UserError: a folder is missing; there are fewer than two classes; a class has no images; see also
        `ImageFolder`.
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
    """Return the height, width and channels of images to keep in memory; None if they should be streamed.

    Images are kept in memory if all have the same size, each side has at most `MAX_SIDE` pixels, and together
    they take at most `MAX_BYTES`. They have one channel if all are grey. No more headers are read once it is
    clear that the images should be streamed.
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
    """Return the sorted names of the folders in `folder` that are not hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {one_line(error)}") from error


def _files(folder: str, name: str) -> Iterator[str]:
    """Yield the paths, relative to `folder`, of all files below folder/name that are not hidden."""

    def fail(error):
        raise UserError(f"cannot read {error.filename}: {one_line(error)}") from error

    for directory, folders, files in os.walk(os.path.join(folder, name), onerror=fail, followlinks=True):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        relative = os.path.relpath(directory, folder)
        yield from (os.path.join(relative, entry) for entry in sorted(files) if not entry.startswith("."))


def _content(folder: Path) -> str:
    """Describe the content of a folder briefly."""
    if not folder.is_dir():
        return "it does not exist"
    entries = sorted(os.listdir(folder))
    return f"it has {', '.join(entries[:5]) or 'nothing'}{', …' * (len(entries) > 5)}"
