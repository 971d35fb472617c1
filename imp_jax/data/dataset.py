"""The interface of data sets, and data sets made of arrays in memory.

The two kinds of splits, `InMemory` and `streaming.Streamed`, implement the protocol `Split`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt8

from imp_jax.data import images as image_files
from imp_jax.data.augmentation import AUGMENTATIONS, augment
from imp_jax.data.folder import ImageFolder
from imp_jax.data.source import Source
from imp_jax.errors import UserError, one_line
from imp_jax.runtime import devices, memory
from imp_jax.runtime.compilation import jit_with_backend_options

Images = UInt8[Array, "*batch height width channels"] | Float[Array, "*batch height width channels"]


class Batches(Protocol):
    """The batches of an epoch or of an evaluation.

    The objects that `one_by_one` yields also have a traceable method `load(number, …)`, which returns the
    arrays of batch `number`.

    Attributes:
      scannable: whether this object is a pytree that has `load` for all batches, so that it can be passed to a
        compiled loop.
    """

    scannable: bool

    def one_by_one(self) -> Iterator[Any]:
        """Yield an object with `load` for each batch in turn."""


class Split(Protocol):
    """The interface of a split, in memory or streamed.

    Attributes:
      examples: number of examples.
      image_shape: height, width and channels of the images, in pixels.
      evaluation_batch_size: default batch size of evaluations.
      in_memory: whether the images are decoded arrays in memory.
      steps_per_call: number of training steps between two checks by the host; None: an epoch.
      settings: fields of the config that only this kind of split reads.
    """

    examples: int
    image_shape: tuple[int, int, int]
    evaluation_batch_size: int
    in_memory: bool
    steps_per_call: int | None
    settings: tuple[str, ...]

    def training_epochs(
        self, keys: Key[Array, " members"], epochs: int, batch_size: int, first_step: int, mesh: Mesh | None
    ) -> Any:
        """Return an object whose method `epoch(number)` returns the `Batches` of an epoch for all members.

        Args:
          keys: one PRNG key per member, from which the order of examples and the augmentations are drawn.
          epochs: number of epochs of the training.
          batch_size: number of images per member and step.
          first_step: step of the training at which a streamed split starts. A split in memory ignores it,
            because `load` takes the number of the batch.
          mesh: mesh on which streamed batches are put; None: the first device.
        """

    def evaluation(self, batch_size: int, mesh: Mesh | None) -> Batches:
        """Return the whole split in batches; the last one is padded to `batch_size`."""

    def take(self, examples: Int[np.ndarray, " count"]) -> "InMemory":
        """Return the examples with these indices, as an evaluation sees them."""

    def put_on_mesh(self, mesh: Mesh) -> "Split":
        """Return the split with its arrays, if any, on every device of the mesh."""

    def put_on_one_device(self) -> "Split":
        """Return a split from `put_on_mesh` with its arrays on one device of this process."""


class InMemory(NamedTuple):
    """A split of arrays. Its images are uint8 from 0 to 255, or floats, which are not rescaled."""

    images: UInt8[Array, "examples height width channels"] | Float[Array, "examples height width channels"]
    labels: Int[Array, " examples"]  # int32, 0 to num_classes − 1

    # attributes of `Split`; an annotation would make them fields
    evaluation_batch_size = 1000
    in_memory = True
    steps_per_call = None
    settings = ()

    @property
    def examples(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def training_epochs(
        self,
        keys: Key[Array, " members"],
        epochs: int,
        batch_size: int,
        first_step: int = 0,
        mesh: Mesh | None = None,
    ) -> "_InMemoryEpochs":
        """Return the epochs of a training. The order and augmentations of each member depend on its key."""
        del epochs, batch_size, first_step, mesh  # each epoch is drawn as a whole
        return _InMemoryEpochs(self, keys)

    def evaluation(self, batch_size: int, mesh: Mesh | None = None) -> "_InMemoryEvaluation":
        del mesh  # the arrays are already on every device
        return _InMemoryEvaluation(self, batch_size)

    def take(self, examples: Int[np.ndarray, " count"]) -> "InMemory":
        return InMemory(self.images[examples], self.labels[examples])

    def put_on_mesh(self, mesh: Mesh) -> "InMemory":
        return devices.replicate(self, mesh)

    def put_on_one_device(self) -> "InMemory":
        return devices.unreplicate(self)


class _InMemoryEpochs(NamedTuple):
    split: InMemory
    keys: Key[Array, " members"]

    def epoch(self, number: int) -> "EpochInMemory":
        draws = _draw_epoch_program()(self.keys, number, examples=self.split.examples)
        return EpochInMemory(self.split, *draws)


class EpochInMemory(NamedTuple):
    """One epoch of all members; a pytree, and an argument of the compiled epoch.

    Attributes:
      orders: indices of the examples, in the order of each member.
    """

    split: InMemory
    orders: Int[Array, "members examples"]
    augmentation_keys: Key[Array, " members"]

    scannable = True

    def one_by_one(self) -> Iterator["EpochInMemory"]:
        return itertools.repeat(self)

    def join(self, others: Sequence["EpochInMemory"]) -> "EpochInMemory":
        """Return an epoch of the members of this one and then of `others`, which have the same split."""
        draws = zip(*((one.orders, one.augmentation_keys) for one in (self, *others)), strict=True)
        return EpochInMemory(self.split, *map(jnp.concatenate, draws))

    def load(
        self, number: Int[Array, ""], batch_size: int, augmentation: tuple[str, ...]
    ) -> tuple[Images, Int[Array, "members batch"]]:
        """Return each member's augmented images and labels of batch `number`: [members, batch, …]."""

        def load_member(order, key):
            batch = jax.lax.dynamic_slice_in_dim(order, number * batch_size, batch_size)
            images = augment(jax.random.fold_in(key, number), self.split.images[batch], augmentation)
            return images, self.split.labels[batch]

        return jax.vmap(load_member)(self.orders, self.augmentation_keys)


