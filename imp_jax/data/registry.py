"""The registry of data sets, and `load`, which finds a set by name."""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from imp_jax.data import tfds
from imp_jax.data.augmentation import AUGMENTATIONS
from imp_jax.data.dataset import Dataset, InMemory, require_augmentations
from imp_jax.data.files import load_folder
from imp_jax.errors import UnknownNameError, UserError, import_by_path, is_import_path, user_path

DATASETS: dict[str, Callable[..., Dataset]] = {}  # filled by `register`

# settings that `load` passes to a function that has a parameter of the same name, with their defaults
_OPTIONS = {"augmentation": None, "image_side": 224, "workers": None}


def register(name: str, factory: Callable[..., Dataset]) -> None:
    """Register a data set under a name, for `config.dataset.name`. A set of the same name is replaced.

        data.register("mine", lambda data_dir: data.from_arrays(x, y, x_test, y_test))

    Args:
      name: any string without a colon. A colon marks versions of TFDS's sets and dotted paths.
      factory: a function that is called as `factory(data_dir)` and returns a `Dataset`. `data_dir` is
        `config.dataset.data_dir` as a path with `~` expanded, or None. If the function has parameters called
        `augmentation`, `image_side` or `workers`, it is given these settings of the config as keyword
        arguments; see `load`.

    Raises:
      UserError: `factory` cannot be called, or `name` is not such a string.
    """
    if not isinstance(name, str) or not name or ":" in name:
        raise UserError(f"a data set is registered as {name!r}; its name should be a string without a colon")
    _require_callable(factory, f"a data set is registered as {name!r} with")
    DATASETS[name] = factory


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    augmentation: Sequence[str] | None = None,
    image_side: int = 224,
    workers: int | None = None,
) -> Dataset:
    """Load a data set by name.

    Args:
      name: a name in `DATASETS`; or any image-classification set of TFDS; or the dotted path of a function as
        `register` takes it, such as "their_package.sets:mine".
      data_dir: the folder in which TFDS keeps its sets (None is ~/tensorflow_datasets); for the set "folder",
        the folder of images; for other sets, what their function makes of it.
      augmentation: names of augmentations of the training images. They replace those of the set; None keeps
        them.
      image_side: height and width in pixels of the crops of a streamed set.
      workers: number of processes that decode a streamed set; None is one per core that this process may use.

    Raises:
      UserError: an unknown set, or one that cannot be read or does not fit into memory; an unknown
        augmentation; a dotted path that cannot be imported; a function that does not return a valid data set;
        a setting of a streamed set for which its function has no parameter.
    """
    data_dir = None if data_dir is None else user_path(data_dir, "dataset.data_dir")
    settings = {"augmentation": augmentation, "image_side": image_side, "workers": workers}
    factory = _find(name)
    accepted = {option: value for option, value in settings.items() if _has_parameter(factory, option)}
    try:
        dataset = factory(data_dir, **accepted)
    except UnknownNameError as error:
        if name in DATASETS or is_import_path(name):  # it comes from the user's function
            raise
        raise tfds.unknown_set(name, DATASETS) from error
    _check(dataset, name)
    if isinstance(dataset.train, InMemory):
        augmentation = dataset.augmentation if augmentation is None else augmentation
        require_augmentations(augmentation, AUGMENTATIONS)
        return _put_on_device(dataset._replace(augmentation=tuple(augmentation)))
    for option, value in settings.items():
        if option not in accepted and value != _OPTIONS[option]:
            raise UserError(
                f"dataset.{option} is {value!r}; the function of the streamed set {name} has no parameter "
                f"{option}, so it should be {_OPTIONS[option]!r}"
            )
    return dataset


def _find(name):
    """Return the function that loads the set `name`."""
    if name in DATASETS:
        return DATASETS[name]
    if not is_import_path(name):
        return functools.partial(tfds.load_set, name)
    factory = import_by_path(name, "dataset.name")
    _require_callable(factory, f"dataset.name is {name!r}, which is")
    return factory


def _require_callable(factory: Any, beginning: str) -> None:
    if not callable(factory):
        raise UserError(
            f"{beginning} an object of type {type(factory).__name__}; it should be a function of data_dir that "
            f"returns an imp_jax.data.Dataset"
        )


def _has_parameter(function, name):
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # some functions written in C have no signature
        return False


def _check(dataset: Any, name: str) -> None:
    """Refuse what is not a data set that networks can be trained on."""
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"the function of the data set {name} returns {type(dataset).__name__}; it should return an "
            f"imp_jax.data.Dataset, such as imp_jax.data.from_arrays makes"
        )
    if not isinstance(dataset.num_classes, int | np.integer) or dataset.num_classes < 2:
        raise UserError(
            f"the data set {name} has num_classes {dataset.num_classes!r}; it should be a number of at least 2"
        )
    for split_name, split in (("train", dataset.train), ("test", dataset.test)):
        if isinstance(split, InMemory):
            _check_arrays(split, dataset.num_classes, f"the {split_name} split of the data set {name}")
    if dataset.train.image_shape != dataset.test.image_shape:
        raise UserError(
            f"the data set {name} has training images of the shape {dataset.train.image_shape} and test images "
            f"of {dataset.test.image_shape}; they should have the same height, width and channels"
        )


def _check_arrays(split, num_classes, title):
    images, labels = split
    shape, dtype = np.shape(images), getattr(images, "dtype", np.dtype(object))
    if len(shape) != 4 or not all(shape):
        raise UserError(
            f"{title} has images of the shape {shape}; it should be [examples, height, width, channels], none 0"
        )
    if dtype != np.uint8 and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"{title} has images of type {dtype}; they should be uint8, from 0 to 255, or floating-point"
        )
    labels = np.asarray(labels)
    if labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{title} has labels of type {labels.dtype} and shape {labels.shape}; they should be {shape[0]} "
            f"integers, one per image"
        )
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(f"{title} has the label {wrong[0]}; labels should be from 0 to {num_classes - 1}")


def _put_on_device(dataset):
    """Return the data set with its arrays in memory as JAX arrays, and labels of type int32."""
    splits = {
        name: InMemory(jnp.asarray(split.images), jnp.asarray(split.labels, jnp.int32))
        for name, split in (("train", dataset.train), ("test", dataset.test))
        if isinstance(split, InMemory)
    }
    return dataset._replace(**splits)


for _name in tfds.BUILDERS:
    register(_name, functools.partial(tfds.load_set, _name))
register("folder", load_folder)
