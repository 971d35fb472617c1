"""Image-classification sets of TensorFlow Datasets (TFDS), read from ArrayRecord files without TensorFlow.

`load_set` prepares the sets in `BUILDERS` on first use, without TensorFlow. The images of mnist5k and
mnist5k_scenes are part of installed packages; MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 are downloaded. The
command

    python -m imp_jax.data prepare svhn_cropped --data_dir=…

prepares any set; for sets that are not in `BUILDERS` it needs TensorFlow.
"""

import contextlib
import difflib
import functools
import io
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from filelock import FileLock, Timeout

from imp_jax.data import classics, tfrecords
from imp_jax.data.dataset import Dataset
from imp_jax.data.files import read_or_stream
from imp_jax.data.images import MODES
from imp_jax.data.mnist5k import Mnist5k, Mnist5kScenes
from imp_jax.data.source import Source
from imp_jax.errors import UnknownNameError, UserError, one_line, user_path
from imp_jax.runtime.signals import run_on_exit

# sets that are prepared on first use
BUILDERS = {
    "mnist5k": Mnist5k,
    "mnist5k_scenes": Mnist5kScenes,
    "mnist": classics.MNIST,
    "fashion_mnist": classics.FashionMNIST,
    "cifar10": classics.Cifar10,
    "cifar100": classics.Cifar100,
}
SETS_OF_TFDS = ("svhn_cropped", "imagenet2012")  # other sets that error messages name as examples

# The default augmentations of training images; other sets have none.
DEFAULT_AUGMENTATION = {
    **dict.fromkeys(("cifar10", "cifar100", "imagenet2012"), ("crop", "flip")),
    "mnist5k_scenes": ("crop",),  # a mirrored digit is no digit
}
TEST_SPLIT = {"imagenet2012": "validation"}  # the labels of its test split are not public


def prepared_builder(name: str, data_dir: str | os.PathLike | None = None) -> tfds.core.DatasetBuilder:
    """Open the set `name` in `data_dir`. A set of `BUILDERS` is downloaded and prepared first if necessary.

    Raises:
      UserError: the set is unknown, or is not prepared and cannot be prepared now.
    """
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        if _is_builtin(builder):
            prepare(name, data_dir)
            return _builder(name, data_dir)
        flag = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"dataset.name is {name!r}, which is not prepared in {_root(data_dir)}; "
            f"prepare it once with: python -m imp_jax.data prepare {name}{flag}"
        )
    return builder


def load_set(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    augmentation: Sequence[str] | None = None,
    image_side: int = 224,
    workers: int | None = None,
) -> Dataset:
    """Load the set `name` from `data_dir`: into memory if TFDS gives its images one size, otherwise streamed.

    The arguments are those of `imp_jax.data.load`.

    Raises:
      UserError: the set is not for image classification; see also `prepared_builder` and `read_or_stream`.
    """
    builder = prepared_builder(name, data_dir)
    _require_labelled_images(builder)
    if augmentation is None:
        augmentation = DEFAULT_AUGMENTATION.get(builder.name, ())
    splits = tuple(Source(builder, split) for split in ("train", _test_split(builder)))
    dataset = read_or_stream(splits, _in_memory_shape(builder), augmentation, image_side, workers)
    return dataset._replace(folder=Path(builder.data_path))


