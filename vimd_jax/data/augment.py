"""Augmentation of a training view: RandAugment, 3-Augment, colour jitter, random erasing.

They act on 8-bit RGB images of Pillow and draw from the NumPy generator that they are given, and from nothing else. The
definitions are those with which DeiT and its descendants were trained: RandAugment and random erasing as in timm,
colour jitter as in torchvision, 3-Augment as in DeiT III.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vimd_jax.errors import DatasetError

# Mean and standard deviation of the pixels of ImageNet, in 8-bit units.
MEAN = 255 * np.array((0.485, 0.456, 0.406))
STD = 255 * np.array((0.229, 0.224, 0.225))

ERASED_AREA = (0.02, 1 / 3)  # share of the image
ERASED_ASPECT_RATIO = (0.3, 1 / 0.3)  # height over width
BLUR_RADIUS = (0.1, 2.0)  # standard deviation of 3-Augment's Gaussian, in pixels


def augment(image: Image.Image, config: ConfigDict, rng: np.random.Generator) -> Image.Image:
    """The augmentations that `config.dataset.augment` switches on, in their published order.

    Args:
        image: RGB image, cropped, resized and flipped already.
        config: `config.dataset.augment`, see `check_augment`. With everything off, the image is returned as it is and
            nothing is drawn from `rng`.
        rng: the only source of randomness.
    """
    if config.rand_augment:
        image = RandAugment.parse(config.rand_augment)(image, rng)
    if config.three_augment:
        image = three_augment(image, rng)
    if config.color_jitter:
        image = color_jitter(image, config.color_jitter, rng)
    if config.erasing_probability:
        image = random_erasing(
            image, rng, config.erasing_probability, mode=config.erasing_mode, count=config.erasing_count
        )
    return image


def check_augment(config: ConfigDict) -> None:
    """Raises DatasetError, naming the field, if the fields of `config.dataset.augment` do not go together."""
    if config.rand_augment:
        if config.three_augment or config.color_jitter:
            raise DatasetError(
                f"config.dataset.augment.rand_augment is {config.rand_augment!r}; RandAugment replaces colour jitter "
                "and 3-Augment, so set it or those"
            )
        RandAugment.parse(config.rand_augment)


# ---------------------------------------------------------------------------------------------------------------------
# RandAugment


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al., https://arxiv.org/abs/1909.13719) as timm defines it.

    Draws `layers` operations with replacement and applies each with probability `probability`.

    Attributes:
        magnitude: strength of the operations, of 10.
        layers: number of operations drawn for an image.
        noise: standard deviation of each operation's magnitude, which is then clipped to 0…`max_magnitude`.
        max_magnitude: see noise.
        increasing: choose the set of operations of which every one grows stronger with the magnitude.
        probability: of each operation that is drawn.
    """

    magnitude: float = 10.0
    layers: int = 2
    noise: float = 0.0
    max_magnitude: float = 10.0
    increasing: bool = False
    probability: float = 0.5

    @staticmethod
    @functools.cache
    def parse(text: str) -> "RandAugment":
        """Reads timm's notation: "rand", then "-" and any of m9, n2, mstd0.5, mmax10, inc1, p0.5 in any order.

        Raises:
            DatasetError: the text is none of that.
        """
        name, *sections = text.split("-")
        values = {}
        for section in sections:
            key, number = re.fullmatch("([a-z]*)(.*)", section, re.DOTALL).groups()
            field, pattern, read = _NOTATION.get(key, ("", "(?!)", str))
            if field in values or not re.fullmatch(pattern, number, re.ASCII):
                raise DatasetError(_explain(text, f"{section!r} is not understood or given twice"))
            values[field] = read(number)
        if name != "rand":
            raise DatasetError(_explain(text, f"it begins with {name!r}"))
        return RandAugment(**values)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        operations = list((INCREASING_OPERATIONS if self.increasing else OPERATIONS).values())
        for i in rng.integers(len(operations), size=self.layers):
            if rng.random() < self.probability:
                magnitude = min(max(rng.normal(self.magnitude, self.noise), 0), self.max_magnitude)
                image = operations[i](image, magnitude / 10, 2 * int(rng.integers(2)) - 1)
        return image


# Of each key: the field, what may follow the key, and how to read that.
_NOTATION = {
    "m": ("magnitude", r"\d+(\.\d+)?", float),
    "n": ("layers", r"[1-9]\d?", int),
    "mstd": ("noise", r"\d\d?(\.\d+)?", float),  # timm gives 100 and above another meaning
    "mmax": ("max_magnitude", r"\d+(\.\d+)?", float),
    "inc": ("increasing", "[01]", lambda digit: digit == "1"),
    "p": ("probability", r"0(\.\d+)?|1(\.0+)?", float),
}


def _explain(text: str, mistake: str) -> str:
    return (
        f"config.dataset.augment.rand_augment is {text!r}, but {mistake}; write rand-m9-mstd0.5-inc1, that is rand and "
        "any of m (magnitude), n (operations an image), mstd (noise), mmax (largest magnitude), inc (0 or 1), "
        "p (probability)"
    )


