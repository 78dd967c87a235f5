"""Views of an image: drawn first, then applied to the image and to whatever lies on its grid, as a map of labels.

Crops and rounding are torchvision's with Pillow images. As in the published experiments, the low-resolution view is the
down-sampled high-resolution view.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

ASPECT_RATIOS = (3 / 4, 4 / 3)

BICUBIC, BILINEAR, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST
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
        canvas: (width, height) that `pad` brings the result to; None: its own size.
    """

    full_size: Size
    box: Box
    size: Size
    mirrored: bool = False
    whole: Size | None = None
    canvas: Size | None = None

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

    def pad(self, view: Image.Image, fill: int | tuple[int, int, int]) -> Image.Image:
        """The view of an image or a map, filled up on the right and below to the size of the canvas."""
        if self.canvas is None or view.size == self.canvas:
            return view
        padded = Image.new(view.mode, self.canvas, fill)
        padded.paste(view)
        return padded

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


def fitted_size(full_size: tuple[int, int], limits: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """The (width, height) of an image fitted into limits that are scaled first, as MMSegmentation computes it.

    Args:
        full_size: (width, height) of the image.
        limits: pixels that its longer and its shorter side may have; (0, 0): its own.
        scale: of these.
    """
    width, height = full_size
    if limits != (0, 0):
        long, short = int(max(limits) * scale), int(min(limits) * scale)
        scale = min(long / max(full_size), short / min(full_size))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def crop_view(
    full_size: tuple[int, int], scaled_size: tuple[int, int], corner: tuple[int, int], side: int, mirrored: bool = False
) -> View:
    """A crop of a scaled image, filled up to side × side where that is smaller.

    Args:
        full_size: (width, height) of the image.
        scaled_size: the same once it is scaled.
        corner: (left, top) of the crop in the scaled image.
        side: of the result in pixels.
        mirrored: left to right, before it is filled up.
    """
    size = tuple(min(side, scaled) for scaled in scaled_size)
    x, y = full_size[0] / scaled_size[0], full_size[1] / scaled_size[1]
    right, bottom = min((corner[0] + size[0]) * x, full_size[0]), min((corner[1] + size[1]) * y, full_size[1])
    return View(full_size, (corner[0] * x, corner[1] * y, right, bottom), size, mirrored, scaled_size, (side, side))


def draw_scaled_view(
    labels: Image.Image,
    side: int,
    rng: np.random.Generator,
    *,
    limits: tuple[int, int],
    scale: tuple[float, float],
    largest_class: float,
    ignored: int,
    flip: bool,
) -> View:
    """A random crop of an image that is scaled at random first, for training on label maps, as MMSegmentation draws it.

    Args:
        labels: the label map of the image, mode "L".
        side: of the result in pixels.
        rng: the only source of randomness.
        limits: see `fitted_size`.
        scale: smallest and largest scale, drawn uniformly.
        largest_class: share of the labelled pixels that a single class must stay below; up to ten crops are drawn for
            that, the last one is taken as it is.
        ignored: value of the pixels without a label.
        flip: mirror left to right with probability 1/2.
    """
    scaled_size = fitted_size(labels.size, limits, rng.uniform(*scale))
    corner = draw_corner(np.asarray(labels.resize(scaled_size, NEAREST)), side, rng, largest_class, ignored)
    return crop_view(labels.size, scaled_size, corner, side, mirrored=flip and bool(rng.random() < 0.5))


def draw_corner(
    labels: np.ndarray, side: int | tuple[int, int], rng: np.random.Generator, largest_class: float, ignored: int
) -> tuple[int, int]:
    """The (left, top) of a random crop of a label map (height, width); see `draw_scaled_view`."""
    (height, width), (rows, columns) = labels.shape, pair(side)
    for _ in range(10):
        top, left = int(rng.integers(max(height - rows, 0) + 1)), int(rng.integers(max(width - columns, 0) + 1))
        pixels = np.bincount(labels[top : top + rows, left : left + columns].ravel(), minlength=ignored + 1)
        pixels = np.delete(pixels, ignored)
        if np.count_nonzero(pixels) > 1 and pixels.max() < largest_class * pixels.sum():
            break
    return left, top


def whole_view(full_size: tuple[int, int], size: tuple[int, int]) -> View:
    """The whole image resized to (width, height)."""
    return View(full_size, (0, 0, *full_size), size)


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


def rounded_sizes(sizes: Sequence[Size], most: int, multiple: int = 1) -> list[Size]:
    """The sizes with sides rounded to multiples of `multiple`, doubled until there are at most so many sizes."""
    rounded = list(sizes)
    while multiple > 1 or len(set(rounded)) > most:
        rounded = [tuple(max(1, round(side / multiple)) * multiple for side in size) for size in sizes]
        if len(set(rounded)) <= most:
            break
        multiple *= 2
    return rounded
