"""The training and evaluation views of a picture, cut and rounded as torchvision does with Pillow pictures.

The published experiments cut the high-resolution view first and down-sample that same cut for the low-resolution view.
"""

import math

import numpy as np
from PIL import Image

ASPECT_RATIOS = (3 / 4, 4 / 3)


def train_view(
    image: Image.Image, size: int, rng: np.random.Generator, *, crop_scale: tuple[float, float], flip: bool
) -> Image.Image:
    """A random crop of the picture, resized to size × size and, if `flip`, mirrored half of the time.

    Args:
        image: RGB picture.
        size: side of the result in pixels.
        rng: the only source of randomness.
        crop_scale: smallest and largest share of the picture's area that the crop covers.
        flip: mirror left to right with probability 1/2.
    """
    box = random_crop_box(*image.size, rng, crop_scale)
    view = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    if flip and rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A (left, top, right, bottom) box by the law of torchvision's RandomResizedCrop.

    Area share uniform in `scale`, aspect ratio log-uniform in 3/4…4/3, position uniform; if ten draws do not fit into
    the picture, the largest central box whose aspect ratio is within the limits.
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
    """The picture with its short side resized to `size / crop`, then the central size × size pixels.

    Both steps are one resampling of the matching source box, so that a very long picture costs no more than a square.
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
    """The whole picture in size × size pixels, by Pillow's bicubic filter as published."""
    return image.resize((size, size), Image.Resampling.BICUBIC)
