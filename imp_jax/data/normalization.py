"""Normalisation of images, and the channel statistics that it uses."""

import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from imp_jax.data.dataset import Dataset

STATISTICS_IMAGES = 10_000  # number of images of a streamed split from which statistics are computed


class Normalize(NamedTuple):
    """Callable that normalises stored images for a network: (image − mean) / std of each channel, in float32.

    Images of type uint8 are first divided by 255; floating-point images are not.

    Raises:
      TypeError: the images are of another type.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(
        self,
        images: UInt8[Array, "*batch height width channels"] | Float[Array, "*batch height width channels"],
    ) -> Float[Array, "*batch height width channels"]:
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        elif not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"images are of type {images.dtype}; they should be uint8 or floating-point")
        mean, std = jnp.array(self.mean, jnp.float32), jnp.array(self.std, jnp.float32)
        return (images.astype(jnp.float32) - mean) / std


def channel_statistics(dataset: Dataset) -> Normalize:
    """Compute mean and standard deviation of each channel over the training images, as a `Normalize`.

    All images are used if they are in memory; of a streamed split, the central crops of 10,000 evenly spaced
    images (ours). A constant channel gets the standard deviation 1. If `dataset.folder` is not None, the result
    is cached there as statistics.json; if the folder cannot be written, it is computed every time.
    """
    train, path = dataset.train, dataset.folder and dataset.folder / "statistics.json"
    if path and (cached := _read_cached(path, train.image_shape)):
        return cached
    if train.in_memory:
        images = np.asarray(train.images)
        batches = np.array_split(images, -(-train.examples // 1000))
    else:
        examples = np.unique(np.linspace(0, train.examples - 1, STATISTICS_IMAGES, dtype=int))
        batches = (np.asarray(images) for images, _ in train.evaluation_batches(100, examples.tolist()))
    if train.in_memory and images.dtype != np.uint8:
        mean, std = _float_statistics(batches)
    else:
        mean, std = _uint8_statistics(batches, train.image_shape[-1])
    if path:
        with contextlib.suppress(OSError):  # a shared folder may be read-only
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            content = {"image_shape": train.image_shape, "mean": mean.tolist(), "std": std.tolist()}
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(path)
    return Normalize(tuple(mean.tolist()), tuple(std.tolist()))


def _read_cached(path: Path, image_shape: tuple[int, int, int]) -> Normalize | None:
    """Read statistics from a file; None if it is missing, damaged, or of images of another shape."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(path.read_text())
        mean, std = (np.array(content[name], np.float64) for name in ("mean", "std"))
        if (
            content["image_shape"] == list(image_shape)
            and mean.shape == std.shape == image_shape[-1:]
            and np.isfinite(mean).all()
            and (std > 0).all()
        ):
            return Normalize(tuple(mean.tolist()), tuple(std.tolist()))
    return None


def _uint8_statistics(batches, channels):
    """Compute mean and standard deviation exactly, from the number of times that each of 256 values occurs."""
    counts = np.zeros((channels, 256), np.int64)
    for images in batches:
        for channel in range(channels):
            counts[channel] += np.bincount(images[..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    std[np.count_nonzero(counts, axis=1) == 1] = 1
    return mean, std


def _float_statistics(batches):
    """Compute mean and standard deviation in float64, in two passes."""
    axes = (0, 1, 2)
    count = sum(images[..., 0].size for images in batches)
    mean = sum(images.sum(axes, dtype=np.float64) for images in batches) / count
    std = np.sqrt(sum(((images - mean) ** 2).sum(axes) for images in batches) / count)
    lowest = np.min([images.min(axes) for images in batches], axis=0)
    highest = np.max([images.max(axes) for images in batches], axis=0)
    std[lowest == highest] = 1
    return mean, std
