"""Orders of traversal of a grid of tokens, as index maps (Huang et al., "LocalMamba: Visual State Space Model with
Windowed Selective Scan", 2024, https://arxiv.org/abs/2403.09338, section 3.2).

A direction is "h" (row by row), "v" (column by column) or "w" and a number (windows of that side, row by row among the
windows and inside each); with "_flip" it is reversed. A grid that windows do not fill is padded with zero tokens at the
bottom and on the right, which are part of the sequence and scanned like the others.

Tokens are numbered row by row. The maps are NumPy arrays.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vimd_jax.models.positions import class_token_positions

Grid = tuple[int, int]  # rows, columns
LayerDirections = tuple[tuple[str, ...], ...]  # names of directions, for each layer
VerticalReverse = Literal["correct", "published"]

# The candidates of LocalMamba's search, in its order.
DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")

PADDING = -1


def check_direction(direction: str) -> None:
    """Raises ValueError unless this names a direction."""
    if not re.fullmatch(r"(h|v|w[1-9]\d*)(_flip)?", direction):
        raise ValueError(
            f'directions: {direction!r} is not valid, expected "h", "v" or "w2", "w3", …, or one + "_flip"'
        )


def check_directions(directions: LayerDirections | None, depth: int, published: Sequence[LayerDirections]) -> None:
    """Raises ValueError unless the option `directions` fits the layers; a published list may have more of them."""
    if directions is None:
        return
    if len(directions) not in (1, depth) and not (directions in published and depth < len(directions)):
        raise ValueError(f"directions: {len(directions)} for {depth} layers, expected a tuple for each or one for all")
    if len({len(names) for names in directions}) != 1 or not directions[0]:
        raise ValueError("directions: expected at least one in each layer, and the same number in all")
    for names in directions:
        for name in names:
            check_direction(name)


def layer_directions(directions: LayerDirections | None, depth: int) -> LayerDirections:
    """The directions of each layer; all directions in every layer for None."""
    directions = (DIRECTIONS,) if directions is None else directions
    return directions * depth if len(directions) == 1 else directions[:depth]


def parse_directions(text: str) -> LayerDirections:
    """The directions of each layer, from text with a line for each."""
    return tuple(tuple(line.split()) for line in text.strip().splitlines())


@functools.cache
def scan_map(direction: str, grid: Grid) -> np.ndarray:
    """The token at each position of the sequence, (length,) integers; PADDING for a zero token."""
    check_direction(direction)
    forward = direction.removesuffix("_flip")
    tokens = np.arange(grid[0] * grid[1]).reshape(grid)
    if forward == "v":
        tokens = tokens.T
    elif forward != "h":
        tokens = _windows(tokens, int(forward[1:]))
    order = tokens.reshape(-1)
    return _constant(order[::-1] if direction.endswith("_flip") else order)


def _windows(tokens: np.ndarray, side: int) -> np.ndarray:
    """Splits tokens (rows, columns) into windows (window rows, window columns, side, side)."""
    rows, columns = (-size % side for size in tokens.shape)
    tokens = np.pad(tokens, ((0, rows), (0, columns)), constant_values=PADDING)
    return tokens.reshape(len(tokens) // side, side, -1, side).swapaxes(1, 2)


@functools.cache
def reverse_map(direction: str, grid: Grid, vertical_reverse: VerticalReverse = "correct") -> np.ndarray:
    """The position in the sequence from which each token's result is read, (tokens,) integers.

    This is the token's position in `scan_map`, so that each result returns to its own token. With `vertical_reverse`
    "published" it differs on grids that are not square: the original transposes the results of "v" and "v_flip" as if
    they were in row order, which permutes the tokens. The authors' detectors were trained with that permutation.
    """
    order = scan_map(direction, grid)
    if vertical_reverse == "published" and direction.startswith("v"):
        places = np.arange(len(order)).reshape(grid).T.reshape(-1)
        return _constant(len(order) - 1 - places if direction.endswith("_flip") else places)
    places = np.empty(grid[0] * grid[1], int)
    places[order[order != PADDING]] = np.flatnonzero(order != PADDING)
    return _constant(places)


class ScanOrder(NamedTuple):
    """Index maps from tokens, numbered row by row, to sequences, and from sequences back to tokens.

    Attributes:
      tokens: (directions, length) integers, the token at each position of each direction's sequence, or PADDING for a
        zero token.
      places: (visits, tokens) integers, the positions in the flattened (directions, length) at which each token is
        visited. None: every direction visits each token once, and its results stay with their tokens.
    """

    tokens: Any
    places: Any


def local_scan_order(
    directions: Sequence[str],
    grid: Grid,
    class_token: Literal["middle", "head"] | None = None,
    vertical_reverse: VerticalReverse = "correct",
) -> ScanOrder:
    """The order of named directions, shorter ones padded at their ends; every direction visits each token once.

    A class token in the "middle" of the tokens has the same position in every sequence, padded or not, as published.
    One at the "head" comes first, or last in a flipped direction.
    """
    pairs = [_with_class_token(direction, grid, class_token, vertical_reverse) for direction in directions]
    length = max(len(tokens) for tokens, _ in pairs)
    tokens = [np.pad(tokens, (0, length - len(tokens)), constant_values=PADDING) for tokens, _ in pairs]
    places = [places + direction * length for direction, (_, places) in enumerate(pairs)]
    return ScanOrder(np.int32(np.stack(tokens)), np.int32(np.stack(places)))


def _with_class_token(direction, grid, class_token, vertical_reverse) -> tuple[np.ndarray, np.ndarray]:
    tokens, places = scan_map(direction, grid), reverse_map(direction, grid, vertical_reverse)
    for token in class_token_positions(class_token, grid[0] * grid[1]):
        place = len(tokens) if class_token == "head" and direction.endswith("_flip") else token
        tokens = np.insert(tokens + (tokens >= token), place, token)
        places = np.insert(places + (places >= place), token, place)
    return tokens, places


def scan_order_of(sequences: np.ndarray) -> ScanOrder:
    """The order of sequences (directions, length) of tokens and PADDING, which visit every token equally often."""
    visits = np.argsort(sequences, axis=None, kind="stable")[np.count_nonzero(sequences == PADDING) :]
    return ScanOrder(np.int32(sequences), np.int32(visits.reshape(sequences.max() + 1, -1).T))


def stack_orders(orders: Sequence[ScanOrder]) -> ScanOrder:
    """Stacks the orders of several blocks on a leading axis; shorter sequences are padded at their ends."""
    longest = max(order.tokens.shape[1] for order in orders)

    def pad(tokens):
        return np.pad(tokens, ((0, 0), (0, longest - tokens.shape[1])), constant_values=PADDING)

    def place(order):  # the same positions where sequences are longer
        direction, position = np.divmod(order.places, order.tokens.shape[1])
        return np.int32(direction * longest + position)

    places = None if orders[0].places is None else np.stack([place(order) for order in orders])
    return ScanOrder(np.stack([pad(order.tokens) for order in orders]), places)


def to_sequences(tokens: jax.Array, order: ScanOrder) -> jax.Array:
    """Gathers tokens (batch, tokens, channels) as sequences (directions, batch, length, channels)."""
    if order.tokens.size > order.places.size:  # padding: -1 refers to a token of zeros at the end
        tokens = jnp.pad(tokens, ((0, 0), (0, 1), (0, 0)))
    return jnp.moveaxis(tokens.at[:, order.tokens].get(mode="promise_in_bounds"), 1, 0)


def to_tokens(sequences: jax.Array, order: ScanOrder) -> jax.Array:
    """Gathers sequences (directions, batch, length, channels) by token: (visits, batch, tokens, channels)."""
    direction, position = jnp.divmod(order.places, sequences.shape[2])
    tokens = sequences.at[direction, :, position].get(mode="promise_in_bounds")  # (visits, tokens, batch, channels)
    return tokens.swapaxes(1, 2)


def sum_visits(y: jax.Array) -> jax.Array:
    """Sums (visits, batch, tokens, channels) over visits to (batch, tokens, channels)."""
    return functools.reduce(jnp.add, y)  # one loop; XLA would make a product with ones of y.sum(axis=0)


def _constant(array: np.ndarray) -> np.ndarray:
    """A read-only copy, since callers share the result of a cached function."""
    array = array.astype(np.int32)
    array.flags.writeable = False
    return array
