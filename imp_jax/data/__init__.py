"""Image-classification sets from TensorFlow Datasets, read from ArrayRecord files without TensorFlow.

    python -m imp_jax.data prepare cifar10 --data_dir=…

downloads and prepares a set once. `mnist5k`, the default, needs neither network nor TensorFlow: its builder
is in this package and `load` prepares it on first use. Sets whose images have one size are held in memory;
others, such as ImageNet, are streamed. To add a set, write a TFDS builder and name it in `BUILDERS`; any set of
TFDS with an image, a class label and the splits train and test (or validation) is there already.
"""

import contextlib
import difflib
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from filelock import FileLock
from jaxtyping import Array, Float, Int, UInt8

from imp_jax.config import UserError, in_one_line
from imp_jax.data.augmentation import AUGMENTATIONS
from imp_jax.data.mnist5k import Mnist5k
from imp_jax.data.source import Source
from imp_jax.data.streaming import Streamed
from imp_jax.devices import cores

BUILDERS = {"mnist5k": Mnist5k}
SETS_OF_TFDS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped", "imagenet2012")  # for messages

# How the training images of a set are usually augmented; those of sets not named here are left as they are.
USUAL_AUGMENTATION = dict.fromkeys(("cifar10", "cifar100", "imagenet2012"), ("crop", "flip"))
TEST_SPLIT = {"imagenet2012": "validation"}  # its test split has no labels

STATISTICS_IMAGES = 10_000  # of a stream, that its mean and deviation are taken from


class InMemory(NamedTuple):
    """A whole split; pixels as they are stored, 0 to 255."""

    images: UInt8[Array, "examples height width channels"]
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
    folder: Path


