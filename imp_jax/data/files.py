"""Data sets from files: read into memory, or streamed during training."""

import math
import os
from collections.abc import Sequence

from imp_jax.data import folder
from imp_jax.data.augmentation import AUGMENTATIONS
from imp_jax.data.dataset import Dataset, read_all, require_augmentations, require_memory
from imp_jax.data.folder import ImageFolder
from imp_jax.data.source import Source
from imp_jax.data.streaming import Streamed
from imp_jax.runtime.devices import available_cores


def load_folder(
    data_dir: str | os.PathLike | None,
    *,
    augmentation: Sequence[str] | None = None,
    image_side: int = 224,
    workers: int | None = None,
) -> Dataset:
    """Load a folder of images by class: into memory if all images have one small size, otherwise streamed.

    The arguments are those of `imp_jax.data.load`. By default, streamed images are augmented and images in
    memory are not.

    Raises:
      UserError: see `folder.open_splits` and `read_or_stream`.
    """
    splits = folder.open_splits(data_dir)
    image_shape = folder.in_memory_shape(splits)
    if augmentation is None:
        augmentation = () if image_shape else ("crop", "flip")
    dataset = read_or_stream(splits, image_shape, augmentation, image_side, workers)
    return dataset._replace(classes=splits[0].classes)


def read_or_stream(
    splits: tuple[Source, Source] | tuple[ImageFolder, ImageFolder],
    image_shape: tuple[int, int, int] | None,
    augmentation: Sequence[str],
    image_side: int,
    workers: int | None,
) -> Dataset:
    """Make a data set of the encoded images of a training and a test split.

    Args:
      splits: training and test split.
      image_shape: height, width and channels of all images, which are decoded and put on the device. None: the
        images are streamed.
      augmentation: names of augmentations of the training images.
      image_side: height and width in pixels of the crops of a streamed set.
      workers: number of processes that decode a streamed set; None: one per core that this process may use.

    Raises:
      UserError: an augmentation is unknown; the images do not fit into memory; or an example cannot be read.
    """
    require_augmentations(augmentation, AUGMENTATIONS if image_shape else Streamed.augmentations)
    augmentation = tuple(augmentation)
    if image_shape:
        num_examples = sum(map(len, splits))
        set_name = splits[0].name.removeprefix("train of ")
        require_memory(set_name, num_examples, num_examples * math.prod(image_shape))
        train, test = (read_all(split, image_shape) for split in splits)
    else:
        workers = available_cores() if workers is None else workers
        for split in splits:
            split[0]  # reports a split without labels now, and not after hours of training
        train, test = (Streamed(split, image_side, augmentation, workers) for split in splits)
    return Dataset(train, test, splits[0].num_classes, augmentation, folder=None)
