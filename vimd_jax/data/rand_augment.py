"""RandAugment (Cubuk et al., https://arxiv.org/abs/1909.13719): timm's, and LocalMamba's with four more operations."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vimd_jax.errors import DatasetError

# Mean of the pixels of ImageNet, in 8-bit units.
MEAN = 255 * np.array((0.485, 0.456, 0.406))


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Draws `layers` operations with replacement and applies each with probability `probability`.

    Attributes:
        operations: the set that operations are drawn from: `OPERATIONS`, `INCREASING_OPERATIONS` or `LOCAL_OPERATIONS`.
        magnitude: strength of the operations, of 10.
        layers: number of operations drawn for an image.
        noise: standard deviation of each operation's magnitude, which is then clipped to 0…`max_magnitude`.
        max_magnitude: see noise.
        probability: of each operation that is drawn.
    """

    operations: tuple["Operation", ...]
    magnitude: float = 10.0
    layers: int = 2
    noise: float = 0.0
    max_magnitude: float = 10.0
    probability: float = 0.5

    @staticmethod
    @functools.cache
    def parse(text: str) -> "RandAugment":
        """Reads timm's notation: "rand", then "-" and any of m9, n2, mstd0.5, mmax10, inc1, p0.5 in any order.

        inc1 chooses the operations of which every one grows stronger with the magnitude. "local" in place of "rand" is
        the RandAugment of LocalMamba and EfficientVMamba: 19 operations, and magnitudes without an upper limit.

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
        increasing = values.pop("increasing", False)
        if name == "local" and not increasing:
            return RandAugment(tuple(LOCAL_OPERATIONS.values()), **{"max_magnitude": math.inf} | values)
        if name != "rand":
            mistake = "LocalMamba's operations have no inc1" if name == "local" else f"it begins with {name!r}"
            raise DatasetError(_explain(text, mistake))
        operations = INCREASING_OPERATIONS if increasing else OPERATIONS
        return RandAugment(tuple(operations.values()), **values)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for i in rng.integers(len(self.operations), size=self.layers):
            if rng.random() < self.probability:
                magnitude = min(max(rng.normal(self.magnitude, self.noise), 0), self.max_magnitude)
                image = self.operations[i](image, magnitude / 10, 2 * int(rng.integers(2)) - 1)
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
        f"config.dataset.augment.rand_augment is {text!r}, but {mistake}; write rand-m9-mstd0.5-inc1, that is rand (or "
        "local, for LocalMamba's operations) and any of m (magnitude), n (operations an image), mstd (noise), mmax "
        "(largest magnitude), inc (0 or 1), p (probability)"
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
# LocalMamba's four further operations, equal to the original's to the pixel


def zoom(image: Image.Image, factor: float) -> Image.Image:
    """The image resized by a factor about its centre; outside of it black."""
    width, height = image.size
    size = max(1, round(width * factor)), max(1, round(height * factor))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))


def skew(image: Image.Image, shift: int) -> Image.Image:
    """The perspective that shows the image's corners at points `shift` pixels along its sides; outside of it black."""
    width, height = image.size
    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    seen_at = [(-shift, 0), (width, -shift), (width + shift, height), (0, height + shift)]
    coefficients = perspective(seen_at, corners)
    return image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)


def perspective(points: list[tuple[int, int]], targets: list[tuple[int, int]]) -> list[float]:
    """Coefficients of the perspective that maps four points to four targets, by a pseudo-inverse in float32.

    The corners of a skewed image are mapped exactly onto the border, so that rounding decides whether their pixels are
    black. Hence the original's order of additions: NumPy's float32 product of matrices on processors with AVX2 adds the
    terms of even and of odd number separately, with fused multiplications.
    """
    rows = []
    for (x, y), (u, v) in zip(points, targets):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    left, values, right = (part.astype(np.float32) for part in np.linalg.svd(np.array(rows, float)))
    scaled = (1 / values)[:, None] * left.T

    def chain(terms: range) -> np.ndarray:
        total = np.zeros((8, 8), np.float32)
        for k in terms:  # float64 holds a product of two float32 numbers exactly
            total = (total + np.outer(right[k].astype(float), scaled[k])).astype(np.float32)
        return total

    inverse = chain(range(0, 8, 2)) + chain(range(1, 8, 2))
    return [float(c) for c in inverse.astype(float) @ np.ravel(targets)]


def distort(image: Image.Image, shift: int) -> Image.Image:
    """Cuts the image into ⌊shift / 10⌋² tiles and moves their inner corners by `shift` pixels to the right and down."""
    count = shift // 10
    across, down = ([size // count * k for k in range(count)] + [size] for size in image.size)

    def moved(column: int, row: int) -> tuple[int, int]:
        step = shift if 0 < column < count and 0 < row < count else 0
        return across[column] + step, down[row] + step

    mesh = []
    for column, row in itertools.product(range(count), repeat=2):
        corners = ((column, row), (column, row + 1), (column + 1, row + 1), (column + 1, row))
        box = (across[column], down[row], across[column + 1], down[row + 1])
        mesh.append((box, [edge for corner in corners for edge in moved(*corner)]))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)


LOCAL_OPERATIONS: dict[str, Operation] = {
    **OPERATIONS,
    "Zoom": lambda image, strength, _: zoom(image, 0.4 * strength),
    "Skew": lambda image, strength, sign: skew(image, math.ceil(max(image.size) * (sign * 0.3 * strength))),
    "Blur": lambda image, strength, _: image.filter(ImageFilter.GaussianBlur(0.5 * strength)),
    "Distort": lambda image, strength, _: distort(image, int(10 * strength + 10)),
}
