"""Splits that stay on disk, such as those of ImageNet: images of various sizes, decoded and cropped per batch.

Each training example is a pure function of its member's seed and of its position in the training. So a stream
can start at any step, and does not depend on the number of workers.
"""

import functools
import io
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Int, Key, UInt8, UInt32
from PIL import Image

from imp_jax.data.dataset import InMemory
from imp_jax.data.folder import ImageFolder
from imp_jax.data.images import convert_to_8_bits
from imp_jax.data.source import Source
from imp_jax.errors import UserError, one_line
from imp_jax.runtime import devices
from imp_jax.runtime.devices import DATA
from imp_jax.runtime.signals import SIGNALS

Crop = UInt8[np.ndarray, "side side 3"]
Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


@dataclass(frozen=True)
class Streamed:
    """A split on disk whose images are decoded to RGB crops of `side` × `side` pixels.

    Attributes:
      source: sequence of encoded images and labels.
      side: height and width of the crops, in pixels.
      augmentation: names of the augmentations of training images: "crop" takes a random part of the image
        (`random_box`), and "flip" mirrors it with probability one half.
      workers: number of processes that decode; 0: threads of this process decode.
    """

    source: Source | ImageFolder
    side: int
    augmentation: tuple[str, ...]
    workers: int

    augmentations: ClassVar = ("crop", "flip")  # the allowed names
    # attributes of `dataset.Split`
    evaluation_batch_size: ClassVar = 250
    in_memory: ClassVar = False
    steps_per_call: ClassVar = 50
    settings: ClassVar = ("dataset.image_side", "dataset.workers", "checkpoint_every_steps")

    @property
    def examples(self) -> int:
        return len(self.source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.side, self.side, 3)

    def training_epochs(
        self,
        keys: Key[jax.Array, " members"],
        epochs: int,
        batch_size: int,
        first_step: int = 0,
        mesh: Mesh | None = None,
    ) -> "_StreamedEpochs":
        """Return the epochs of a training from step `first_step` on; see `training_batches`."""
        seeds = devices.gather_members(jax.random.key_data(keys), None)
        return _StreamedEpochs(self.training_batches(seeds, epochs, batch_size, first_step, mesh))

    def evaluation(self, batch_size: int, mesh: Mesh | None = None) -> "_StreamedEvaluation":
        # full batches, so that one compiled program serves all
        padded = np.arange(-(-self.examples // batch_size) * batch_size)
        batches = self.evaluation_batches(batch_size, padded % self.examples, mesh)
        return _StreamedEvaluation(batches, (padded < self.examples).reshape(-1, batch_size))

    def take(self, examples: Int[np.ndarray, " count"]) -> InMemory:
        batches = self.evaluation_batches(min(self.evaluation_batch_size, len(examples)), examples)
        return InMemory(*map(jnp.concatenate, zip(*batches, strict=True)))

    def put_on_mesh(self, mesh: Mesh) -> "Streamed":
        del mesh  # each batch is put on the mesh when it has been decoded
        return self

    def put_on_one_device(self) -> "Streamed":
        return self

    def training_batches(
        self,
        seeds: UInt32[np.ndarray, "members words"],
        epochs: int,
        batch_size: int,
        first_step: int = 0,
        mesh: Mesh | None = None,
    ) -> Iterator[tuple[UInt8[jax.Array, "members batch side side 3"], Int[jax.Array, "members batch"]]]:
        """Return an iterator over the batches of a training from step `first_step` on.

        Batches are put on the device shortly before they are needed. In each epoch the order of the examples
        and their crops are drawn from the seed of each member. Examples that do not fill the last batch are
        left out of that epoch. On a mesh, a process decodes only the images that its own devices train on.

        Raises:
          UserError: an example cannot be read.
        """
        sharding = devices.batch_sharding(mesh)
        members, positions = _local_indices(sharding, (len(seeds), batch_size))
        seeds = tuple(tuple(map(int, seed)) for seed in seeds[members.start : members.stop])
        examples = grain.MapDataset.source(_TrainingExamples(self, seeds, epochs, batch_size, positions))
        batches = examples[first_step * len(seeds) * len(positions) :].batch(len(positions))
        return _on_devices(self._decode(batches).batch(len(seeds), drop_remainder=True), sharding)

    def evaluation_batches(
        self, batch_size: int, examples: Sequence[int] | None = None, mesh: Mesh | None = None
    ) -> Iterator[tuple[UInt8[jax.Array, "batch side side 3"], Int[jax.Array, " batch"]]]:
        """Return an iterator over the central crops of examples, in order; the last batch may be smaller.

        Args:
          batch_size: number of examples per batch.
          examples: indices of the examples; None: all. With a mesh their number must be a multiple of
            `batch_size`.
          mesh: batches are divided along its axis "data".

        Raises:
          UserError: an example cannot be read.
        """
        examples = np.arange(self.examples) if examples is None else np.asarray(examples)
        sharding = mesh and NamedSharding(mesh, P(DATA))
        if sharding:
            (positions,) = _local_indices(sharding, (batch_size,))
            examples = examples.reshape(-1, batch_size)[:, positions.start : positions.stop].ravel()
            batch_size = len(positions)
        source = _EvaluationExamples(self, tuple(examples.tolist()))
        return _on_devices(self._decode(grain.MapDataset.source(source).batch(batch_size)), sharding)

    def _decode(self, batches):
        """Return an iterable that decodes batches in threads or worker processes."""
        # each thread or worker decodes whole batches, so batches do not depend on the number of them
        threads = 1 if self.workers else 2
        batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if self.workers:
            if not flags.FLAGS.is_parsed():  # in a notebook nothing parses flags, and Grain reads its own
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self.workers)
            batches = batches.mp_prefetch(options, worker_init_fn=_begin_worker)
        return batches


def _begin_worker(*_):
    """Set up a worker: it ignores signals, which the training process handles, and exits with that process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    threading.Thread(target=lambda: (trainer.join(), os._exit(1)), daemon=True).start()


class _StreamedEpochs(NamedTuple):
    batches: Iterator[tuple[jax.Array, jax.Array]]

    scannable = False

    def epoch(self, number: int) -> "_StreamedEpochs":
        del number  # the iterator yields batches in the order of training
        return self

    def one_by_one(self) -> Iterator["StreamedBatch"]:
        return itertools.starmap(StreamedBatch, self.batches)


class StreamedBatch(NamedTuple):
    """A decoded batch of all members."""

    images: UInt8[jax.Array, "members batch side side 3"]
    labels: Int[jax.Array, "members batch"]

    def load(self, number: int, batch_size: int, augmentation: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
        del number, batch_size, augmentation  # images were augmented when they were decoded
        return self.images, self.labels


class _StreamedEvaluation(NamedTuple):
    batches: Iterator[tuple[jax.Array, jax.Array]]
    valid: Bool[np.ndarray, "batches batch"]

    scannable = False

    def one_by_one(self) -> Iterator["_StreamedEvaluationBatch"]:
        for (images, labels), valid in zip(self.batches, self.valid, strict=True):
            yield _StreamedEvaluationBatch(images, labels, valid)


class _StreamedEvaluationBatch(NamedTuple):
    images: UInt8[jax.Array, "batch side side 3"]
    labels: Int[jax.Array, " batch"]
    valid: Bool[np.ndarray, " batch"]

    def load(self, number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        del number
        return self.images, self.labels, self.valid


@dataclass(frozen=True)
class _TrainingExamples:
    """The examples of a training in the order step, member, position in the batch."""

    split: Streamed
    seeds: tuple[tuple[int, ...], ...]
    epochs: int
    batch_size: int
    positions: range  # positions within a batch that this process decodes

    def __len__(self):
        return self.epochs * self._steps_per_epoch * len(self.seeds) * len(self.positions)

    def __getitem__(self, index):
        step, index = divmod(index, len(self.seeds) * len(self.positions))
        member, index = divmod(index, len(self.positions))
        epoch, step = divmod(step, self._steps_per_epoch)
        seed = (*self.seeds[member], epoch)
        position = self.positions[index] + step * self.batch_size  # within the epoch
        example = int(_order(seed, self.split.examples)[position])
        return _read(self.split, example, np.random.default_rng((*seed, 1, position)))

    @property
    def _steps_per_epoch(self):
        return self.split.examples // self.batch_size


@dataclass(frozen=True)
class _EvaluationExamples:
    """The examples of an evaluation, in order."""

    split: Streamed
    examples: Sequence[int]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return _read(self.split, self.examples[index], rng=None)


@functools.lru_cache(maxsize=16)  # one order per member serves a whole epoch
def _order(seed, examples):
    """Draw the order of the examples in an epoch of a member."""
    return np.random.default_rng((*seed, 0)).permutation(examples).astype(np.uint32)


def _read(split, example, rng):
    """Return the crop and the label of an example: augmented if `rng` is given, else the central crop."""
    record = split.source[example]
    try:
        image = Image.open(io.BytesIO(record["image"]))
        if rng is not None and "crop" in split.augmentation:
            crop = resized(image, random_box(rng, *image.size), split.side)
        else:
            crop = resized(image, central_box(*image.size), split.side)
    except Exception as error:  # Pillow raises errors of many types for a damaged image
        raise UserError(
            f"cannot decode example {example} of {split.source.name}, {split.source.file(example)}: "
            f"{one_line(error)}"
        ) from error
    if rng is not None and "flip" in split.augmentation and rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop, np.int32(record["label"])


def random_box(rng: np.random.Generator, width: int, height: int) -> Box:
    """Draw a random part of an image of `width` × `height` pixels (Szegedy et al. 2015).

    It has 8 to 100 % of the area, and an aspect ratio from 3 : 4 to 4 : 3. If ten draws do not fit into the
    image, it is the largest central part with an aspect ratio in this range.
    """
    for _ in range(10):
        area = rng.uniform(0.08, 1) * width * height
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return (left, upper, left + w, upper + h)
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)


def central_box(width: int, height: int) -> Box:
    """Return the central square whose side is 224 / 256 of the shorter side of the image.

    It is the part that remains if the shorter side is resized to 256 pixels and the central 224 are cropped.
    """
    side = min(width, height) * 224 / 256
    return ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)


def resized(image: Image.Image, box: Box, side: int) -> Crop:
    """Return the part `box` of an image, resized to `side` × `side` pixels with antialiasing, in RGB.

    Raises:
      ValueError: see `convert_to_8_bits`.
    """
    image = convert_to_8_bits(image, "RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def _local_indices(sharding, shape):
    """Return, for each axis of an array of `shape`, the range of indices on this process's devices."""
    if sharding is None:
        return tuple(map(range, shape))
    shards = sharding.addressable_devices_indices_map(shape).values()
    indices = ({i for shard in shards for i in range(size)[shard[axis]]} for axis, size in enumerate(shape))
    return tuple(range(min(axis_indices), max(axis_indices) + 1) for axis_indices in indices)


def _on_devices(batches, sharding):
    """Yield batches on the first device, or on the devices of `sharding`; they are prefetched."""
    if sharding is None:
        put = functools.partial(jax.device_put, device=jax.local_devices()[0])
    else:
        put = functools.partial(jax.make_array_from_process_local_data, sharding)
    prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
    on_devices = prefetched.map(lambda batch: jax.tree.map(put, batch))
    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(on_devices, prefetch_buffer_size=2))
    try:
        yield from iterator
    finally:
        iterator.close()  # stops the workers, even if the training ends before the last batch
