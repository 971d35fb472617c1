"""Data sets as the rest of the package sees them, and those made of arrays in memory."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from imp_jax.data import images as image_files
from imp_jax.data.augmentation import AUGMENTATIONS
from imp_jax.data.folder import ImageFolder
from imp_jax.data.source import Source
from imp_jax.data.streaming import Streamed
from imp_jax.errors import UserError, one_line


class InMemory(NamedTuple):
    """A whole split. Its images are uint8, from 0 to 255, or floats, which networks are given as they are."""

    images: UInt8[Array, "examples height width channels"] | Float[Array, "examples height width channels"]
    labels: Int[Array, " examples"]  # int32, 0 to num_classes − 1

    @property
    def examples(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]


class Dataset(NamedTuple):
    train: InMemory | Streamed
    test: InMemory | Streamed
    num_classes: int
    augmentation: tuple[str, ...]  # of training images
    folder: Path | None  # in which statistics.json is kept; None does not keep it
    classes: tuple[str, ...] = ()  # their names, of a folder of images

    def identity(self) -> dict[str, Any]:
        """What a workdir keeps to recognise the data set, for JSON."""
        return {
            "train_examples": self.train.examples,
            "test_examples": self.test.examples,
            "num_classes": self.num_classes,
            "classes": list(self.classes),
        }


def from_arrays(
    train_images: ArrayLike,
    train_labels: ArrayLike,
    test_images: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int | None = None,
    augmentation: Sequence[str] = (),
) -> Dataset:
    """Check the arrays of a data set and put them on the device.

    Args:
      train_images, test_images: [examples, height, width, channels]: uint8, from 0 to 255, which networks are
        given divided by 255; or floating-point, which they are given as they are, in float32.
      train_labels, test_labels: [examples]: integers from 0 to `num_classes` − 1.
      num_classes: None takes the largest training label + 1.
      augmentation: of training images, names of `AUGMENTATIONS`. A crop fills with zeros.

    Raises:
      UserError: an array of another shape or type; images that are not finite, or differ in shape or type
        between the splits; labels out of range; one class; an unknown augmentation; arrays too large for the
        device.
    """
    train_images, train_labels, test_images, test_labels = map(
        np.asarray, (train_images, train_labels, test_images, test_labels)
    )
    _check_images(train_images, "train_images")
    _check_images(test_images, "test_images")
    if (train_images.dtype, train_images.shape[1:]) != (test_images.dtype, test_images.shape[1:]):
        raise UserError(
            f"train_images are {_describe(train_images)} and test_images {_describe(test_images)}; they should "
            f"have the same type, height, width and channels"
        )
    _check_labels(train_labels, "train_labels", len(train_images), num_classes)
    num_classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    _check_labels(test_labels, "test_labels", len(test_images), num_classes)
    if num_classes < 2:
        raise UserError("all train_labels are 0; there should be at least two classes")
    require_augmentations(augmentation, AUGMENTATIONS)
    dtype = np.dtype(np.uint8 if train_images.dtype == np.uint8 else np.float32)
    num_bytes = (train_images.size + test_images.size) * dtype.itemsize
    require_memory("train_images and test_images", len(train_images) + len(test_images), num_bytes)
    splits = (
        InMemory(jnp.asarray(images, dtype), jnp.asarray(labels, jnp.int32))
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    )
    return Dataset(*splits, num_classes, tuple(augmentation), folder=None)


def read_all(source: Source | ImageFolder, image_shape: tuple[int, int, int]) -> InMemory:
    """Decode all images of a split to arrays of `image_shape` (height, width, channels), on the device.

    Raises:
      UserError: an example that cannot be read.
    """
    images = np.empty((len(source), *image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for index, example in enumerate(source):
        try:
            images[index] = image_files.decode(example["image"], image_shape)
        except Exception as error:  # Pillow raises many kinds on a damaged image
            raise UserError(
                f"cannot read {source.name}, {source.file(index)}: example {index} cannot be decoded: "
                f"{one_line(error)}"
            ) from error
        labels[index] = example["label"]
    return InMemory(jnp.asarray(images), jnp.asarray(labels))


def device_memory() -> int:
    """Bytes of memory of the first device; of a CPU, what this process may use of the machine's.

    All CPU devices have the same memory, and arrays that are replicated over them are stored once.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit") or _machine_memory()


def require_memory(name: str, examples: int, num_bytes: int) -> None:
    """Refuse images that the device cannot hold next to a network in training, before they are read."""
    available = device_memory()
    if num_bytes > available / 2:
        raise UserError(
            f"the {examples:,} images of {name} are held in memory and take {num_bytes / 2**30:.1f} GiB; that "
            f"should be at most half of the device's {available / 2**30:.1f} GiB"
        )


def require_augmentations(augmentation: Sequence[str], known: Sequence[str]) -> None:
    """Refuse an unknown augmentation, or one that is named twice."""
    one_by_one = not isinstance(augmentation, str)
    if not one_by_one or not set(augmentation) <= set(known) or len(set(augmentation)) < len(augmentation):
        raise UserError(
            f"dataset.augmentation is {augmentation!r}; it should be None, or any of {' and '.join(known)}, "
            f"none twice, written as ('crop', 'flip')"
        )


def _check_images(images, name):
    if images.ndim != 4 or not all(images.shape):
        raise UserError(
            f"{name} has the shape {images.shape}; it should be [examples, height, width, channels], none 0"
        )
    if images.dtype == np.uint8:
        return
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"{name} is of type {images.dtype}; it should be uint8, from 0 to 255, or floating-point, which is "
            f"used as it is"
        )
    if not np.isfinite(images).all():
        raise UserError(f"{name} has values that are not finite; all should be")


def _check_labels(labels, name, examples, num_classes):
    if labels.shape != (examples,):
        raise UserError(
            f"{name} has the shape {labels.shape}; it should be ({examples},), one number for each image"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{name} is of type {labels.dtype}; it should be integers, from 0")
    allowed = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
    wrong = labels[(labels < 0) | (labels >= (np.inf if num_classes is None else num_classes))]
    if len(wrong):
        raise UserError(f"{name} has the label {wrong[0]}; labels should be {allowed}")


def _describe(images):
    return f"{images.dtype} of {' × '.join(map(str, images.shape[1:]))}"


def _machine_memory():
    """The machine's memory in bytes, or less if a control group (of a container or Slurm job) limits it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version = Path("memory") if "memory" in controllers.split(",") else Path()
            group = Path("/sys/fs/cgroup") / version / path.lstrip("/")
            for folder in (group, *group.parents):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                        limits.append(int((folder / name).read_text()))
    return min(limits)