def _draw_epoch(keys, epoch, examples):
    """Draw each member's order of the examples in an epoch, and its augmentation key."""

    def draw(key):
        order_key, augmentation_key = jax.random.split(jax.random.fold_in(key, epoch))
        return jax.random.permutation(order_key, examples), augmentation_key

    return jax.vmap(draw)(keys)


@functools.cache
def _draw_epoch_program():
    return jit_with_backend_options(_draw_epoch, static_argnames="examples")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _InMemoryEvaluation:
    split: InMemory
    batch_size: int = dataclasses.field(metadata={"static": True})

    scannable: ClassVar = True

    def one_by_one(self) -> Iterator["_InMemoryEvaluation"]:
        return itertools.repeat(self)

    def load(self, number: Int[Array, ""]) -> tuple[Images, Int[Array, " batch"], Bool[Array, " batch"]]:
        """Return images and labels of batch `number`, and a mask that is False for padding."""
        batch = number * self.batch_size + jnp.arange(self.batch_size)
        indices = batch % self.split.examples
        return self.split.images[indices], self.split.labels[indices], batch < self.split.examples


class Dataset(NamedTuple):
    """A data set for image classification.

    Attributes:
      train, test: its splits.
      num_classes: number of classes; labels are from 0 to `num_classes` − 1.
      augmentation: names of the augmentations of training images.
      folder: where statistics.json is stored; None: it is not stored.
      classes: names of the classes, if the set is a folder of images by class.
      validation: images on which settings such as the number of epochs are chosen; None if there are none.
    """

    train: Split
    test: Split
    num_classes: int
    augmentation: tuple[str, ...]
    folder: Path | None
    classes: tuple[str, ...] = ()
    validation: Split | None = None

    def splits(self) -> dict[str, Split]:
        """Return the splits by name, with `validation` only if there is one."""
        splits = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: split for name, split in splits.items() if split is not None}

    def identity(self) -> dict[str, Any]:
        """Return a JSON-serialisable description, by which a workdir recognises its data set."""
        return {
            "train_examples": self.train.examples,
            "test_examples": self.test.examples,
            "num_classes": self.num_classes,
            "classes": list(self.classes),
        }


