"""Sizes of the data sets, known without loading them."""

from typing import NamedTuple


class DatasetSize(NamedTuple):
    train_images: int
    image_shape: tuple[int, int, int]
    num_classes: int


DATASET_SIZES = {
    "mnist5k": DatasetSize(4_000, (28, 28, 1), 10),
    "mnist5k_scenes": DatasetSize(4_000, (32, 32, 3), 10),
    "mnist": DatasetSize(60_000, (28, 28, 1), 10),
    "cifar10": DatasetSize(50_000, (32, 32, 3), 10),
    "imagenet2012": DatasetSize(1_281_167, (224, 224, 3), 1000),
}
STREAMED_DATASETS = ("imagenet2012", "folder")
