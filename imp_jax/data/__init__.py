"""Data sets for image classification, loaded by name.

`load` returns the set that is registered under a name. The registered sets are `mnist5k`, the default, and
`mnist5k_scenes`, its digits in colour on photographs, which need no download; `mnist`, `fashion_mnist`,
`cifar10` and `cifar100`, which are downloaded on first use; and `folder`, any folder of images by class. Any
other name is looked up in TensorFlow Datasets, whose image-classification sets with the splits train and test
(or validation) can be used after

    python -m imp_jax.data prepare svhn_cropped --data_dir=…

Sets whose images all have the same size are kept in memory; others, such as ImageNet, are streamed from disk.
The set `folder` is also streamed if its images are large (`folder.MAX_SIDE`) or many (`folder.MAX_BYTES`).

To add a set, register a function that returns it, for example in a config file:

    data.register("mine", lambda data_dir: data.from_arrays(x, y, x_test, y_test))

or give the function's dotted path as `dataset.name`, such as "their_package.sets:mine". To add an
augmentation of training images in memory, call `register_augmentation`.
"""

from imp_jax.data.augmentation import AUGMENTATIONS
from imp_jax.data.augmentation import register as register_augmentation
from imp_jax.data.dataset import Batches, Dataset, InMemory, Split, device_memory, from_arrays
from imp_jax.data.normalization import Normalize, channel_statistics
from imp_jax.data.registry import DATASETS, load, register
from imp_jax.data.streaming import Streamed
from imp_jax.data.tfds import BUILDERS, DEFAULT_AUGMENTATION, prepare, prepared_builder
from imp_jax.data.variations import vary

__all__ = [
    "AUGMENTATIONS",
    "BUILDERS",
    "DATASETS",
    "DEFAULT_AUGMENTATION",
    "Batches",
    "Dataset",
    "InMemory",
    "Normalize",
    "Split",
    "Streamed",
    "channel_statistics",
    "device_memory",
    "from_arrays",
    "load",
    "prepare",
    "prepared_builder",
    "register",
    "register_augmentation",
    "vary",
]
