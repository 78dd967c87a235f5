"""Augmentation of a training view: RandAugment, 3-Augment, colour jitter, photometric distortion, random erasing.

They act on 8-bit RGB images of Pillow and draw from the NumPy generator that they are given, and from nothing else. The
definitions are those with which DeiT and its descendants were trained: random erasing as in timm, colour jitter as in
torchvision, 3-Augment as in DeiT III; rand_augment.py has RandAugment. Photometric distortion is for label maps.
"""

import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vimd_jax.data.rand_augment import MEAN, RandAugment
from vimd_jax.errors import DatasetError

# Standard deviation of the pixels of ImageNet, in 8-bit units.
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
    if config.get("photometric"):
        image = photometric_distortion(image, rng)
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


def photometric_distortion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue, each half of the time, as MMSegmentation does (after SSD).

    Brightness by up to 32 of 255, contrast and saturation by factors from 1/2 to 3/2, hue by up to 18 half degrees.
    Contrast comes before saturation and hue or after them, as likely. After each the values are cut off to 8 bits.
    """

    def chosen() -> bool:
        return bool(rng.integers(2))

    def contrast(pixels: np.ndarray) -> np.ndarray:
        return _cut_off(pixels * rng.uniform(0.5, 1.5)) if chosen() else pixels

    pixels = np.asarray(image)
    if chosen():
        pixels = _cut_off(pixels + rng.uniform(-32, 32))
    contrast_first = chosen()
    if contrast_first:
        pixels = contrast(pixels)
    if chosen():
        hue, saturation, value = _hsv(pixels)
        pixels = _rgb(hue, _cut_off(saturation * rng.uniform(0.5, 1.5)), value)
    if chosen():
        hue, saturation, value = _hsv(pixels)
        pixels = _rgb((hue + rng.integers(-18, 18)) % 180, saturation, value)
    if not contrast_first:
        pixels = contrast(pixels)
    return Image.fromarray(pixels)


def _cut_off(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in half degrees, saturation and value from 0 to 255, all whole numbers, of RGB pixels (height, width, 3)."""
    red, green, blue = np.moveaxis(pixels / 255, -1, 0)
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    divisor = np.where(spread > 0, spread, 1)
    of_red, of_green, of_blue = (green - blue) / divisor, 2 + (blue - red) / divisor, 4 + (red - green) / divisor
    hue = np.select([value == blue, value == green], [of_blue, of_green], of_red) / 6 % 1 * (spread > 0)
    saturation = spread / np.where(value > 0, value, 1)
    return np.floor(180 * hue + 0.5).astype(int) % 180, np.floor(255 * saturation + 0.5), np.rint(255 * value)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """What `_hsv` comes from, uint8, cut off as OpenCV does."""
    saturation, value = saturation / 255, value / 255
    channels = []
    for turn in (5, 3, 1):
        place = (turn + hue / 30) % 6
        channels.append(value * (1 - saturation * np.clip(np.minimum(place, 4 - place), 0, 1)))
    return (255 * np.stack(channels, axis=-1) + 1e-6).astype(np.uint8)


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
        top, left, height, width = erased_box(pixels.shape[0], pixels.shape[1], rng, boxes)
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