class Normalize(NamedTuple):
    """From stored pixels to what a network sees: (pixel / 255 − mean) / std, channel by channel, as float32."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(
        self, images: UInt8[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch height width channels"]:
        return (images.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.std)


def find(name: str, data_dir: str | os.PathLike | None = None) -> tfds.core.DatasetBuilder:
    """The set `name`, prepared in `data_dir`; one of this package is prepared now.

    Raises:
      UserError: an unknown set, or one not prepared yet: the sentence has the command.
    """
    if name in BUILDERS:
        prepare(name, data_dir)
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        flag = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"dataset.name is {name!r}, which is not prepared in {_root(data_dir)}; "
            f"prepare it once with: python -m imp_jax.data prepare {name}{flag}"
        )
    return builder


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    augmentation: Sequence[str] | None = None,
    image_side: int = 224,
    workers: int | None = None,
) -> Dataset:
    """Open the set `name` in `data_dir` (None: TFDS's own, ~/tensorflow_datasets), on the device if it is held.

    Args:
      augmentation: of training images, names of `AUGMENTATIONS`; None is what is usual for the set.
      image_side: pixels, of a streamed set's crops.
      workers: processes that decode a streamed set; None is one for each core that this process may use.

    Raises:
      UserError: see `find`; a set that cannot be read, or is not for image classification; an unknown
        augmentation.
    """
    builder = find(name, data_dir)
    _require_labelled_images(builder)
    test_split = _test_split(builder)
    streamed = None in builder.info.features["image"].shape
    if augmentation is None:
        augmentation = USUAL_AUGMENTATION.get(builder.name, ())
    _require_known(augmentation, Streamed.augmentations if streamed else AUGMENTATIONS)
    splits = []
    if not streamed:
        _require_memory(builder, ("train", test_split))
    for split in ("train", test_split):
        source = Source(builder, split, decode=not streamed)
        if streamed:
            source[0]  # a split without labels is said now, and not after a training
            splits.append(
                Streamed(source, image_side, tuple(augmentation), cores() if workers is None else workers)
            )
        else:
            splits.append(InMemory(*map(jnp.asarray, source.read_all())))
    num_classes = builder.info.features["label"].num_classes
    return Dataset(*splits, num_classes, tuple(augmentation), Path(builder.data_path))


def prepare(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Download and prepare the set `name` as ArrayRecord files, unless that is done; returns its folder.

    Raises:
      UserError: an unknown set, no TensorFlow, no network or no archives where they are needed, or no place to
        write.
    """
    builder = _builder(name, data_dir)
    _require_labelled_images(builder)
    if not builder.is_prepared():
        root = _root(data_dir)
        if name not in BUILDERS:
            _require_tensorflow(name)
        _require_archives(builder, root)
        print(f"preparing {name} in {root}", flush=True)
        tfds.disable_progress_bar()
        try:
            root.mkdir(parents=True, exist_ok=True)
            # the jobs of an array may all start at once; and TFDS would tell of downloads there are not
            with FileLock(root / f".{name}.lock"), contextlib.redirect_stdout(io.StringIO()):
                _builder(name, data_dir).download_and_prepare()
        except Exception as error:  # TFDS lets through whatever its download library raises
            raise UserError(f"could not prepare {name} in {root}: {in_one_line(error)}") from error
    return Path(builder.data_path)


def statistics(dataset: Dataset) -> Normalize:
    """Mean and standard deviation of each channel over the training images, as the normalisation by them.

    Computed once and kept as statistics.json beside the records; of a stream, from 10,000 central crops spread
    evenly over the split (ours).
    """
    path, train = dataset.folder / "statistics.json", dataset.train
    height, width, channels = train.image_shape
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text())
        mean, std = (np.array(kept[name], np.float64) for name in ("mean", "std"))
        of_these_images = kept["image_shape"] == [height, width, channels]
        if (
            of_these_images
            and mean.shape == std.shape == (channels,)
            and np.isfinite(mean).all()
            and (std > 0).all()
        ):
            return Normalize(tuple(mean.tolist()), tuple(std.tolist()))
    if isinstance(train, InMemory):
        batches = np.array_split(np.asarray(train.images), -(-train.examples // 1000))
    else:
        examples = np.unique(np.linspace(0, train.examples - 1, STATISTICS_IMAGES, dtype=int))
        batches = (np.asarray(images) for images, _ in train.evaluation_batches(100, examples.tolist()))
    counts = np.zeros((channels, 256), np.int64)  # of the 256 values a pixel may have
    for images in batches:
        for channel in range(channels):
            counts[channel] += np.bincount(images[..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    std[np.count_nonzero(counts, axis=1) == 1] = 1  # of a channel that is the same everywhere
    with contextlib.suppress(OSError):  # a folder that is shared may be read-only
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        kept = {"image_shape": train.image_shape, "mean": mean.tolist(), "std": std.tolist()}
        aside.write_text(json.dumps(kept) + "\n")
        aside.replace(path)
    return Normalize(tuple(mean.tolist()), tuple(std.tolist()))


def device_memory() -> int:
    """Bytes of memory of the first device; of a CPU, its share of those of the machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return statistics.get("bytes_limit") or of_machine // jax.local_device_count()


def _builder(name, data_dir):
    try:
        if name in BUILDERS:
            return BUILDERS[name](data_dir=data_dir, file_format="array_record")
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        close = difflib.get_close_matches(name, [*BUILDERS, *SETS_OF_TFDS], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"dataset.name is {name!r}; it should be one of {', '.join([*BUILDERS, *SETS_OF_TFDS])}, "
            f"or another image-classification set of TFDS{hint}"
        ) from error
    except Exception as error:  # an odd name, a missing version, another file format: each raises its own
        hint = f"if its folder in {_root(data_dir)} is damaged, remove that and prepare the set again"
        if "File format is already set" in str(error):
            hint = (
                f"it is prepared in {_root(data_dir)} in another format than ArrayRecord; prepare it with "
                f"another --data_dir, or remove its folder there"
            )
        raise UserError(
            f"dataset.name is {name!r}, which TFDS cannot open: {in_one_line(error)}; {hint}"
        ) from error


def _root(data_dir):
    return Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()


def _require_labelled_images(builder):
    features = dict(builder.info.features)
    if "image" not in features or not isinstance(features.get("label"), tfds.features.ClassLabel):
        raise UserError(
            f"dataset.name is {builder.name!r}; it should be a set with an image and a class label, and has "
            f"{', '.join(features)}"
        )


def _test_split(builder):
    """The split that a network is tested on."""
    splits = builder.info.splits
    test_split = TEST_SPLIT.get(builder.name, "test" if "test" in splits else "validation")
    if not {"train", test_split} <= set(splits):
        raise UserError(
            f"dataset.name is {builder.name!r}; it should be a set with the splits train and {test_split}, and "
            f"has {', '.join(splits)}"
        )
    return test_split


def _require_known(augmentation, known):
    if not set(augmentation) <= set(known) or len(set(augmentation)) < len(augmentation):
        raise UserError(
            f"dataset.augmentation is {augmentation!r}; it should be None, or any of {' and '.join(known)}, "
            f"none twice, written as ('crop', 'flip')"
        )


def _require_memory(builder, splits):
    """Refuse a set that the device cannot hold beside a network in training, before it is read."""
    examples = sum(builder.info.splits[split].num_examples for split in splits)
    needed = examples * math.prod(builder.info.features["image"].shape)
    there = device_memory()
    if needed > there / 2:
        raise UserError(
            f"dataset.name is {builder.name!r}, whose {examples:,} images are held in memory and take "
            f"{needed / 2**30:.1f} GiB; it should take at most half of the device's {there / 2**30:.1f} GiB"
        )


def _require_tensorflow(name):
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'preparing {name} needs TensorFlow once (reading it does not): pip install -e ".[prepare]"'
        ) from error


def _require_archives(builder, root):
    """Refuse a set that is to be downloaded by hand, as ImageNet, and was not."""
    folder = root / "downloads" / "manual"
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if instructions and not (folder.is_dir() and any(folder.iterdir())):
        raise UserError(
            f"{builder.name} is not downloaded automatically; put its archives into {folder}: "
            f"{' '.join(instructions.split())}"
        )
