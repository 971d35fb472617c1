"""Decoding of image files to 8 bits per channel."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's modes by number of channels


def decode(content: bytes, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """Decode the bytes of an image file to an array of `shape`; see `convert_to_8_bits`.

    Raises:
      ValueError: the image has another size.
      Exception: the file is damaged; Pillow raises errors of many types.
    """
    height, width, channels = shape
    image = Image.open(io.BytesIO(content))
    if image.size != (width, height):
        raise ValueError(f"the image has {image.height} × {image.width} pixels, not {height} × {width}")
    return np.asarray(convert_to_8_bits(image, MODES[channels])).reshape(shape)


def convert_to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to `mode`: "L" (grey), "RGB" or "RGBA", with values from 0 to 255.

    16-bit grey values become round(value / 257); for 16-bit colours Pillow keeps the upper 8 bits. As in
    torchvision, transparency is dropped and not blended with a background.

    Raises:
      ValueError: the pixels have 32 bits, whose range is unknown.
    """
    # the mode of a PNG or PNM file with 16-bit grey values depends on Pillow's version
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}); they should have 8 or 16")
    return image if image.mode == mode else image.convert(mode)
