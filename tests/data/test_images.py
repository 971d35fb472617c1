"""Conversion of image files of all modes and bit depths to 8 bits."""

import io

import numpy as np
import pytest
from PIL import Image

from imp_jax.data.images import convert_to_8_bits, decode
from tests.helpers import folders

GREY = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)
COLOUR = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)


def save_and_open(image, encoding, **options):
    """Return an image after writing it to a file and opening that."""
    file = io.BytesIO()
    image.save(file, encoding, **options)
    return Image.open(file)


@pytest.mark.parametrize("encoding", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_values_are_divided_by_257_and_rounded(encoding):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    image = save_and_open(Image.fromarray(values), encoding)
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(convert_to_8_bits(image, "L")), expected)
    np.testing.assert_array_equal(
        np.asarray(convert_to_8_bits(image, "RGB")), np.stack([expected] * 3, axis=-1)
    )


def test_big_endian_16_bit_values_are_converted_correctly():
    image = Image.frombytes("I;16B", (2, 1), np.array([257, 25700], ">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(convert_to_8_bits(image, "L")), [[1, 100]])


def test_1_bit_palette_transparent_and_cmyk_images_are_converted_correctly():
    black_and_white = GREY > 100
    image = save_and_open(Image.fromarray(black_and_white), "PNG")
    assert image.mode == "1"
    np.testing.assert_array_equal(np.asarray(convert_to_8_bits(image, "L")), 255 * black_and_white)

    palette = Image.fromarray(GREY // 10, "L")
    colours = np.arange(25)[:, None] * [3, 5, 7]
    palette.putpalette(colours.ravel().tolist())
    image = save_and_open(palette, "PNG")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(convert_to_8_bits(image, "RGB")), colours[GREY // 10])

    rgba = np.concatenate([COLOUR, GREY[..., None]], axis=-1)
    image = save_and_open(Image.fromarray(rgba), "PNG")
    np.testing.assert_array_equal(np.asarray(convert_to_8_bits(image, "RGB")), COLOUR)
    np.testing.assert_array_equal(np.asarray(convert_to_8_bits(image, "RGBA")), rgba)
    grey_alpha = save_and_open(Image.fromarray(np.stack([GREY, 255 - GREY], -1), "LA"), "PNG")
    np.testing.assert_array_equal(np.asarray(convert_to_8_bits(grey_alpha, "L")), GREY)

    cmyk = np.zeros((16, 16, 4), np.uint8) + np.array([0, 200, 100, 0], np.uint8)
    image = save_and_open(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100)
    assert image.mode == "CMYK"
    np.testing.assert_allclose(
        np.asarray(convert_to_8_bits(image, "RGB")), np.full((16, 16, 3), [255, 55, 155]), atol=2
    )


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(dtype):
    image = save_and_open(Image.fromarray(GREY.astype(dtype)), "TIFF")
    with pytest.raises(ValueError, match=r"its pixels have 32 bits .mode [IF].*8 or 16"):
        convert_to_8_bits(image, "RGB")


def test_an_image_of_another_size_is_refused():
    content = folders.encoded(COLOUR).getvalue()
    np.testing.assert_array_equal(decode(content, (5, 5, 3)), COLOUR)
    assert decode(content, (5, 5, 1)).shape == (5, 5, 1)
    with pytest.raises(ValueError, match="has 5 × 5 pixels, not 1 × 5"):
        decode(content, (1, 5, 3))
