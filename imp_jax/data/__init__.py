"""Image-classification sets from TensorFlow Datasets, read from ArrayRecord files without TensorFlow.

`load` prepares the sets in `BUILDERS` on first use, without TensorFlow: mnist5k, the default, needs no network,
MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 are downloaded. The command

    python -m imp_jax.data prepare svhn_cropped --data_dir=…

prepares any set once; sets that are not in `BUILDERS` need TensorFlow for it. Sets whose images have one size
are held in memory; others, such as ImageNet, are streamed. To add a set, write a TFDS builder and name it in
`BUILDERS`; any set of TFDS with an image, a class label and the splits train and test (or validation) is there
already. The set `folder` is any folder of images by class; `from_arrays` makes a set of NumPy arrays.
"""

import contextlib
import difflib
import functools
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from filelock import FileLock, Timeout

from imp_jax.data import classics, folder, tfrecords
from imp_jax.data.augmentation import AUGMENTATIONS
from imp_jax.data.dataset import (
    Batches,
    Dataset,
    InMemory,
    Split,
    device_memory,
    from_arrays,
    read_all,
    require_augmentations,
    require_memory,
)
from imp_jax.data.images import MODES
from imp_jax.data.mnist5k import Mnist5k
from imp_jax.data.normalization import Normalize, channel_statistics
from imp_jax.data.source import Source
from imp_jax.data.streaming import Streamed
from imp_jax.errors import UserError, one_line, user_path
from imp_jax.runtime.devices import available_cores
from imp_jax.runtime.signals import run_on_exit

__all__ = [
    "AUGMENTATIONS",
    "BUILDERS",
    "Batches",
    "Dataset",
    "InMemory",
    "Normalize",
    "Split",
    "Streamed",
    "channel_statistics",
    "device_memory",
    "find",
    "from_arrays",
    "load",
    "prepare",
]

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
DEFAULT_AUGMENTATION = dict.fromkeys(("cifar10", "cifar100", "imagenet2012"), ("crop", "flip"))
TEST_SPLIT = {"imagenet2012": "validation"}  # its test split has no labels


def prepared_builder(name: str, data_dir: str | os.PathLike | None = None) -> tfds.core.DatasetBuilder:
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
    """Open the set `name` in `data_dir`, and put it on the device if it is held in memory.

    Args:
      name: of a set of TFDS or of `BUILDERS`; or "folder", for the folder `data_dir` of images by class, which
        `folder.in_memory_shape` decides to stream or to hold in memory.
      data_dir: in which TFDS keeps its sets; None is TFDS's own, ~/tensorflow_datasets.
      augmentation: of training images, names of `AUGMENTATIONS`; None is what is usual for the set.
      image_side: pixels, of a streamed set's crops.
      workers: processes that decode a streamed set; None is one for each core that this process may use.

    Raises:
      UserError: see `prepared_builder` and `folder.open_splits`; a set that cannot be read, is not for image
        classification or does not fit into memory; an unknown augmentation.
    """
    data_dir = None if data_dir is None else user_path(data_dir, "dataset.data_dir")
    if name == "folder":
        sources, kept_in = folder.open_splits(data_dir), None
        image_shape = folder.in_memory_shape(sources)
        usual, classes = () if image_shape else ("crop", "flip"), sources[0].classes
    else:
        builder = prepared_builder(name, data_dir)
        _require_labelled_images(builder)
        sources = tuple(Source(builder, split) for split in ("train", _test_split(builder)))
        usual, kept_in = DEFAULT_AUGMENTATION.get(builder.name, ()), Path(builder.data_path)
        image_shape, classes = _in_memory_shape(builder), ()
    augmentation = usual if augmentation is None else augmentation
    require_augmentations(augmentation, AUGMENTATIONS if image_shape else Streamed.augmentations)
    augmentation = tuple(augmentation)
    if image_shape:
        examples = sum(map(len, sources))
        require_memory(sources[0].name.removeprefix("train of "), examples, examples * math.prod(image_shape))
        splits = [read_all(source, image_shape) for source in sources]
    else:
        workers = available_cores() if workers is None else workers
        for source in sources:
            source[0]  # a split without labels is refused now, and not after a training
        splits = [Streamed(source, image_side, augmentation, workers) for source in sources]
    return Dataset(*splits, sources[0].num_classes, augmentation, kept_in, classes)


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
        raise UserError(f"could not prepare {name} in {root}: {one_line(error)}") from error
    return Path(builder.data_path)


def _builder(name, data_dir):
    root = _root(data_dir)
    base, _, version = name.partition(":")
    try:
        if base in BUILDERS and version in ("", str(BUILDERS[base].VERSION)):
            return tfrecords.open_builder(functools.partial(BUILDERS[base], data_dir=root))
        return tfrecords.open_builder(functools.partial(tfds.builder, name, data_dir=root))
    except Exception as error:  # an odd name, a missing version, another file format: each raises its own
        if isinstance(error, tfds.core.DatasetNotFoundError) or not re.fullmatch(r"\w+", base):
            raise UserError(
                f"dataset.name is {name!r}; it should be one of {', '.join([*BUILDERS, *SETS_OF_TFDS])}, "
                f"folder, or another image-classification set of TFDS{_suggestion(name)}"
            ) from error
        hint = f"if its folder in {root} is damaged, remove that and prepare the set again"
        if "File format is already set" in str(error):
            hint = (
                f"it is prepared in {root} in another format than ArrayRecord or TFRecord; prepare it with "
                f"another --data_dir, or remove its folder there"
            )
        raise UserError(
            f"dataset.name is {name!r}, which TFDS cannot open: {one_line(error)}; {hint}"
        ) from error


def _is_ours(builder):
    return type(builder) in BUILDERS.values()


def _suggestion(name):
    """A name that `name` may stand for, such as cifar10 for CIFAR-10; empty if there is none."""
    known_names = (*BUILDERS, *SETS_OF_TFDS, "folder")
    plain = {re.sub(r"\W|_", "", known).lower(): known for known in known_names}
    close = difflib.get_close_matches(re.sub(r"\W|_", "", name).lower(), plain, n=1)
    return f" (did you mean {plain[close[0]]}?)" if close else ""


def _root(data_dir):
    """The data folder, with `~` expanded."""
    return user_path(tfds.core.constants.DATA_DIR if data_dir is None else data_dir, "dataset.data_dir")


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
    with run_on_exit(remove_leftovers):
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


def _in_memory_shape(builder):
    """Height, width and channels of a set whose images have one size; None of others, which are streamed."""
    feature = builder.info.features["image"]
    streamed = None in feature.shape
    types = (np.uint8, np.uint16) if streamed else (np.uint8,)
    if feature.np_dtype not in types or feature.shape[-1] not in MODES:
        raise UserError(
            f"dataset.name is {builder.name!r}, whose images are {np.dtype(feature.np_dtype).name} of the "
            f"shape {feature.shape}; they should be {' or '.join(t.__name__ for t in types)} with 1, 3 or 4 "
            f"channels"
        )
    return None if streamed else feature.shape


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
