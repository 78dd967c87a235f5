"""Resampling of maps for dense heads: bilinear resizing and adaptive average pooling.

Both follow PyTorch, so that heads trained there give the same results at any size, odd ones included.
"""

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear interpolation between pixel centres; beyond the border, the map repeats its edge.

    Shrinking also reads two neighbours only (no antialiasing).

    Args:
      x: (batch, rows, columns, channels) floats.
      size: the (rows, columns) wanted.

    Returns:
      (batch, *size, channels); x itself where it has that size.
    """
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)


def resize_into(x: jax.Array, size: jax.Array, canvas: tuple[int, int]) -> jax.Array:
    """`resize_bilinear` of one map to a size that is known only when it runs, so that it compiles once for many.

    Args:
      x: (rows, columns, channels) floats.
      size: the (rows, columns) wanted, int32 (2,).
      canvas: rows and columns of the result, at least `size`.

    Returns:
      (*canvas, channels); what lies outside of `size` repeats its border.
    """
    for axis in (0, 1):
        side = x.shape[axis]
        position = (jnp.arange(canvas[axis]) + 0.5) * (side / size[axis]) - 0.5
        position = jnp.clip(position, 0, side - 1)
        first = jnp.floor(position).astype(jnp.int32)
        share = (position - first).reshape([-1 if i == axis else 1 for i in range(3)]).astype(x.dtype)
        after = jnp.take(x, jnp.minimum(first + 1, side - 1), axis)
        x = jnp.take(x, first, axis) * (1 - share) + after * share
    return x


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """Averages over bins × bins windows that cover a map evenly; they overlap unless `bins` divides its sides.

    Args:
      x: (batch, rows, columns, channels) floats. A side may be shorter than `bins`.
      bins: number of windows along each side.

    Returns:
      (batch, bins, bins, channels).
    """
    rows, columns = (_averages(side, bins) for side in x.shape[1:3])
    return jnp.einsum("yi,xj,bijc->byxc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)


def _averages(side: int, bins: int) -> np.ndarray:
    """The windows along one side as a (bins, side) float32 matrix: from ⌊k·side/bins⌋ to below ⌈(k+1)·side/bins⌉."""
    matrix = np.zeros((bins, side), np.float32)
    for k in range(bins):
        start, stop = k * side // bins, -(-(k + 1) * side // bins)
        matrix[k, start:stop] = 1 / (stop - start)
    return matrix
