"""Splits that stay on disk: images of various sizes, decoded and cropped batch by batch (ImageNet).

An example of the stream is a pure function of its place in the training: a stream begins at any step, and is
the same with any number of workers.
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
    """A split on disk, whose images are served as crops of `side` × `side` pixels in RGB."""

    source: Source | ImageFolder
    side: int
    augmentation: tuple[str, ...]  # of training images
    workers: int  # processes that decode; 0 decodes in threads of this one

    augmentations: ClassVar = ("crop", "flip")  # that exist: a random part of the image, mirrored or not
    # of `dataset.Split`
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
        count = -(-self.examples // batch_size) * batch_size  # full batches, so that one program serves all
        examples = np.arange(count)
        batches = self.evaluation_batches(batch_size, examples % self.examples, mesh)
        return _StreamedEvaluation(batches, (examples < self.examples).reshape(-1, batch_size))

    def take(self, examples: Int[np.ndarray, " count"]) -> InMemory:
        batches = self.evaluation_batches(min(self.evaluation_batch_size, len(examples)), examples)
        return InMemory(*map(jnp.concatenate, zip(*batches, strict=True)))

    def put_on_mesh(self, mesh: Mesh) -> "Streamed":
        del mesh  # batches are put there one by one
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
        """The batches of a training from step `first_step` on, on the device a little before they are needed.

        In each epoch each member visits the examples in an order and in crops of its own, drawn from its seed;
        examples that do not fill a last batch are left out of that epoch. On a mesh a process decodes what its
        devices train on, and no more.

        Raises:
          UserError: an example that cannot be read.
        """
        sharding = devices.batch_sharding(mesh)
        members, places = _local_indices(sharding, (len(seeds), batch_size))
        seeds = tuple(tuple(map(int, seed)) for seed in seeds[members.start : members.stop])
        visits = grain.MapDataset.source(_TrainingExamples(self, seeds, epochs, batch_size, places))
        batches = visits[first_step * len(seeds) * len(places) :].batch(len(places))
        return _on_devices(self._decode(batches).batch(len(seeds), drop_remainder=True), sharding)

    def evaluation_batches(
        self, batch_size: int, examples: Sequence[int] | None = None, mesh: Mesh | None = None
    ) -> Iterator[tuple[UInt8[jax.Array, "batch side side 3"], Int[jax.Array, " batch"]]]:
        """The central crops of all examples, or of those named, in order; the last batch may be smaller.

        On a mesh, along whose axis "data" the batches are divided, there should be as many as fill all batches.

        Raises:
          UserError: an example that cannot be read.
        """
        examples = np.arange(self.examples) if examples is None else np.asarray(examples)
        sharding = mesh and NamedSharding(mesh, P(DATA))
        if sharding:
            (places,) = _local_indices(sharding, (batch_size,))
            examples = examples.reshape(-1, batch_size)[:, places.start : places.stop].ravel()
            batch_size = len(places)
        views = _EvaluationExamples(self, tuple(examples.tolist()))
        return _on_devices(self._decode(grain.MapDataset.source(views).batch(batch_size)), sharding)

    def _decode(self, batches):
        # whoever decodes makes a whole batch: its make-up does not depend on their number
        threads = 1 if self.workers else 2
        batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if self.workers:
            if not flags.FLAGS.is_parsed():  # in a notebook; Grain's workers have flags of their own
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self.workers)
            batches = batches.mp_prefetch(options, worker_init_fn=_begin_worker)
        return batches


def _begin_worker(*_):
    """Leave the signals that all processes get to the one that trains, and end with it if it is killed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    threading.Thread(target=lambda: (trainer.join(), os._exit(1)), daemon=True).start()


class _StreamedEpochs(NamedTuple):
    batches: Iterator[tuple[jax.Array, jax.Array]]

    scannable = False

    def epoch(self, number: int) -> "_StreamedEpochs":
        del number  # batches come in the order of the training
        return self

    def one_by_one(self) -> Iterator["StreamedBatch"]:
        return itertools.starmap(StreamedBatch, self.batches)


