"""The registry of data sets, and `load`, which loads a set by name."""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax.config import FIELDS
from imp_jax.data import tfds
from imp_jax.data.augmentation import AUGMENTATIONS, augment
from imp_jax.data.dataset import Dataset, InMemory, require_augmentations
from imp_jax.data.files import load_folder
from imp_jax.errors import UnknownNameError, UserError, import_by_path, is_import_path, user_path

DATASETS: dict[str, Callable[..., Dataset]] = {}  # filled by `register`


def register(name: str, factory: Callable[..., Dataset]) -> None:
    """Register a data set under a name, for `config.dataset.name`. A set of the same name is replaced.

        data.register("mine", lambda data_dir: data.from_arrays(x, y, x_test, y_test))

    Args:
      name: any string without a colon, which marks dotted paths and versions of TFDS's sets.
      factory: a function that is called as `factory(data_dir)` and returns a `Dataset`. `data_dir` is
        `config.dataset.data_dir` as a path with `~` expanded, or None. If the function has parameters named
        `augmentation`, `image_side` or `workers`, it also gets these settings of the config, by keyword; see
        `load`.

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
      data_dir: the folder in which TFDS keeps its sets (None: ~/tensorflow_datasets); for the set "folder", the
        folder of images; for other sets, the argument of their function.
      augmentation: names of augmentations of the training images, which replace those of the set; None: those
        of the set.
      image_side: height and width in pixels of the crops of a streamed set.
      workers: number of processes that decode a streamed set; None: one per core that this process may use.

    Raises:
      UserError: the set is unknown, cannot be read or does not fit into memory; an augmentation is unknown or
        changes the shape or type of images; a dotted path cannot be imported; a function does not return a
        valid data set; or the function of a streamed set has no parameter for a setting that is given.
    """
    data_dir = None if data_dir is None else user_path(data_dir, "dataset.data_dir")
    settings = {"augmentation": augmentation, "image_side": image_side, "workers": workers}
    factory = _find(name)
    accepted = {option: value for option, value in settings.items() if _has_parameter(factory, option)}
    try:
        dataset = factory(data_dir, **accepted)
    except UnknownNameError as error:
        if name in DATASETS or is_import_path(name):  # the error is one of the user's function
            raise
        raise tfds.unknown_set(name, DATASETS) from error
    _check(dataset, name)
    if isinstance(dataset.train, InMemory):
        augmentation = dataset.augmentation if augmentation is None else augmentation
        require_augmentations(augmentation, AUGMENTATIONS)
        dataset = _put_on_device(dataset._replace(augmentation=tuple(augmentation)))
        _trace_augmentations(dataset)
        return dataset
    for option, value in settings.items():
        default = FIELDS[f"dataset.{option}"].default
        if option not in accepted and value != default:
            raise UserError(
                f"dataset.{option} is {value!r}; the function of the streamed set {name} has no parameter "
                f"{option}, so it should be {default!r}"
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
    """Refuse an object that is not a data set on which networks can be trained."""
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"the function of the data set {name} returns {type(dataset).__name__}; it should return an "
            f"imp_jax.data.Dataset, for example from imp_jax.data.from_arrays"
        )
    if not isinstance(dataset.num_classes, int | np.integer) or dataset.num_classes < 2:
        raise UserError(
            f"the data set {name} has num_classes {dataset.num_classes!r}; it should be a number of at least 2"
        )
    for split_name, split in dataset.splits().items():
        if isinstance(split, InMemory):
            _check_arrays(split, dataset.num_classes, f"the {split_name} split of the data set {name}")
        if dataset.train.image_shape != split.image_shape:
            raise UserError(
                f"the data set {name} has training images of the shape {dataset.train.image_shape} and "
                f"{split_name} images of {split.image_shape}; they should have the same height, width and "
                f"channels"
            )


def _check_arrays(split, num_classes, title):
    images, labels = split
    shape, dtype = np.shape(images), getattr(images, "dtype", np.dtype(object))
    if len(shape) != 4 or not all(shape):
        raise UserError(
            f"{title} has images of the shape {shape}; it should be [examples, height, width, channels], and "
            f"not empty"
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
    invalid = labels[(labels < 0) | (labels >= num_classes)]
    if len(invalid):
        raise UserError(f"{title} has the label {invalid[0]}; labels should be from 0 to {num_classes - 1}")


def _put_on_device(dataset):
    """Convert the arrays of splits in memory to JAX arrays, and their labels to int32."""
    splits = {
        name: InMemory(jnp.asarray(split.images), jnp.asarray(split.labels, jnp.int32))
        for name, split in dataset.splits().items()
        if isinstance(split, InMemory)
    }
    return dataset._replace(**splits)


def _trace_augmentations(dataset):
    """Trace the augmentations of a set in memory, so that a faulty one fails before training."""
    images = jax.ShapeDtypeStruct((2, *dataset.train.image_shape), dataset.train.images.dtype)
    jax.eval_shape(lambda key, images: augment(key, images, dataset.augmentation), jax.random.key(0), images)


for _name in tfds.BUILDERS:
    register(_name, functools.partial(tfds.load_set, _name))
register("folder", load_folder)
