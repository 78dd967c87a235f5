"""Views of an image: drawn first, then applied to the image and to whatever lies on its grid, as a map of labels.

Crops and rounding are torchvision's with Pillow images. As in the published experiments, the low-resolution view is the
down-sampled high-resolution view.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

ASPECT_RATIOS = (3 / 4, 4 / 3)

BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Size = tuple[int, int]  # width, height


# An image is resized as a whole and then cropped, if that makes at most this many times the pixels that are kept.
MOST_WHOLE = 8


class View(NamedTuple):
    """A box of an image, resized and perhaps mirrored.

    Attributes:
        full_size: (width, height) of the image that it was drawn for.
        box: of that image.
        size: (width, height) of the result.
        mirrored: left to right.
        whole: (width, height) that the image is resized to before the box is cut; None: the box is cut first.
    """

    full_size: Size
    box: Box
    size: Size
    mirrored: bool = False
    whole: Size | None = None

    @property
    def reduction(self) -> int:
        """Factor by which the image may be decoded smaller, and the box still be no smaller than the result."""
        left, top, right, bottom = self.box
        return max(1, int(min((right - left) // self.size[0], (bottom - top) // self.size[1])))

    def apply(self, image: Image.Image, resample: Image.Resampling = BICUBIC) -> Image.Image:
        """The view of an image, or of a map beside it, that may have been decoded at another size.

        Args:
            image: of `full_size`, of a JPEG's 1/2, 1/4 or 1/8 of it, or of any other size of the same shape.
            resample: BICUBIC for images, NEAREST for labels.
        """
        if image.size != self.full_size:
            view = image.resize(self.size, resample, box=self._box_in(image))
        elif self.whole is None:
            view = image.crop(self.box).resize(self.size, resample)
        elif math.prod(self.whole) <= MOST_WHOLE * math.prod(self.size):
            left, top = (round(self.box[i] * self.whole[i] / self.full_size[i]) for i in (0, 1))
            view = image.resize(self.whole, resample).crop((left, top, left + self.size[0], top + self.size[1]))
        else:
            view = image.resize(self.size, resample, box=self.box)
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else view

    def _box_in(self, image: Image.Image) -> Box:
        x, y = self.full_size[0] / image.width, self.full_size[1] / image.height
        if max(x, y) > 1:
            # A JPEG decoded at 1/2, 1/4 or 1/8 scale: its last pixel may lie partly outside of the image.
            x = y = round(max(x, y))
        return self.box[0] / x, self.box[1] / y, self.box[2] / x, self.box[3] / y


def draw_view(
    full_size: tuple[int, int],
    size: int | tuple[int, int],
    rng: np.random.Generator,
    *,
    crop_scale: tuple[float, float],
    flip: bool,
) -> View:
    """A random crop, resized and, if `flip`, mirrored half of the time.

    Args:
        full_size: (width, height) of the image.
        size: side, or (height, width), of the result in pixels.
        rng: the only source of randomness.
        crop_scale: smallest and largest fraction of the image's area that the crop covers.
        flip: mirror left to right with probability 1/2.
    """
    box = random_crop_box(*full_size, rng, crop_scale)
    return View(full_size, box, pair(size)[::-1], mirrored=flip and bool(rng.random() < 0.5))


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random (left, top, right, bottom) box, distributed as in torchvision's RandomResizedCrop.

    The fraction of the area is uniform in `scale`, the aspect ratio log-uniform in 3/4…4/3, the position uniform. If
    ten boxes in a row do not fit into the image, it is the largest central box with an aspect ratio in that range.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECT_RATIOS[1])))
    h = min(height, max(1, round(width / ASPECT_RATIOS[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def central_view(full_size: tuple[int, int], size: int | tuple[int, int], crop: float = 1.0) -> View:
    """The central pixels of an image that is first resized until it just covers `size / crop`.

    Both steps are Pillow's own, as in torchvision and timm, pixel for pixel. Of an elongated image only the part that
    is seen is resampled, so that it costs no more than a square one: its values are rounded a little differently, and
    newer versions of Pillow, which choose the order of their two passes by the sizes, may choose another.

    Args:
        full_size: (width, height) of the image.
        size: side, or (height, width), of the result in pixels.
        crop: share of the resized image's shorter side that is kept.
    """
    width, height = full_size
    rows, columns = pair(size)
    # torchvision truncates the long side and rounds the crop's corner.
    if width * rows >= height * columns:
        new_height = int(rows / crop)
        new_width = int(new_height * width / height)
    else:
        new_width = int(columns / crop)
        new_height = int(new_width * height / width)
    left, top = round((new_width - columns) / 2), round((new_height - rows) / 2)
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, min(width, (left + columns) * x), min(height, (top + rows) * y))
    return View(full_size, box, (columns, rows), whole=(new_width, new_height))


def low_resolution_view(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """The whole image resized to a side, or (height, width), with Pillow's bicubic filter, as published."""
    return image.resize(pair(size)[::-1], BICUBIC)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width), from that or from a side."""
    return (size, size) if isinstance(size, int) else tuple(size)
