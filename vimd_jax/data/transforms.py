"""Training and evaluation views of an image, cropped and rounded as torchvision does with Pillow images.

As in the published experiments, the low-resolution view is the down-sampled high-resolution view.
"""

import math

import numpy as np
from PIL import Image

ASPECT_RATIOS = (3 / 4, 4 / 3)


def train_view(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    crop_scale: tuple[float, float],
    flip: bool,
    full_size: tuple[int, int] | None = None,
) -> Image.Image:
    """A random crop of the image, resized to size × size and, if `flip`, mirrored half of the time.

    Args:
        image: RGB image.
        size: side of the result in pixels.
        rng: the only source of randomness.
        crop_scale: smallest and largest fraction of the image's area that the crop covers.
        flip: mirror left to right with probability 1/2.
        full_size: (width, height) of the image before it was decoded at a smaller scale; the crop is then the
            one that would be drawn from the full image.
    """
    box = random_crop_box(*(full_size or image.size), rng, crop_scale)
    if full_size in (None, image.size):
        view = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    else:
        # JPEGs are decoded at 1/2, 1/4 or 1/8 scale, and their last pixel may lie partly outside of the image.
        scale = round(max(full_size[0] / image.width, full_size[1] / image.height))
        box = tuple(edge / scale for edge in box)
        view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip and rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view


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


def eval_view(image: Image.Image, size: int, crop: float = 1.0) -> Image.Image:
    """The central size × size pixels of the image, after its short side is resized to `size / crop`.

    Both steps are one resampling of the corresponding source box, so that a very elongated image costs no more than a
    square one.
    """
    width, height = image.size
    short = min(width, height)
    # torchvision truncates the long side and rounds the crop's corner.
    resized = int(size / crop)
    new_width, new_height = int(resized * width / short), int(resized * height / short)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, min(width, (left + size) * x), min(height, (top + size) * y))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def low_resolution_view(image: Image.Image, size: int) -> Image.Image:
    """The whole image resized to size × size pixels with Pillow's bicubic filter, as published."""
    return image.resize((size, size), Image.Resampling.BICUBIC)
