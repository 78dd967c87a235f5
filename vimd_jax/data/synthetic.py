"""A procedural, offline dataset of fine-grained pictures: birds of one build that differ in small markings.

Pose, size, colours and background vary freely and say nothing about the class. What does are details of a few pixels
(at 64 pixels a picture): bars on the wing, spots on the breast, bands on the tail, the beak's length, a crest, a ring
around the eye. A high-resolution picture shows them; in one a quarter the size they are blurred and partly lost.
"""

import colorsys
import dataclasses
import functools
import itertools
import math

import ml_collections
import numpy as np
from PIL import Image, ImageDraw

from vimd_jax.data.images import DatasetError

CANVAS = 256  # pictures are drawn at least this large, then averaged down: Pillow's drawing has no anti-aliasing
STREAMS = {"train": 0, "validation": 1, "test": 2}  # disjoint streams of random numbers
Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Markings:
    """The details that make a class."""

    wing_bars: int
    breast_spots: bool
    tail_bands: int
    long_beak: bool
    crest: bool
    eye_ring: bool

    def __str__(self) -> str:
        words = [f"{self.wing_bars} wing bars", f"{self.tail_bands} tail bands"]
        words.append("long beak" if self.long_beak else "short beak")
        words += [name.replace("_", " ") for name in ("breast_spots", "crest", "eye_ring") if getattr(self, name)]
        return ", ".join(words)


class SyntheticSource:
    """Pictures drawn on demand and kept in memory (3 · side² bytes each); the classes are balanced.

    A picture is a function of its split and number alone, so that all runs share one dataset, whatever their seed.
    """

    def __init__(self, config: ml_collections.ConfigDict, split: str):
        """Prepares the list; nothing is drawn yet.

        Args:
            config: `config.dataset`; read here are high_resolution (the pictures' side), synthetic_classes,
                synthetic_train_size, synthetic_test_size and validation_fraction (the validation pictures come on top
                of the training pictures, as this fraction of their number).
            split: "train", "validation" or "test".
        """
        size = config.synthetic_test_size if split == "test" else config.synthetic_train_size
        size = round(size * config.validation_fraction) if split == "validation" else size
        self._split, self._side = split, config.high_resolution
        self._markings = class_markings(config.synthetic_classes)
        self._pictures: dict[int, np.ndarray] = {}
        self.class_names = tuple(str(markings) for markings in self._markings)
        self.labels = (np.arange(size) % len(self._markings)).astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Image.Image:
        if i not in self._pictures:
            rng = np.random.default_rng((STREAMS[self._split], i))
            self._pictures[i] = np.asarray(draw_bird(self._markings[self.labels[i]], self._side, rng))
        return Image.fromarray(self._pictures[i])

    def name(self, i: int) -> str:
        return f"synthetic {self._split} picture {i}"


@functools.cache
def class_markings(count: int) -> tuple[Markings, ...]:
    """The markings of `count` classes, each chosen to differ as much as possible from those before it."""
    values = itertools.product((2, 4), (False, True), (0, 3), *[(False, True)] * 3)
    candidates = [Markings(*value) for value in values]
    if not 2 <= count <= len(candidates):
        raise DatasetError(f"config.dataset.synthetic_classes is {count}; choose 2 to {len(candidates)}")
    chosen = [candidates.pop(0)]
    while len(chosen) < count:
        chosen.append(max(candidates, key=lambda new: min(_differences(new, old) for old in chosen)))
        candidates.remove(chosen[-1])
    return tuple(chosen)


