"""Random augmentations of training images in memory, computed on the device.

The paper does not specify its augmentations. "crop" and "flip" are those of He et al. 2016, section 4.2 (ours).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from imp_jax.errors import UserError

Images = UInt8[Array, "batch height width channels"] | Float[Array, "batch height width channels"]


def random_crop(key: Key[Array, ""], images: Images, padding: int = 4) -> Images:
    """Shift each image by up to `padding` pixels along both axes and fill the border with zeros.

    This is a random crop of the zero-padded image. The border is black in uint8 images, and in floating-point
    images with values from 0 to 1.
    """
    batch, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), shape))(padded, corners)


def random_flip(key: Key[Array, ""], images: Images) -> Images:
    """Flip each image horizontally with probability one half."""
    flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


AUGMENTATIONS: dict[str, Callable[[Key[Array, ""], Images], Images]] = {
    "crop": random_crop,
    "flip": random_flip,
}


def register(name: str, function: Callable[[Key[Array, ""], Images], Images]) -> None:
    """Register an augmentation under a name, for `config.dataset.augmentation`.

        data.register_augmentation("invert", lambda key, images: 255 - images)

    An augmentation of the same name is replaced, and JAX's compiled functions are discarded, because they may
    contain the old one. Streamed sets have only their own augmentations.

    Args:
      name: any string that is not empty.
      function: a traceable function of a PRNG key and a batch of images, with the type of the set's images:
        uint8 or floating-point. It returns a batch of the same shape and type.

    Raises:
      UserError: `function` cannot be called, or `name` is not such a string.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"an augmentation is registered as {name!r}; its name should be a string, not empty")
    if not callable(function):
        raise UserError(
            f"an augmentation is registered as {name!r} with an object of type {type(function).__name__}; it "
            f"should be a function of a key and a batch of images"
        )
    if AUGMENTATIONS.get(name, function) is not function:
        jax.clear_caches()
    AUGMENTATIONS[name] = function


def augment(key: Key[Array, ""], images: Images, names: tuple[str, ...]) -> Images:
    """Apply the named augmentations in order, each with its own key.

    Raises:
      UserError: an augmentation changes the shape or the type of the images.
    """
    for number, name in enumerate(names):
        augmented = AUGMENTATIONS[name](jax.random.fold_in(key, number), images)
        if (jnp.shape(augmented), jnp.result_type(augmented)) != (images.shape, images.dtype):
            raise UserError(
                f"the augmentation {name} changes images from {images.dtype} of the shape {images.shape} to "
                f"{jnp.result_type(augmented)} of the shape {jnp.shape(augmented)}; it should keep both"
            )
        images = augmented
    return images
