"""Image-classification sets from TensorFlow Datasets, read from ArrayRecord files without TensorFlow.

    python -m imp_jax.data prepare mnist --data_dir=…

downloads and prepares a set once. `mnist5k`, the default, needs neither network nor TensorFlow: its builder
is in this package and `load` prepares it on first use. To add a set, write a TFDS builder and name it in
`BUILDERS`; any set of TFDS with images of one size, a class label and the splits train
and test is there already.
"""

import contextlib
import difflib
import io
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from filelock import FileLock
from jaxtyping import Array, Float, Int, UInt8

from imp_jax.config import UserError
from imp_jax.data.mnist5k import Mnist5k

BUILDERS = {"mnist5k": Mnist5k}
SETS_OF_TFDS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")  # to be named in messages


class Dataset(NamedTuple):
    """A whole set in memory; pixels as they are stored, 0 to 255."""

    train_images: UInt8[np.ndarray, "train height width channels"]
    train_labels: Int[np.ndarray, " train"]  # int32, 0 to num_classes − 1
    test_images: UInt8[np.ndarray, "test height width channels"]
    test_labels: Int[np.ndarray, " test"]
    num_classes: int


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Read the set `name` from `data_dir` (None: TFDS's own, ~/tensorflow_datasets) into memory.

    Raises:
      UserError: an unknown set, one not prepared yet (the sentence has the command), one that cannot be
        read, or one that is not for image classification.
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
    features, splits = builder.info.features, builder.info.splits
    classifies = {"image", "label"} <= set(features) and isinstance(features["label"], tfds.features.ClassLabel)
    if not classifies or not {"train", "test"} <= set(splits):
        raise UserError(
            f"dataset.name is {name!r}; it should be a set with an image, a class label and the splits "
            f"train and test, and has {sorted(features)} and {sorted(splits)}"
        )
    return Dataset(*_read(builder, "train"), *_read(builder, "test"), features["label"].num_classes)


def prepare(name: str, data_dir: str | None = None) -> Path:
    """Download and prepare the set `name` as ArrayRecord files, unless that is done; returns its folder.

    Raises:
      UserError: an unknown set, no TensorFlow or no network where they are needed, or no place to write.
    """
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        if name not in BUILDERS:
            _require_tensorflow(name)
        root = _root(data_dir)
        print(f"preparing {name} in {root}", flush=True)
        tfds.disable_progress_bar()
        try:
            root.mkdir(parents=True, exist_ok=True)
            # the jobs of an array may all start at once; and TFDS would tell of downloads there are not
            with FileLock(root / f".{name}.lock"), contextlib.redirect_stdout(io.StringIO()):
                _builder(name, data_dir).download_and_prepare()
        except Exception as error:  # TFDS lets through whatever its download library raises
            raise UserError(f"could not prepare {name} in {root}: {_in_one_line(error)}") from error
    return Path(builder.data_path)


def to_float(
    images: UInt8[Array, "*batch height width channels"],
) -> Float[Array, "*batch height width channels"]:
    """Pixels from 0…255 to [0, 1], as float32."""
    return images.astype(jnp.float32) / 255


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
        raise UserError(f"dataset.name is {name!r}, which TFDS cannot open: {_in_one_line(error)}") from error


def _root(data_dir):
    return Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()


def _read(builder, split):
    try:
        source = builder.as_data_source(split=split)
        examples = source.__getitems__(range(len(source)))
        images = np.stack([example["image"] for example in examples])
    except Exception as error:  # a torn file surfaces as one of many exceptions of its readers
        raise UserError(
            f"cannot read {split} of {builder.name} in {builder.data_path}: {_in_one_line(error)}"
        ) from error
    return images, np.array([example["label"] for example in examples], np.int32)


def _require_tensorflow(name):
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'preparing {name} needs TensorFlow once (reading it does not): pip install -e ".[prepare]"'
        ) from error


def _in_one_line(error):
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)