def draw_bird(markings: Markings, side: int, rng: np.random.Generator) -> Image.Image:
    """Draw one bird in a random pose before a random background.

    Args:
        markings: the class.
        side: side of the picture in pixels.
        rng: chooses everything that is not the class.

    Returns:
        An RGB picture, side × side.
    """
    factor = max(1, math.ceil(CANVAS / side))
    picture = _background(side * factor, rng)
    pen = _Pen(picture, rng)
    hue = rng.uniform()
    plumage = _colour(hue, rng.uniform(0.3, 0.8), rng.uniform(0.5, 0.8))
    dark = _colour(hue + rng.uniform(-0.08, 0.08), rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.4))
    light = _colour(rng.uniform(), 0.12, 0.95)
    breast = _colour(hue + rng.uniform(-0.1, 0.1), rng.uniform(0.1, 0.35), rng.uniform(0.8, 0.95))
    horn = _colour(rng.uniform(0.05, 0.13), rng.uniform(0.4, 0.9), rng.uniform(0.5, 0.9))
    ink = _colour(rng.uniform(), 0.4, 0.12)

    pen.strip(Strip((-1.5, -0.4), (1.5, -0.4), (0.04, 0.03, 0.04)), 0, 1, _colour(0.08, 0.4, rng.uniform(0.2, 0.5)))
    for x in (0.0, 0.12):
        pen.strip(Strip((x, -0.15), (x + 0.03, -0.38), (0.012, 0.012)), 0, 1, horn)

    tail = Strip((-0.25, 0.02), (-0.8, rng.uniform(-0.12, 0.02)), (0.06, 0.08, 0.1, 0.12))
    pen.strip(tail, 0, 1, dark)
    pen.bars(tail, markings.tail_bands, 0.4, 0.95, light)
    if markings.crest:
        pen.polygon([(0.24, 0.26), (0.16, 0.46), (0.3, 0.38), (0.3, 0.5), (0.44, 0.3)], plumage)
    beak = 0.26 if markings.long_beak else 0.1
    pen.polygon([(0.44, 0.27), (0.48 + beak, 0.18), (0.44, 0.14)], horn)
    pen.ellipse((0, 0), (0.37, 0.23), plumage)
    pen.polygon([(0, 0.2), (0.3, 0.33), (0.49, 0.15), (0.34, -0.05)], plumage)
    pen.ellipse((0.37, 0.21), (0.135, 0.135), plumage)
    pen.ellipse((0.17, -0.06), (0.18, 0.14), breast)
    if markings.breast_spots:
        for x, y in [(0.07, -0.14), (0.16, -0.15), (0.25, -0.13), (0.2, -0.06), (0.29, -0.05), (0.27, 0.02)]:
            pen.ellipse((x, y), (0.026, 0.026), ink)
    wing = Strip((0.17, 0.07), (-0.46, rng.uniform(-0.06, 0.02)), (0.04, 0.13, 0.14, 0.12, 0.09, 0.02))
    pen.strip(wing, 0, 1, dark)
    pen.bars(wing, markings.wing_bars, 0.12, 0.85, light)
    if markings.eye_ring:
        pen.ellipse((0.4, 0.24), (0.066, 0.066), light)
    pen.ellipse((0.4, 0.24), (0.036, 0.036), ink)
    return picture.reduce(factor)


@dataclasses.dataclass(frozen=True)
class Strip:
    """A band from one point to another whose half-width passes through `widths` on the way."""

    start: Point
    end: Point
    widths: tuple[float, ...]

    def outline(self, first: float, last: float) -> list[Point]:
        """The outline of the part between two shares (0…1) of the length."""
        along = np.linspace(first, last, 9)
        (x0, y0), (x1, y1) = self.start, self.end
        length = math.hypot(x1 - x0, y1 - y0)
        half = np.interp(along, np.linspace(0, 1, len(self.widths)), self.widths) / length
        x, y = x0 + along * (x1 - x0), y0 + along * (y1 - y0)
        dx, dy = half * (y1 - y0), half * (x0 - x1)
        return [*zip(x + dx, y + dy), *zip(x[::-1] - dx[::-1], y[::-1] - dy[::-1])]


class _Pen:
    """Draws in the bird's coordinates, body at the origin, beak along x, y upwards, placed at random in the picture."""

    def __init__(self, picture: Image.Image, rng: np.random.Generator):
        self._draw = ImageDraw.Draw(picture)
        angle, scale = math.radians(rng.uniform(-18, 18)), picture.width * rng.uniform(0.54, 0.62)
        mirror, squeeze = rng.choice((-1, 1)), rng.uniform(0.9, 1.1)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self._matrix = np.diag((mirror * scale, -scale)) @ rotation @ np.diag((1, squeeze))
        self._origin = picture.width * (0.5 + rng.uniform(-0.04, 0.04, 2)) + self._matrix @ (0.08, -0.05)

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self._draw.polygon([tuple(point) for point in np.array(points) @ self._matrix.T + self._origin], colour)

    def ellipse(self, centre: Point, radii: Point, colour: Colour) -> None:
        angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        self.polygon(np.stack([np.cos(angles), np.sin(angles)], 1) * radii + centre, colour)

    def strip(self, strip: Strip, first: float, last: float, colour: Colour) -> None:
        self.polygon(strip.outline(first, last), colour)

    def bars(self, strip: Strip, count: int, first: float, last: float, colour: Colour) -> None:
        """`count` bars across a strip, evenly spaced; together they cover the same area whatever their number."""
        period = (last - first) / max(count, 1)
        for start in first + period * (np.arange(count) + 0.25):
            self.strip(strip, start, start + period / 2, colour)


def _background(side: int, rng: np.random.Generator) -> Image.Image:
    """Soft patches of light and leaves of any colour."""
    patches = rng.integers(70, 190) + rng.integers(-25, 26, 3) + rng.integers(-22, 23, (4, 4, 3))
    picture = Image.fromarray(patches.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 12)):
        x, y, angle = *rng.uniform(0, side, 2), rng.uniform(0, math.pi)
        leaf = Strip((x, y), (x + side * 0.3 * math.cos(angle), y + side * 0.3 * math.sin(angle)), (0, 1, 1, 0))
        leaf = dataclasses.replace(leaf, widths=tuple(side * rng.uniform(0.01, 0.06) * w for w in (0, 1, 0.8, 0)))
        draw.polygon(leaf.outline(0, 1), _colour(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.8)))
    return picture


def _differences(one: Markings, other: Markings) -> int:
    return sum(a != b for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other)))


def _colour(hue: float, saturation: float, value: float) -> Colour:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))
