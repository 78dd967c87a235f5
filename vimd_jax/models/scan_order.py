"""Ways through a grid of tokens, as index maps (Huang et al., "LocalMamba: Visual State Space Model with Windowed
Selective Scan", 2024, https://arxiv.org/abs/2403.09338, section 3.2).

A direction is "h" (row by row), "v" (column by column) or "w" and a number (window by window of that side, row by row
among the windows and inside each); with "_flip" the same way from its end. A grid that windows do not fill is padded
with zero tokens at the bottom and on the right. They belong to the sequence and are scanned like the others.

Tokens count row by row. The maps are NumPy arrays, computed once for a grid.
"""

import functools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vimd_jax.models.positions import class_token_positions

Grid = tuple[int, int]  # rows, columns
VerticalReverse = Literal["correct", "published"]

# All that LocalMamba's search chooses from, in its order.
DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")

PADDING = -1


def check_direction(direction: str) -> None:
    """Raises ValueError unless this is the name of a direction."""
    if not re.fullmatch(r"(h|v|w[1-9]\d*)(_flip)?", direction):
        raise ValueError(
            f'directions: {direction!r} is not valid, expected "h", "v" or "w2", "w3", …, or one + "_flip"'
        )


@functools.cache
def scan_order(direction: str, grid: Grid) -> np.ndarray:
    """The token at each place of the sequence, (length,) integers; PADDING where a zero token is scanned."""
    check_direction(direction)
    way = direction.removesuffix("_flip")
    tokens = np.arange(grid[0] * grid[1]).reshape(grid)
    if way == "v":
        tokens = tokens.T
    elif way != "h":
        tokens = _windows(tokens, int(way[1:]))
    order = tokens.reshape(-1)
    return _constant(order[::-1] if direction.endswith("_flip") else order)


def _windows(tokens: np.ndarray, side: int) -> np.ndarray:
    """(rows, columns) to (window rows, window columns, side, side)."""
    rows, columns = (-size % side for size in tokens.shape)
    tokens = np.pad(tokens, ((0, rows), (0, columns)), constant_values=PADDING)
    return tokens.reshape(len(tokens) // side, side, -1, side).swapaxes(1, 2)


@functools.cache
def scan_places(direction: str, grid: Grid, vertical_reverse: VerticalReverse = "correct") -> np.ndarray:
    """The place in the sequence that each token's result is read from, (tokens,) integers.

    That is where `scan_order` put the token, so that results return to where they belong. With `vertical_reverse`
    "published" it is not on grids that are not square: the original transposes the results of "v" and "v_flip" as if
    they stood row by row, which mixes up the tokens. Detectors that the authors trained have learned to live with it.
    """
    order = scan_order(direction, grid)
    if vertical_reverse == "published" and direction.startswith("v"):
        places = np.arange(len(order)).reshape(grid).T.reshape(-1)
        return _constant(len(order) - 1 - places if direction.endswith("_flip") else places)
    places = np.empty(grid[0] * grid[1], int)
    places[order[order != PADDING]] = np.flatnonzero(order != PADDING)
    return _constant(places)


class ScanMaps(NamedTuple):
    """The directions of a layer, or with a leading axis those of each layer of a network.

    Attributes:
      order: (length, directions), the token at each place of each sequence, or PADDING.
      places: (tokens, directions), the place that each token's result is read from.
    """

    order: np.ndarray
    places: np.ndarray


def scan_maps(
    layers: Sequence[Sequence[str]],
    grid: Grid,
    class_token: Literal["middle", "head"] | None = None,
    vertical_reverse: VerticalReverse = "correct",
) -> ScanMaps:
    """The maps of layers that have equally many directions, stacked; all sequences padded at their ends to one length.

    A class token in the "middle" of the tokens is scanned at just that place of every sequence, padded or not, as
    published. One at the "head" comes first, or last where a direction is flipped.
    """
    pairs = [[_with_class_token(name, grid, class_token, vertical_reverse) for name in names] for names in layers]
    length = max(len(order) for layer in pairs for order, _ in layer)

    def padded(order: np.ndarray) -> np.ndarray:
        return np.pad(order, (0, length - len(order)), constant_values=PADDING)

    return ScanMaps(
        np.stack([np.stack([padded(order) for order, _ in layer], axis=-1) for layer in pairs]),
        np.stack([np.stack([places for _, places in layer], axis=-1) for layer in pairs]),
    )


def _with_class_token(direction, grid, class_token, vertical_reverse) -> tuple[np.ndarray, np.ndarray]:
    order, places = scan_order(direction, grid), scan_places(direction, grid, vertical_reverse)
    for token in class_token_positions(class_token, grid[0] * grid[1]):
        place = len(order) if class_token == "head" and direction.endswith("_flip") else token
        order = np.insert(order + (order >= token), place, token)
        places = np.insert(places + (places >= place), token, place)
    return order, places


def to_sequences(tokens: jax.Array, order: jax.Array) -> jax.Array:
    """(batch, tokens, channels) along each direction: (batch, length, directions, channels), zero where padded."""
    tokens = jnp.pad(tokens, ((0, 0), (0, 1), (0, 0)))  # PADDING counts from the end: the zero token
    return tokens.at[:, order].get(mode="promise_in_bounds")


def to_tokens(sequences: jax.Array, places: jax.Array) -> jax.Array:
    """(batch, length, directions, channels) back in the order of the tokens: (batch, tokens, directions, channels)."""
    batch, length, directions, channels = sequences.shape
    rows = sequences.reshape(batch, length * directions, channels)
    return rows.at[:, places * directions + jnp.arange(directions)].get(mode="promise_in_bounds")


def _constant(array: np.ndarray) -> np.ndarray:
    """A copy that nobody can change: what a cached function returns is shared by its callers."""
    array = array.astype(np.int32)
    array.flags.writeable = False
    return array
