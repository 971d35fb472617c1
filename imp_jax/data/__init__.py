"""Image-classification sets from TensorFlow Datasets, read from ArrayRecord files without TensorFlow.

`load` prepares the sets in `BUILDERS` on first use, without TensorFlow: mnist5k, the default, needs no network,
MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 are downloaded. The command

    python -m imp_jax.data prepare svhn_cropped --data_dir=…

prepares any set once; sets that are not in `BUILDERS` need TensorFlow for it. Sets whose images have one size
are held in memory; others, such as ImageNet, are streamed. To add a set, write a TFDS builder and name it in
`BUILDERS`; any set of TFDS with an image, a class label and the splits train and test (or validation) is there
already.
"""

import contextlib
import difflib
import functools
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from filelock import FileLock, Timeout
from jaxtyping import Array, Float, Int, UInt8

from imp_jax.config import UserError, in_one_line
from imp_jax.data import classics
from imp_jax.data.augmentation import AUGMENTATIONS
from imp_jax.data.mnist5k import Mnist5k
from imp_jax.data.source import Source
from imp_jax.data.streaming import Streamed
from imp_jax.devices import cores
from imp_jax.interruption import cleanup

# prepared on first use
BUILDERS = {
    "mnist5k": Mnist5k,
    "mnist": classics.MNIST,
    "fashion_mnist": classics.FashionMNIST,
    "cifar10": classics.Cifar10,
    "cifar100": classics.Cifar100,
}
SETS_OF_TFDS = ("svhn_cropped", "imagenet2012")  # others that error messages name

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
    """Open the set `name` in `data_dir`; one of `BUILDERS` is downloaded and prepared first, if need be.

    Raises:
      UserError: an unknown set; one that is not prepared and cannot be prepared now.
    """
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        if _is_ours(builder):
            prepare(name, data_dir)
            return _builder(name, data_dir)
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
      UserError: an unknown set; no TensorFlow, network or archives where they are needed; no place to write.
    """
    builder = _builder(name, data_dir)
    _require_labelled_images(builder)
    if builder.is_prepared():
        return Path(builder.data_path)
    root = _root(data_dir)
    if not _is_ours(builder):
        _require_tensorflow(name)
    _require_archives(builder, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{builder.name}.lock", name):
            builder = _builder(name, data_dir)
            if not builder.is_prepared():  # by a process that had the lock before
                _prepare(builder, root)
    except UserError:
        raise
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
    root = _root(data_dir)
    base, _, version = name.partition(":")
    try:
        if base in BUILDERS and version in ("", str(BUILDERS[base].VERSION)):
            return BUILDERS[base](data_dir=root, file_format="array_record")
        return tfds.builder(name, data_dir=root, file_format="array_record")
    except Exception as error:  # an odd name, a missing version, another file format: each raises its own
        if isinstance(error, tfds.core.DatasetNotFoundError) or not re.fullmatch(r"\w+", base):
            raise UserError(
                f"dataset.name is {name!r}; it should be one of {', '.join([*BUILDERS, *SETS_OF_TFDS])}, "
                f"or another image-classification set of TFDS{_suggestion(name)}"
            ) from error
        hint = f"if its folder in {root} is damaged, remove that and prepare the set again"
        if "File format is already set" in str(error):
            hint = (
                f"it is prepared in {root} in another format than ArrayRecord; prepare it with "
                f"another --data_dir, or remove its folder there"
            )
        raise UserError(
            f"dataset.name is {name!r}, which TFDS cannot open: {in_one_line(error)}; {hint}"
        ) from error


def _is_ours(builder):
    return type(builder) in BUILDERS.values()


def _suggestion(name):
    """A name that `name` may stand for, such as cifar10 for CIFAR-10; empty if there is none."""
    plain = {re.sub(r"\W|_", "", known).lower(): known for known in (*BUILDERS, *SETS_OF_TFDS)}
    close = difflib.get_close_matches(re.sub(r"\W|_", "", name).lower(), plain, n=1)
    return f" (did you mean {plain[close[0]]}?)" if close else ""


def _root(data_dir):
    """The data folder, with `~` expanded."""
    if data_dir is not None and not os.fspath(data_dir):
        raise UserError("the data folder is empty text; it should be a path, or be left out for TFDS's own")
    folder = Path(data_dir or tfds.core.constants.DATA_DIR)
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise UserError(f"the data folder is {folder}, but {error}; give another --data_dir") from error


@contextlib.contextmanager
def _lock(path, name):
    """Let one process at a time prepare a set; the others wait."""
    lock = FileLock(path)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that is preparing {name} (it holds {path})", flush=True)
        held = lock.acquire(poll_interval=0.5)
    with held:
        yield


def _prepare(builder, root):
    """Download and write a set; the caller holds the set's lock."""
    remove_leftovers = functools.partial(_remove_leftovers, builder.name, builder.data_path, root)
    remove_leftovers()  # of a process that was killed
    with cleanup(remove_leftovers):
        if isinstance(builder, classics.Classic):
            builder.fetch()
        print(f"preparing {builder.name} in {builder.data_path}", flush=True)
        with_bar = not _is_ours(builder) and sys.stderr.isatty()
        (tfds.enable_progress_bar if with_bar else tfds.disable_progress_bar)()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download in any case
            builder.download_and_prepare()


def _remove_leftovers(name, folder, root):
    """Remove what a preparation that did not end has left of a set, but for a download to be resumed."""
    for path in (*Path(folder).parent.glob("incomplete.*"), *(root / "downloads" / name).rglob("*.tmp.*")):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        Path(folder).parent.rmdir()  # if it is empty


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
