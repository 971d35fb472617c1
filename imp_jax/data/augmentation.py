"""Random changes of training images, on the device: shifts and flips (appendix A.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

Images = UInt8[Array, "batch height width channels"] | Float[Array, "batch height width channels"]


def random_crop(key: Key[Array, ""], images: Images, padding: int = 4) -> Images:
    """Shift each image by up to `padding` pixels either way, filling with zeros: a crop of the padded image.

    Zero is black in images of type uint8, and in floating-point images from 0 to 1.
    """
    batch, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), shape))(padded, corners)


def random_flip(key: Key[Array, ""], images: Images) -> Images:
    """Mirror each image left to right with probability one half."""
    flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


AUGMENTATIONS = {"crop": random_crop, "flip": random_flip}


def augment(key: Key[Array, ""], images: Images, names: tuple[str, ...]) -> Images:
    """Change `images` by the named augmentations in turn, each with a key of its own."""
    for number, name in enumerate(names):
        images = AUGMENTATIONS[name](jax.random.fold_in(key, number), images)
    return images
