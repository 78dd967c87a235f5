"""Positions of class tokens among patches, position tables for other grids, rotary position embeddings."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

CLASS_TOKENS = ("middle", "head", "double", None)


def class_token_positions(class_token: str | None, num_patches: int) -> tuple[int, ...]:
    """Indices of the class tokens in the sequence: in the "middle", at the "head", "double" at both ends, or none."""
    return {"middle": (num_patches // 2,), "head": (0,), "double": (0, num_patches + 1), None: ()}[class_token]


def insert_tokens(patches: jax.Array, tokens: Sequence[jax.Array], positions: Sequence[int]) -> jax.Array:
    """Inserts tokens, each (batch, 1, dim), into patches (batch, patches, dim), token k at positions[k]."""
    pieces, start = [], 0
    for k, (token, position) in enumerate(zip(tokens, positions)):
        pieces += [patches[:, start : position - k], token]
        start = position - k
    return jnp.concatenate([*pieces, patches[:, start:]], axis=1)


def remove_tokens(tokens: jax.Array, positions: Sequence[int]) -> jax.Array:
    """The tokens (batch, tokens, dim) without those at `positions`, which ascend."""
    starts, ends = [0, *(position + 1 for position in positions)], [*positions, tokens.shape[1]]
    return jnp.concatenate([tokens[:, start:end] for start, end in zip(starts, ends)], axis=1)


def resize_positions(
    table: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int], class_token: str | None
) -> jax.Array:
    """Position embeddings for another grid of patches; those of class tokens move unchanged to their new positions.

    Args:
      table: (1, tokens, dim) in sequence order, for a grid of (rows, columns) patches.
      grid: the grid that the table was made for.
      new_grid: the grid wanted.
      class_token: "middle", "head", "double" or None.

    Returns:
      (1, new tokens, dim) float32.
    """
    positions = class_token_positions(class_token, grid[0] * grid[1])
    patches = jnp.einsum(
        "yi,xj,bijc->byxc",
        bicubic_matrix(grid[0], new_grid[0]),
        bicubic_matrix(grid[1], new_grid[1]),
        remove_tokens(table, positions).reshape(table.shape[0], *grid, table.shape[2]),
        precision=jax.lax.Precision.HIGHEST,
    )
    num_patches = new_grid[0] * new_grid[1]
    return insert_tokens(
        patches.reshape(table.shape[0], num_patches, table.shape[2]),
        [table[:, position, None] for position in positions],
        class_token_positions(class_token, num_patches),
    )


def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Bicubic interpolation of a row of samples as a (new_size, size) float32 matrix.

    PyTorch's kernel: cubic convolution with a = -0.75; four taps around (i + 0.5) size / new_size - 0.5, also when
    shrinking (no antialiasing); taps outside the row read its edge. `jax.image.resize` differs in all three.
    """
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((new_size, size))
    for tap in range(4):
        index = first + tap
        np.add.at(matrix, (np.arange(new_size), np.clip(index, 0, size - 1)), _cubic(np.abs(centre - index)))
    return matrix.astype(np.float32)


def _cubic(t: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, far)


def rotary_angles(grid: tuple[int, int], class_token: str | None, dim: int) -> np.ndarray:
    """Angles of rotary position embeddings in two dimensions (Su et al., "RoFormer", 2021, as Vim uses them).

    The first half of the channels rotates with a patch's row, the second with its column, each pair of channels at its
    own frequency. Positions span 14 on any grid. Class tokens are not rotated. One in the middle is an exception: as
    published, it is treated as if at the head, so that it and each patch before it get the angles of the patch before.

    Args:
      grid: (rows, columns) of patches.
      class_token: "middle", "head", "double" or None.
      dim: channels, divisible by 4.

    Returns:
      (tokens, dim) float32 radians.
    """
    frequencies = np.repeat(10000.0 ** (-np.arange(0, dim // 2, 2) / (dim // 2)), 2)
    rows, columns = (14 * np.arange(size)[:, None] / size * frequencies for size in grid)
    shape = (*grid, dim // 2)
    angles = np.concatenate(
        [np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)], axis=-1
    ).reshape(-1, dim)
    positions = class_token_positions("head" if class_token == "middle" else class_token, len(angles))
    places = [position - k for k, position in enumerate(positions)]
    return np.insert(angles, places, 0, axis=0).astype(np.float32)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotates adjacent pairs of channels (a, b) of x (..., tokens, dim) to (a cos - b sin, b cos + a sin)."""
    a, b = x[..., ::2], x[..., 1::2]
    turned = jnp.stack([-b, a], axis=-1).reshape(x.shape)
    return x * cosines + turned * sines