class StreamedBatch(NamedTuple):
    """A decoded batch of all members."""

    images: UInt8[jax.Array, "members batch side side 3"]
    labels: Int[jax.Array, "members batch"]

    def load(self, number: int, batch_size: int, augmentation: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
        del number, batch_size, augmentation  # cropped and flipped when they were decoded
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
    """What a training sees, image by image: of each step the members, of each member its batch."""

    split: Streamed
    seeds: tuple[tuple[int, ...], ...]
    epochs: int
    batch_size: int
    places: range  # of each batch, that are seen here

    def __len__(self):
        return self.epochs * self._steps * len(self.seeds) * len(self.places)

    def __getitem__(self, index):
        step, index = divmod(index, len(self.seeds) * len(self.places))
        member, place = divmod(index, len(self.places))
        epoch, step = divmod(step, self._steps)
        seed = (*self.seeds[member], epoch)
        place = self.places[place] + step * self.batch_size
        example = int(_order(seed, self.split.examples)[place])
        draw = np.random.default_rng((*seed, 1, place))
        return _read(self.split, example, draw)

    @property
    def _steps(self):
        return self.split.examples // self.batch_size


@dataclass(frozen=True)
class _EvaluationExamples:
    """What an evaluation sees."""

    split: Streamed
    examples: Sequence[int]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return _read(self.split, self.examples[index], draw=None)


@functools.lru_cache(maxsize=16)  # of every member; images of an epoch come one after the other
def _order(seed, examples):
    return np.random.default_rng((*seed, 0)).permutation(examples).astype(np.uint32)


def _read(split, example, draw):
    """Image and label of an example: a random view by `draw`, or the central one."""
    record = split.source[example]
    try:
        image = Image.open(io.BytesIO(record["image"]))
        if draw is not None and "crop" in split.augmentation:
            crop = resized(image, random_box(draw, *image.size), split.side)
        else:
            crop = resized(image, central_box(*image.size), split.side)
    except Exception as error:  # Pillow raises many kinds on a damaged image
        raise UserError(
            f"cannot decode example {example} of {split.source.name}, {split.source.file(example)}: "
            f"{one_line(error)}"
        ) from error
    if draw is not None and "flip" in split.augmentation and draw.random() < 0.5:
        crop = crop[:, ::-1]
    return crop, np.int32(record["label"])


def random_box(draw: np.random.Generator, width: int, height: int) -> Box:
    """A random part of an image: 8 to 100 % of its area, 3 : 4 to 4 : 3 in shape (Szegedy et al. 2015).

    Where ten draws do not fit into the image, the central part nearest to such a shape.
    """
    for _ in range(10):
        area = draw.uniform(0.08, 1) * width * height
        ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = draw.integers(0, width - w + 1), draw.integers(0, height - h + 1)
            return (left, upper, left + w, upper + h)
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)


def central_box(width: int, height: int) -> Box:
    """The central square with 224 / 256 of the shorter side: resize to 256, crop 224, in one."""
    side = min(width, height) * 224 / 256
    return ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)


def resized(image: Image.Image, box: Box, side: int) -> Crop:
    """The part `box` of an image in RGB, resized to `side` × `side` with antialiasing.

    Raises:
      ValueError: see `convert_to_8_bits`.
    """
    image = convert_to_8_bits(image, "RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def _local_indices(sharding, shape):
    """The part of each axis of an array of `shape` that lies on this process's devices."""
    if sharding is None:
        return tuple(map(range, shape))
    parts = sharding.addressable_devices_indices_map(shape).values()
    numbers = ({n for part in parts for n in range(size)[part[axis]]} for axis, size in enumerate(shape))
    return tuple(range(min(of_axis), max(of_axis) + 1) for of_axis in numbers)


def _on_devices(batches, sharding):
    """Iterate with batches put on the device, or those of `sharding`, ahead of their use."""
    if sharding is None:
        put = functools.partial(jax.device_put, device=jax.local_devices()[0])
    else:
        put = functools.partial(jax.make_array_from_process_local_data, sharding)
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
    on_devices = ahead.map(lambda batch: jax.tree.map(put, batch))
    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(on_devices, prefetch_buffer_size=2))
    try:
        yield from iterator
    finally:
        iterator.close()  # ends the workers, also where a training stops half-way
