"""Augmentations against all shifts and flips of the images in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from imp_jax.data.augmentation import augment, random_crop, random_flip

IMAGES = np.random.default_rng(0).integers(1, 256, (64, 8, 9, 3), np.uint8)  # all different, none black


def shifts(image, padding=4):
    """Return all crops of the padded image, {corner: crop}."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    corners = itertools.product(range(2 * padding + 1), repeat=2)
    return {(y, x): padded[y : y + height, x : x + width] for y, x in corners}


def find_name(image, candidates):
    """Return the name of the only candidate that equals `image`."""
    names = [name for name, candidate in candidates.items() if np.array_equal(image, candidate)]
    assert len(names) == 1
    return names[0]


def test_random_crop_shifts_by_up_to_four_pixels_and_fills_with_black():
    cropped = np.asarray(random_crop(jax.random.key(0), jnp.asarray(IMAGES)))
    assert cropped.dtype == np.uint8
    corners = [find_name(changed, shifts(original)) for original, changed in zip(IMAGES, cropped, strict=True)]
    assert len(set(corners)) > 30  # 64 draws of 81 corners
    rows, columns = np.transpose(corners)
    for offsets in (rows, columns):
        assert set(offsets) == set(range(9))  # every shift occurs, including the largest


def test_random_crop_shifts_floating_point_images_like_uint8_images():
    key = jax.random.key(0)
    floats = random_crop(key, jnp.asarray(IMAGES / 255, jnp.float32))
    np.testing.assert_allclose(floats, random_crop(key, jnp.asarray(IMAGES)) / 255, rtol=1e-6)


def test_random_crop_draws_all_corners_equally_often():
    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 4] = 1
    cropped = np.asarray(random_crop(jax.random.key(1), jnp.asarray(np.repeat(image, 8100, 0))))
    counts = cropped.sum((0, 3))  # positions of the one bright pixel: about 100 at each of 81
    assert counts.sum() == 8100
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert 40 < chi_square < 140  # 80 degrees of freedom: mean 80, deviation 12.6


def test_random_flip_mirrors_half_of_the_images():
    flipped = np.asarray(random_flip(jax.random.key(0), jnp.asarray(np.repeat(IMAGES, 10, 0))))
    names = [
        find_name(changed, {"same": original, "mirrored": original[:, ::-1]})
        for original, changed in zip(np.repeat(IMAGES, 10, 0), flipped, strict=True)
    ]
    assert 260 < names.count("mirrored") < 380  # of 640; deviation 12.6


def test_crops_and_flips_are_independent():
    augmented = np.asarray(augment(jax.random.key(3), jnp.asarray(IMAGES), ("crop", "flip")))
    names = []
    for original, changed in zip(IMAGES, augmented, strict=True):
        candidates = {(*corner, 0): shift for corner, shift in shifts(original).items()}
        candidates |= {(*corner, 1): shift[:, ::-1] for corner, shift in shifts(original).items()}
        names.append(find_name(changed, candidates))
    assert len({name[:2] for name in names if name[2]}) > 10
    assert len({name[:2] for name in names if not name[2]}) > 10


def test_augment_without_names_returns_the_images():
    np.testing.assert_array_equal(augment(jax.random.key(0), jnp.asarray(IMAGES), ()), IMAGES)


def test_augment_depends_on_the_key():
    one, other = (augment(jax.random.key(seed), jnp.asarray(IMAGES), ("crop", "flip")) for seed in (0, 1))
    differ = np.any(np.asarray(one) != np.asarray(other), axis=(1, 2, 3))
    assert differ.mean() > 0.8