# An operation on (image, strength, sign): the strength is magnitude / 10, the sign a random direction, 1 or -1.
Operation = Callable[[Image.Image, float, int], Image.Image]


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """The image whose pixel (x, y) is that of the given one at (a x + b y + c, d x + e y + f); around it the mean."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_FILL)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """The image turned counter-clockwise about its centre; around it the mean."""
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=_FILL)


def solarize_add(image: Image.Image, addend: int) -> Image.Image:
    """Adds to the values below 128, up to 255."""
    return image.point([min(255, i + addend) if i < 128 else i for i in range(256)] * 3)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the highest bits of every value; none at all makes the image black, which Pillow's own function refuses."""
    mask = 256 - 2 ** (8 - min(bits, 8))
    return image.point([i & mask for i in range(256)] * 3)


def _enhancing(enhancer: type) -> Operation:
    return lambda image, strength, _: enhancer(image).enhance(0.1 + 1.8 * strength)


def _enhancing_increasingly(enhancer: type) -> Operation:
    return lambda image, strength, sign: enhancer(image).enhance(max(0.1, 1 + sign * 0.9 * strength))


_FILL = tuple(int(value) for value in MEAN.round())
_ENHANCERS = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}
_COMMON: dict[str, Operation] = {
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "Rotate": lambda image, strength, sign: rotate(image, sign * 30 * strength),
    "SolarizeAdd": lambda image, strength, _: solarize_add(image, int(110 * strength)),
    "ShearX": lambda image, strength, sign: affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    "ShearY": lambda image, strength, sign: affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    "TranslateX": lambda image, strength, sign: affine(image, 1, 0, sign * 0.45 * strength * image.width, 0, 1, 0),
    "TranslateY": lambda image, strength, sign: affine(image, 1, 0, 0, 0, 1, sign * 0.45 * strength * image.height),
}
# Kept bits and threshold grow with the magnitude here, so that these two grow weaker; saturation, contrast, brightness
# and sharpness go from 0.1 to 1.9 times the image's.
OPERATIONS: dict[str, Operation] = {
    **_COMMON,
    "Posterize": lambda image, strength, _: posterize(image, int(4 * strength)),
    "Solarize": lambda image, strength, _: ImageOps.solarize(image, min(256, int(256 * strength))),
    **{name: _enhancing(enhancer) for name, enhancer in _ENHANCERS.items()},
}
INCREASING_OPERATIONS: dict[str, Operation] = {
    **_COMMON,
    "Posterize": lambda image, strength, _: posterize(image, max(0, 4 - int(4 * strength))),
    "Solarize": lambda image, strength, _: ImageOps.solarize(image, max(0, 256 - int(256 * strength))),
    **{name: _enhancing_increasingly(enhancer) for name, enhancer in _ENHANCERS.items()},
}


# ---------------------------------------------------------------------------------------------------------------------
# 3-Augment, colour jitter, random erasing


def three_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """3-Augment of DeiT III (Touvron et al., https://arxiv.org/abs/2204.07118).

    Greyscale, solarisation or Gaussian blur, each as likely. In the paper, `color_jitter` of 0.3 follows.
    """
    choice = rng.integers(3)
    if choice == 0:
        return ImageOps.grayscale(image).convert("RGB")
    if choice == 1:
        return ImageOps.solarize(image, 128)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR_RADIUS)))


def color_jitter(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast and saturation, in random order, as torchvision's ColorJitter does.

    Each is multiplied by its own factor, uniform between max(0, 1 - amount) and 1 + amount.
    """
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(3):
        image = enhancers[i](image).enhance(rng.uniform(max(0, 1 - amount), 1 + amount))
    return image


def random_erasing(
    image: Image.Image, rng: np.random.Generator, probability: float, *, mode: str = "pixel", count: int = 1
) -> Image.Image:
    """Random erasing (Zhong et al., https://arxiv.org/abs/1708.04896) as timm defines it.

    The area of a box, as a share of the image's, is uniform in `ERASED_AREA`, its aspect ratio log-uniform in
    `ERASED_ASPECT_RATIO`, its position uniform. If ten boxes in a row do not fit into the image, there is none.

    Args:
        image: RGB image.
        rng: the only source of randomness.
        probability: that the image is erased at all.
        mode: what the box is filled with: "pixel" a normally distributed value for every pixel, "rand" one such colour,
            "const" the mean. Mean and standard deviation are those of ImageNet; since the image has 8 bits, values
            beyond them, more than 2.1 standard deviations from the mean, are clipped.
        count: largest number of boxes, drawn uniformly from 1; their areas are divided by the number drawn.
    """
    if rng.random() >= probability:
        return image
    pixels = np.array(image)
    boxes = int(rng.integers(1, count + 1))
    for _ in range(boxes):
        top, left, height, width = erased_box(*pixels.shape[:2], rng, boxes)
        if mode == "const":
            noise = np.zeros(3)
        else:
            noise = rng.standard_normal((height, width, 3) if mode == "pixel" else 3, np.float32)
        colour = np.clip(np.rint(MEAN + STD * noise), 0, 255).astype(np.uint8)
        pixels[top : top + height, left : left + width] = colour
    return Image.fromarray(pixels)


def erased_box(height: int, width: int, rng: np.random.Generator, count: int = 1) -> tuple[int, int, int, int]:
    """A random (top, left, height, width) box, one of `count` in an image of this size; empty if none fits."""
    for _ in range(10):
        area = height * width * rng.uniform(*ERASED_AREA) / count
        ratio = math.exp(rng.uniform(*map(math.log, ERASED_ASPECT_RATIO)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, 0, 0