def prepare(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Download the set `name` and write it as ArrayRecord files, unless it is already prepared.

    Returns:
      The folder of the prepared set.

    Raises:
      UserError: the set is unknown; TensorFlow, a network connection or archives are needed and missing; or the
        folder cannot be written.
    """
    builder = _builder(name, data_dir)
    _require_labelled_images(builder)
    if builder.is_prepared():
        return Path(builder.data_path)
    root = _root(data_dir)
    if not _is_builtin(builder):
        _require_tensorflow(name)
    _require_archives(builder, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{builder.name}.lock", name):
            builder = _builder(name, data_dir)
            if not builder.is_prepared():  # by another process, while this one waited for the lock
                _prepare(builder, root)
    except UserError:
        raise
    except Exception as error:  # TFDS does not convert the errors of its download library
        raise UserError(f"could not prepare {name} in {root}: {one_line(error)}") from error
    return Path(builder.data_path)


def unknown_set(name: str, known_names: Iterable[str]) -> UnknownNameError:
    """Return the error for a name that is neither in `known_names` nor a set of TFDS.

    Its message suggests a known name that differs only in spelling, such as cifar10 for CIFAR-10.
    """
    known_names = (*known_names, *SETS_OF_TFDS)
    by_plain_name = {_letters_and_digits(known): known for known in known_names}
    close = difflib.get_close_matches(_letters_and_digits(name), by_plain_name, n=1)
    suggestion = f" (did you mean {by_plain_name[close[0]]}?)" if close else ""
    return UnknownNameError(
        f"dataset.name is {name!r}; it should be one of {', '.join(known_names)}, or another "
        f"image-classification set of TFDS{suggestion}"
    )


def _letters_and_digits(name):
    return re.sub(r"\W|_", "", name).lower()


def _builder(name, data_dir):
    """Return the TFDS builder of the set `name`, prepared or not."""
    root = _root(data_dir)
    base, _, version = name.partition(":")
    try:
        if base in BUILDERS and version in ("", str(BUILDERS[base].VERSION)):
            return tfrecords.open_builder(functools.partial(BUILDERS[base], data_dir=root))
        return tfrecords.open_builder(functools.partial(tfds.builder, name, data_dir=root))
    except Exception as error:  # TFDS raises other types for odd names, missing versions and file formats
        if isinstance(error, tfds.core.DatasetNotFoundError) or not re.fullmatch(r"\w+", base):
            raise unknown_set(name, BUILDERS) from error
        hint = f"if its folder in {root} is damaged, remove it and prepare the set again"
        if "File format is already set" in str(error):
            hint = (
                f"it is prepared in {root} in another format than ArrayRecord or TFRecord; prepare it with "
                f"another --data_dir, or remove its folder from {root}"
            )
        raise UserError(
            f"dataset.name is {name!r}, which TFDS cannot open: {one_line(error)}; {hint}"
        ) from error


def _is_builtin(builder):
    """Return whether a builder is one of `BUILDERS`, which need no TensorFlow."""
    return type(builder) in BUILDERS.values()


def _root(data_dir):
    """Return the folder in which TFDS keeps its sets, with `~` expanded."""
    return user_path(tfds.core.constants.DATA_DIR if data_dir is None else data_dir, "dataset.data_dir")


@contextlib.contextmanager
def _lock(path, name):
    """Lock a set; if another process is preparing it, wait until it has finished."""
    lock = FileLock(path)
    try:
        acquired = lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that is preparing {name} (it holds {path})", flush=True)
        acquired = lock.acquire(poll_interval=0.5)
    with acquired:
        yield


def _prepare(builder, root):
    """Download and write a set. The caller must hold the lock of the set."""
    remove_leftovers = functools.partial(_remove_leftovers, builder.name, builder.data_path, root)
    remove_leftovers()  # a killed process may have left files
    with run_on_exit(remove_leftovers):
        if isinstance(builder, classics.Classic):
            builder.fetch()
        print(f"preparing {builder.name} in {builder.data_path}", flush=True)
        with_bar = not _is_builtin(builder) and sys.stderr.isatty()
        (tfds.enable_progress_bar if with_bar else tfds.disable_progress_bar)()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download even if there is none
            builder.download_and_prepare()


def _remove_leftovers(name, folder, root):
    """Remove the files of an interrupted preparation, except for partial downloads, which can be resumed."""
    for path in (*Path(folder).parent.glob("incomplete.*"), *(root / "downloads" / name).rglob("*.tmp.*")):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        Path(folder).parent.rmdir()  # fails unless it is empty


def _require_labelled_images(builder):
    """Refuse a set that has no image or no class label."""
    features = dict(builder.info.features)
    if "image" not in features or not isinstance(features.get("label"), tfds.features.ClassLabel):
        raise UserError(
            f"dataset.name is {builder.name!r}; it should be a set with an image and a class label, and has "
            f"{', '.join(features)}"
        )


def _in_memory_shape(builder):
    """Return the height, width and channels of the images of a set, or None if the set does not fix them."""
    feature = builder.info.features["image"]
    size_varies = None in feature.shape
    types = (np.uint8, np.uint16) if size_varies else (np.uint8,)
    if feature.np_dtype not in types or feature.shape[-1] not in MODES:
        raise UserError(
            f"dataset.name is {builder.name!r}, whose images are {np.dtype(feature.np_dtype).name} of the "
            f"shape {feature.shape}; they should be {' or '.join(t.__name__ for t in types)} with 1, 3 or 4 "
            f"channels"
        )
    return None if size_varies else feature.shape


def _test_split(builder):
    """Return the name of the split on which networks are tested."""
    splits = builder.info.splits
    test_split = TEST_SPLIT.get(builder.name, "test" if "test" in splits else "validation")
    if not {"train", test_split} <= set(splits):
        raise UserError(
            f"dataset.name is {builder.name!r}; it should be a set with the splits train and {test_split}, and "
            f"has {', '.join(splits)}"
        )
    return test_split


def _require_tensorflow(name):
    """Raise an error if TensorFlow is not installed."""
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'preparing {name} needs TensorFlow once (reading it does not): pip install -e ".[prepare]"'
        ) from error


def _require_archives(builder, root):
    """Refuse a set, such as ImageNet, whose archives must be downloaded by hand and are missing."""
    folder = root / "downloads" / "manual"
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if instructions and not (folder.is_dir() and any(folder.iterdir())):
        raise UserError(
            f"{builder.name} is not downloaded automatically; put its archives into {folder}: "
            f"{' '.join(instructions.split())}"
        )
