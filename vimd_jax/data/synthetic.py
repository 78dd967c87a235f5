"""Synthetic bird images: every bird has the same shape, and the classes differ in small markings.

Pose, size, colours and background vary freely and say nothing about the class. The class is given by the pattern of the
wing, bands on the tail, spots on the breast, the length of the beak and a ring around the eye. The patterns are a few
pixels fine, whatever the image size, and cover about the same area, so that most of them blur to the same grey when the
image is scaled to a quarter of its size.
"""

import colorsys
import dataclasses
import itertools
import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from vimd_jax.data.geometry import pair
from vimd_jax.data.images import Reduction
from vimd_jax.data.source import SPLITS, Record, Source
from vimd_jax.errors import DatasetError

Point = tuple[float, float]
Colour = tuple[int, int, int]

WINGS = ("barred", "finely barred", "streaked", "spotted")
CANVAS = 256  # images are drawn at least this large and then averaged down, since Pillow draws without anti-aliasing


@dataclasses.dataclass(frozen=True)
class Markings:
    """The details that make a class."""

    wing: str
    banded_tail: bool
    spotted_breast: bool
    long_beak: bool
    ringed_eye: bool

    @property
    def crested(self) -> bool:
        """Depends on the wing. A crest is still visible in small images, which thus reveal a part of the class."""
        return self.wing in ("streaked", "spotted")

    def __str__(self) -> str:
        others = [field.name.replace("_", " ") for field in dataclasses.fields(self)[1:] if getattr(self, field.name)]
        return ", ".join([f"{self.wing} wing", *others])


def class_markings(count: int) -> list[Markings]:
    """The markings of `count` classes: the wing changes from class to class, each other detail half as often."""
    values = itertools.product(*[(False, True)] * 4, WINGS)
    markings = [Markings(*value[::-1]) for value in values]
    if not 2 <= count <= len(markings):
        raise DatasetError(f"config.dataset.synthetic_classes is {count}; choose 2 to {len(markings)}")
    return markings[:count]


def draw_bird(markings: Markings, side: int, rng: np.random.Generator) -> Image.Image:
    """Draws one bird in a random pose in front of a random background.

    Args:
        markings: the class.
        side: side of the image in pixels.
        rng: determines everything but the class.

    Returns:
        An RGB image, side × side.
    """
    factor = max(2, math.ceil(CANVAS / side))
    image = _background(side * factor, rng)
    pen = _Pen(image, side / 64, rng)
    hue = rng.uniform()
    plumage = _colour(hue, rng.uniform(0.3, 0.8), rng.uniform(0.5, 0.8))
    dark = _colour(hue + rng.uniform(-0.08, 0.08), rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.4))
    light = _colour(rng.uniform(), 0.12, 0.95)
    breast = _colour(hue + rng.uniform(-0.1, 0.1), rng.uniform(0.1, 0.35), rng.uniform(0.6, 0.95))
    horn = _colour(rng.uniform(0.05, 0.13), rng.uniform(0.4, 0.9), rng.uniform(0.5, 0.9))
    ink = _colour(rng.uniform(), 0.4, 0.12)

    perch = Strip((-1.5, -0.4), (1.5, -0.4), (0.04, 0.03, 0.04))
    pen.polygon(perch.outline(), _colour(0.08, 0.4, rng.uniform(0.2, 0.5)))
    for x in (0.0, 0.12):
        pen.polygon(Strip((x, -0.15), (x + 0.03, -0.38), (0.012, 0.012)).outline(), horn)

    tail = Strip((-0.25, 0.02), (-0.8, rng.uniform(-0.12, 0.02)), (0.06, 0.08, 0.1, 0.12))
    shade = rng.uniform(0, 0.7)  # a plain tail is as bright as a banded one, on average
    pen.polygon(tail.outline(), dark if markings.banded_tail else _mix(dark, light, shade))
    if markings.banded_tail:
        pen.bars(tail, 3, light)
    if markings.crested:
        pen.polygon([(0.24, 0.26), (0.16, 0.46), (0.3, 0.38), (0.3, 0.5), (0.44, 0.3)], plumage)
    beak = 0.26 if markings.long_beak else 0.1
    pen.polygon([(0.44, 0.27), (0.48 + beak, 0.18), (0.44, 0.14)], horn)
    pen.ellipse((0, 0), (0.4, 0.26), plumage)
    pen.polygon([(0, 0.2), (0.3, 0.33), (0.49, 0.15), (0.34, -0.05)], plumage)
    pen.ellipse((0.37, 0.21), (0.135, 0.135), plumage)
    chest = Strip((0.35, -0.01), (0.04, -0.13), (0.08, 0.13, 0.13, 0.1))
    pen.polygon(chest.outline(), breast)
    if markings.spotted_breast:
        pen.spots(chest, 4, 3, ink)
    wing = Strip((0.22, 0.06), (-0.52, rng.uniform(-0.06, 0.02)), (0.06, 0.16, 0.18, 0.16, 0.11, 0.03))
    pen.polygon(wing.outline(), dark)
    if markings.wing == "spotted":
        pen.spots(wing, 5, 2, light)
    elif markings.wing == "streaked":
        pen.streaks(wing, 2, light)
    else:
        pen.bars(wing, 2 if markings.wing == "barred" else 4, light)
    if markings.ringed_eye:
        pen.ellipse((0.4, 0.24), (0.066, 0.066), light)
    pen.ellipse((0.4, 0.24), (0.036, 0.036), ink)
    return image.reduce(factor)


