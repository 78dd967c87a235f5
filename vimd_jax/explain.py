"""Explanations: which parts of an image the answer of a classifier comes from, by occlusion.

The image is divided into a grid of cells. The evidence of a cell is what the answer loses without it,

    e(cell) = log p(c | x) - log p(c | x with the cell in the image's mean colour),    c = the class to explain

(Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2; the logarithm as in
Robnik-Sikonja and Kononenko, "Explaining Classifications for Individual Instances", IEEE TKDE 2008). It needs only the
probabilities of a network, so it serves every family, and the student, whose super-resolution network passes on no
gradient; and it measures removal instead of deriving it from a linear approximation. An image takes rows * columns + 1
passes through the network.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Grid = tuple[int, int]
Probabilities = Callable[[np.ndarray], np.ndarray]  # (n, height, width, 3) in [0, 1] -> (n, classes)

GRID = (8, 8)
_COLOUR = (255, 64, 0)
_SMALLEST = 1e-9  # probabilities below it count as this one


def evidence(
    probabilities: Probabilities, image: np.ndarray, label: int, grid: Grid = GRID, batch_size: int = 32
) -> np.ndarray:
    """The evidence of every cell for a class, see above.

    Args:
      probabilities: of the classes, as `TrainedModel.probabilities`.
      image: as the network reads it, (height, width, 3) float32 in [0, 1].
      label: the class to explain.
      grid: (rows, columns) of cells.
      batch_size: images at a time.

    Returns:
      (rows, columns) float64 in nats; below 0 where the class is more probable without the cell.

    Raises:
      ValueError: the image has fewer pixels than the grid has cells, in a direction.
    """
    if image.shape[0] < grid[0] or image.shape[1] < grid[1]:
        raise ValueError(f"image: {image.shape[1]}x{image.shape[0]} pixels are less than a grid of {grid[::-1]} cells")
    each = np.eye(grid[0] * grid[1], dtype=bool).reshape(-1, *grid)
    groups = (each[first : first + batch_size] for first in range(0, len(each), batch_size))
    left = [probabilities(np.stack([without(image, cell) for cell in group]))[:, label] for group in groups]
    whole, left = probabilities(image[None])[0, label], np.concatenate(left)
    return (np.log(max(whole, _SMALLEST)) - np.log(np.maximum(left, _SMALLEST))).reshape(grid)


def without(image: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The image (height, width, 3) with cells (rows, columns) bool in its mean colour."""
    return np.where(covered(cells, image.shape[:2])[..., None], image.mean(axis=(0, 1)), image).astype(image.dtype)


def strongest(values: np.ndarray, share: float = 0.1) -> np.ndarray:
    """The cells with the most evidence, a share of all of them (at least one), as booleans of the same shape."""
    count = max(1, round(share * values.size))
    chosen = np.zeros(values.size, bool)
    chosen[np.argsort(-values, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(values.shape)


def draw(image: np.ndarray, values: np.ndarray, side: int = 336) -> Image.Image:
    """The image, and beside it the same with its evidence in red and the strongest tenth of the cells framed.

    Args:
      image: as the network reads it, (height, width, 3) in [0, 1].
      values: evidence (rows, columns).
      side: height in pixels of the picture; a small image is shown pixel by pixel.
    """
    size = (round(side * image.shape[1] / image.shape[0]), side)
    plain = Image.fromarray((255 * image).round().astype(np.uint8))
    plain = plain.resize(size, Image.Resampling.NEAREST if side > image.shape[0] else Image.Resampling.BICUBIC)
    strength = np.clip(values / max(values.max(), _SMALLEST), 0, 1)
    strength = Image.fromarray((200 * strength).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    grey = plain.convert("L").convert("RGB")
    marked = Image.composite(Image.new("RGB", size, _COLOUR), grey, strength)
    _frame(marked, strongest(values))
    both = Image.new("RGB", (2 * size[0] + 8, side), "white")
    both.paste(plain, (0, 0))
    both.paste(marked, (size[0] + 8, 0))
    return both


def _frame(picture: Image.Image, cells: np.ndarray) -> None:
    """Draws a line around each of the cells."""
    pen = ImageDraw.Draw(picture)
    rows, columns = (_edges(count, side) for count, side in zip(cells.shape, (picture.height, picture.width)))
    for row, column in zip(*np.nonzero(cells)):
        box = (columns[column], rows[row], columns[column + 1] - 1, rows[row + 1] - 1)
        pen.rectangle([int(x) for x in box], outline="white", width=2)


def _edges(count: int, side: int) -> np.ndarray:
    """The first pixel of each of `count` cells along a side, and the end of the last one."""
    return np.linspace(0, side, count + 1).round().astype(int)


def covered(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels (height, width) that cells (rows, columns) cover, both bool."""
    for axis, side in enumerate(size):
        cells = np.repeat(cells, np.diff(_edges(cells.shape[axis], side)), axis=axis)
    return cells
