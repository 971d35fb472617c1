"""Variations of a data set in memory: random labels, a subset, blurred images (as in OpenLTH), held-out images.

All draws are fixed: every seed and every run sees the same labels and the same images.
"""

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax.data.dataset import Dataset, InMemory
from imp_jax.errors import UserError


def vary(
    dataset: Dataset, *, labels: str = "true", subset: float = 1.0, validation: float = 0.0, blur: int = 1
) -> Dataset:
    """Return a variation of a data set.

    Args:
      labels: "random" replaces the training labels by uniform random ones (Zhang et al. 2017).
      subset: fraction of the training images that are kept, drawn without replacement.
      validation: fraction of the training images, after these changes, that are moved to a validation split,
        drawn without replacement.
      blur: factor by which the images of all splits are reduced and enlarged again.

    Raises:
      UserError: the set is streamed, a split would have no images, or there is a validation split already.
    """
    if labels == "true" and subset == 1 and validation == 0 and blur == 1:
        return dataset
    if not dataset.train.in_memory:
        raise UserError(
            "dataset.labels, dataset.subset, dataset.validation and dataset.blur vary sets in memory; this one "
            "is streamed, so they should be 'true', 1.0, 0.0 and 1"
        )
    splits = dataset.splits()
    train = splits["train"]
    if subset < 1:
        kept = round(subset * train.examples)
        if not kept:
            raise UserError(f"dataset.subset is {subset:g}, which leaves none of {train.examples} images")
        train = train.take(np.sort(np.random.default_rng(0).permutation(train.examples)[:kept]))
    if labels == "random":
        drawn = np.random.default_rng(1).integers(0, dataset.num_classes, train.examples, np.int32)
        train = train._replace(labels=jnp.asarray(drawn))
    if validation:
        train, splits["validation"] = _hold_out(train, validation, dataset.validation)
    splits["train"] = train
    if blur > 1:
        splits = {name: _blur(split, blur) for name, split in splits.items()}
    return dataset._replace(**splits, folder=None)  # statistics of the original set are others


def _hold_out(train: InMemory, fraction: float, validation: InMemory | None) -> tuple[InMemory, InMemory]:
    """Divide the training images into those that remain and a validation split."""
    if validation is not None:
        raise UserError(
            f"dataset.validation is {fraction:g}; the data set has a validation split of {validation.examples} "
            f"images, so it should be 0.0"
        )
    held_out = round(fraction * train.examples)
    if not 0 < held_out < train.examples:
        raise UserError(
            f"dataset.validation is {fraction:g}, which holds out {held_out} of {train.examples} images; it "
            f"should leave some for training and for validation"
        )
    order = np.random.default_rng(2).permutation(train.examples)
    return train.take(np.sort(order[held_out:])), train.take(np.sort(order[:held_out]))


def _blur(split: InMemory, factor: int) -> InMemory:
    """Reduce images by a factor, and enlarge them again, both by linear interpolation."""
    count, height, width, channels = split.images.shape
    small = (count, max(1, round(height / factor)), max(1, round(width / factor)), channels)
    images = jax.image.resize(split.images.astype(jnp.float32), small, "linear")
    images = jax.image.resize(images, split.images.shape, "linear")
    if split.images.dtype == jnp.uint8:
        images = jnp.clip(jnp.round(images), 0, 255)
    return split._replace(images=images.astype(split.images.dtype))