def from_arrays(
    train_images: ArrayLike,
    train_labels: ArrayLike,
    test_images: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int | None = None,
    augmentation: Sequence[str] = (),
) -> Dataset:
    """Check the arrays of a data set and put them on the device.

    Args:
      train_images, test_images: [examples, height, width, channels]: uint8 from 0 to 255, which `Normalize`
        divides by 255; or floating-point, which are converted to float32 and not rescaled.
      train_labels, test_labels: [examples]: integers from 0 to `num_classes` − 1.
      num_classes: None: the largest training label + 1.
      augmentation: names of augmentations in `AUGMENTATIONS` of the training images. "crop" pads with zeros.

    Raises:
      UserError: an array has a wrong shape or type; images are not finite, or differ in shape or type between
        the splits; labels are out of range; there is only one class; an augmentation is unknown; or the arrays
        are too large for the device.
    """
    train_images, train_labels, test_images, test_labels = map(
        np.asarray, (train_images, train_labels, test_images, test_labels)
    )
    _check_images(train_images, "train_images")
    _check_images(test_images, "test_images")
    if (train_images.dtype, train_images.shape[1:]) != (test_images.dtype, test_images.shape[1:]):
        raise UserError(
            f"train_images are {_describe(train_images)} and test_images {_describe(test_images)}; they should "
            f"have the same type, height, width and channels"
        )
    _check_labels(train_labels, "train_labels", len(train_images), num_classes)
    num_classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    _check_labels(test_labels, "test_labels", len(test_images), num_classes)
    if num_classes < 2:
        raise UserError("all train_labels are 0; there should be at least two classes")
    require_augmentations(augmentation, AUGMENTATIONS)
    dtype = np.dtype(np.uint8 if train_images.dtype == np.uint8 else np.float32)
    num_bytes = (train_images.size + test_images.size) * dtype.itemsize
    require_memory("train_images and test_images", len(train_images) + len(test_images), num_bytes)
    splits = (
        InMemory(jnp.asarray(images, dtype), jnp.asarray(labels, jnp.int32))
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    )
    return Dataset(*splits, num_classes, tuple(augmentation), folder=None)


def read_all(source: Source | ImageFolder, image_shape: tuple[int, int, int]) -> InMemory:
    """Decode all images of a split to arrays of `image_shape` (height, width, channels) on the device.

    Raises:
      UserError: an example cannot be read.
    """
    images = np.empty((len(source), *image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for index, example in enumerate(source):
        try:
            images[index] = image_files.decode(example["image"], image_shape)
        except Exception as error:  # Pillow raises errors of many types for a damaged image
            raise UserError(
                f"cannot read {source.name}, {source.file(index)}: example {index} cannot be decoded: "
                f"{one_line(error)}"
            ) from error
        labels[index] = example["label"]
    return InMemory(jnp.asarray(images), jnp.asarray(labels))


def device_memory() -> int:
    """Return the memory of the first device in bytes; for a CPU, the memory that this process may use.

    CPU devices share one memory, in which an array that is replicated over them is stored once.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or memory.host_limit_bytes()


def require_memory(name: str, examples: int, num_bytes: int) -> None:
    """Raise a `UserError` if images would take more than half of the device memory. Call before decoding."""
    available = device_memory()
    if num_bytes > available / 2:
        raise UserError(
            f"the {examples:,} images of {name} would take {num_bytes / 2**30:.1f} GiB of memory; they should "
            f"take at most half of the device's {available / 2**30:.1f} GiB"
        )


def require_augmentations(augmentation: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are unknown or repeated, and a string in place of a sequence."""
    is_string = isinstance(augmentation, str)
    if is_string or not set(augmentation) <= set(known) or len(set(augmentation)) < len(augmentation):
        raise UserError(
            f"dataset.augmentation is {augmentation!r}; it should be None, or any of {' and '.join(known)}, "
            f"each at most once, such as ('crop', 'flip')"
        )


def _check_images(images, name):
    if images.ndim != 4 or not all(images.shape):
        raise UserError(
            f"{name} has the shape {images.shape}; it should be [examples, height, width, channels], and not "
            f"empty"
        )
    if images.dtype == np.uint8:
        return
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"{name} is of type {images.dtype}; it should be uint8, from 0 to 255, or floating-point, which is "
            f"not rescaled"
        )
    if not np.isfinite(images).all():
        raise UserError(f"{name} has values that are not finite; all should be finite")


def _check_labels(labels, name, examples, num_classes):
    if labels.shape != (examples,):
        raise UserError(
            f"{name} has the shape {labels.shape}; it should be ({examples},), one number for each image"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{name} is of type {labels.dtype}; it should be integers that start at 0")
    allowed = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
    invalid = labels[(labels < 0) | (labels >= (np.inf if num_classes is None else num_classes))]
    if len(invalid):
        raise UserError(f"{name} has the label {invalid[0]}; labels should be {allowed}")


def _describe(images):
    return f"{images.dtype} of {' × '.join(map(str, images.shape[1:]))}"
