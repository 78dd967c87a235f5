"""Reading one picture, of whatever kind, as upright 8-bit RGB."""

import os
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# JPEGs at least twice this large in both directions are decoded at 1/2, 1/4 or 1/8 of their size: the networks read
# 224 pixels, and a 100-megapixel photograph need not cost 300 MB of memory.
DRAFT_SIZE = 2048
# Beyond this Pillow itself refuses to open a picture, as a likely decompression bomb.
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS


class DatasetError(ValueError):
    """Something about the data is wrong; the one-line message names it and the remedy."""


class UnreadableImage(DatasetError):
    """A picture that cannot be decoded; the message names it and the cause."""


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read a picture file as upright 8-bit RGB.

    Args:
        path: a file in any format that Pillow reads: JPEG, PNG, BMP, WebP, GIF (first frame), TIFF…

    Returns:
        An RGB picture of any size from 1×1: EXIF rotation applied, 16-bit values scaled to 8 bits, palettes, grey
        and CMYK converted, transparent parts laid over white.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, no picture, or larger than `MAX_PIXELS`.
    """
    try:
        with open(path, "rb") as file:
            return decode_image(file, os.fspath(path))
    except OSError as error:
        raise UnreadableImage(f"{os.fspath(path)}: {error.strerror}") from None


def decode_image(file: BinaryIO, name: str) -> Image.Image:
    """Decode an open picture file like `read_image`; `name` stands for it in error messages."""
    try:
        with Image.open(file) as image:
            image.draft(None, (DRAFT_SIZE, DRAFT_SIZE))
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        cause = f"more than {MAX_PIXELS // 10**6} megapixels; scale it down"
    except UnidentifiedImageError:
        cause = "not a picture in a known format" if file.seek(0, os.SEEK_END) else "the file is empty"
    except Exception as error:  # On damaged files Pillow's decoders raise errors of nearly every type.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UnreadableImage(f"{name}: {cause}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip instead of scaling.
        grey = np.clip(np.asarray(image, np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