@dataclasses.dataclass(frozen=True)
class Strip:
    """A band from one point to another whose half-width passes through `widths` on the way."""

    start: Point
    end: Point
    widths: tuple[float, ...]

    def point(self, along: float, across: float) -> Point:
        """The point at a fraction (0…1) of the length and a fraction (-1…1) of the half-width."""
        (x0, y0), (x1, y1) = self.start, self.end
        stations = np.linspace(0, 1, len(self.widths))
        half = across * np.interp(along, stations, self.widths) / math.dist(self.start, self.end)
        return x0 + along * (x1 - x0) - half * (y1 - y0), y0 + along * (y1 - y0) + half * (x1 - x0)

    def outline(self, first: float = 0, last: float = 1, low: float = -1, high: float = 1) -> list[Point]:
        """The outline of the part between two fractions of the length and two of the half-width."""
        along = np.linspace(first, last, 9)
        return [*zip(*self.point(along, high)), *zip(*self.point(along[::-1], low))]


class _Pen:
    """Draws in the bird's coordinates (body at the origin, beak along x, y upwards), placed at random in the image."""

    def __init__(self, image: Image.Image, fineness: float, rng: np.random.Generator):
        self._draw, self._fineness = ImageDraw.Draw(image), fineness
        angle, scale = math.radians(rng.uniform(-18, 18)), image.width * rng.uniform(0.54, 0.62)
        mirror, squeeze = rng.choice((-1, 1)), rng.uniform(0.9, 1.1)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self._matrix = np.diag((mirror * scale, -scale)) @ rotation @ np.diag((1, squeeze))
        self._origin = image.width * (0.5 + rng.uniform(-0.04, 0.04, 2)) + self._matrix @ (0.08, -0.05)

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self._draw.polygon([tuple(point) for point in np.array(points) @ self._matrix.T + self._origin], colour)

    def ellipse(self, centre: Point, radii: Point, colour: Colour) -> None:
        angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        self.polygon(np.stack([np.cos(angles), np.sin(angles)], 1) * radii + centre, colour)

    def bars(self, strip: Strip, count: int, colour: Colour) -> None:
        for first, last in self._intervals(count):
            self.polygon(strip.outline(first, last), colour)

    def streaks(self, strip: Strip, count: int, colour: Colour) -> None:
        for low, high in self._intervals(count):
            self.polygon(strip.outline(0.02, 0.98, 2 * low - 1, 2 * high - 1), colour)

    def spots(self, strip: Strip, columns: int, rows: int, colour: Colour) -> None:
        radius = 0.4 * math.dist(strip.start, strip.end) / (columns * self._fineness)
        for along, across in itertools.product(self._intervals(columns), self._intervals(rows)):
            self.ellipse(strip.point(along.mean(), 2 * across.mean() - 1), (radius, radius), colour)

    def _intervals(self, count: int) -> np.ndarray:
        """Evenly spaced intervals that cover half of 0…1: `count` in 64-pixel images, more in larger ones."""
        count = max(1, round(count * self._fineness))
        return (np.arange(count)[:, None] + (0.25, 0.75)) / count


def _background(side: int, rng: np.random.Generator) -> Image.Image:
    """Soft patches of light and leaves of any colour."""
    patches = rng.integers(70, 190) + rng.integers(-25, 26, 3) + rng.integers(-22, 23, (4, 4, 3))
    image = Image.fromarray(patches.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 12)):
        x, y, angle = *rng.uniform(0, side, 2), rng.uniform(0, math.pi)
        tip = (x + side * 0.3 * math.cos(angle), y + side * 0.3 * math.sin(angle))
        leaf = Strip((x, y), tip, tuple(side * rng.uniform(0.01, 0.06) * width for width in (0, 1, 0.8, 0)))
        draw.polygon(leaf.outline(), _colour(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.8)))
    return image


def _mix(one: Colour, other: Colour, fraction: float) -> Colour:
    return tuple(round(a + fraction * (b - a)) for a, b in zip(one, other))


def _colour(hue: float, saturation: float, value: float) -> Colour:
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue % 1, saturation, value))


class SyntheticSource(Source):
    """Birds drawn on demand and kept in memory (3 · side² bytes each); the classes are balanced.

    An image depends only on its split and index, so that all runs share one dataset, whatever their seed.
    """

    def __init__(self, config: ConfigDict, split: str):
        """Prepares the labels; nothing is drawn yet.

        Args:
            config: `config.dataset`; reads high_resolution (whose longer side is that of the images),
                synthetic_classes, synthetic_train_size, synthetic_test_size and validation_fraction (of
                synthetic_train_size: the number of validation images, which are additional to the training images).
            split: "train", "validation" or "test".
        """
        size = config.synthetic_test_size if split == "test" else config.synthetic_train_size
        size = round(size * config.validation_fraction) if split == "validation" else size
        self._split, self._side = split, max(pair(config.high_resolution))
        self._markings = class_markings(config.synthetic_classes)
        self._images: dict[int, np.ndarray] = {}
        self.class_names = tuple(map(str, self._markings))
        self.labels = (np.arange(size) % len(self._markings)).astype(np.int32)

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        if i not in self._images:
            rng = np.random.default_rng((SPLITS.index(self._split), i))  # the splits share no image
            self._images[i] = np.asarray(draw_bird(self._markings[self.labels[i]], self._side, rng))
        return Record(Image.fromarray(self._images[i]), int(self.labels[i]))

    def name(self, i: int) -> str:
        return f"synthetic {self._split} image {i}"


def load(config: ConfigDict, split: str, seed: int) -> Source:
    """A split of the synthetic birds, which are the same for every seed: see `load_source`."""
    return SyntheticSource(config, split)
