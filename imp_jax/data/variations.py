"""Variations of a data set in memory: random labels, a subset, blurred images (as in OpenLTH).

All draws are fixed: every seed and every run sees the same labels and the same subset.
"""

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax.data.dataset import Dataset, InMemory
from imp_jax.errors import UserError


def vary(dataset: Dataset, *, labels: str = "true", subset: float = 1.0, blur: int = 1) -> Dataset:
    """Return a variation of a data set.

    Args:
      labels: "random" replaces the training labels by uniform random ones (Zhang et al. 2017).
      subset: fraction of the training images that are kept, drawn without replacement.
      blur: factor by which the images of both splits are reduced and enlarged again.

    Raises:
      UserError: the set is streamed, or nothing of it is left.
    """
    if labels == "true" and subset == 1 and blur == 1:
        return dataset
    if not dataset.train.in_memory:
        raise UserError(
            "dataset.labels, dataset.subset and dataset.blur vary sets in memory; this one is streamed, so "
            "they should be 'true', 1.0 and 1"
        )
    train, test = dataset.train, dataset.test
    if subset < 1:
        kept = round(subset * train.examples)
        if not kept:
            raise UserError(f"dataset.subset is {subset:g}, which leaves none of {train.examples} images")
        train = train.take(np.sort(np.random.default_rng(0).permutation(train.examples)[:kept]))
    if labels == "random":
        drawn = np.random.default_rng(1).integers(0, dataset.num_classes, train.examples, np.int32)
        train = train._replace(labels=jnp.asarray(drawn))
    if blur > 1:
        train, test = (_blur(split, blur) for split in (train, test))
    return dataset._replace(train=train, test=test, folder=None)  # statistics of the original set are others


def _blur(split: InMemory, factor: int) -> InMemory:
    """Reduce images by a factor, and enlarge them again, both by linear interpolation."""
    count, height, width, channels = split.images.shape
    small = (count, max(1, round(height / factor)), max(1, round(width / factor)), channels)
    images = jax.image.resize(split.images.astype(jnp.float32), small, "linear")
    images = jax.image.resize(images, split.images.shape, "linear")
    if split.images.dtype == jnp.uint8:
        images = jnp.clip(jnp.round(images), 0, 255)
    return split._replace(images=images.astype(split.images.dtype))
