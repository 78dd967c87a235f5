"""V2M, the classifier with a two-dimensional state-space model (Wang et al., "V2M: Visual 2-Dimensional Mamba for Image
Representation Learning", 2024, https://arxiv.org/abs/2410.10382, equations 13 to 15).

Patches stay a grid. A Roesser model in which the horizontal state feeds the vertical one, but not the reverse, amounts
to two passes of independent scans: one along every line of the grid, then one across the lines, over the output of the
first. Four views of the grid, one from each corner, go through the same two passes; their sum is the layer's update.
There is no class token: the head reads the mean of the tokens (see isotropic.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels import selective_scan
from vimd_jax.models.isotropic import Isotropic, out_projection
from vimd_jax.models.layers import Dense, stored, uniform_fan_in
from vimd_jax.models.mamba import (
    EXPAND,
    DeltaProjection,
    ShortConv,
    delta_rank,
    inverse_softplus_of_steps,
    state_matrix,
)


class V2M(Isotropic):
    """Image classifier; the options of `Isotropic`, and:

    Attributes:
      class_token: None; the published networks have none.
      merge: "mean" divides the sum of the four views by two, as published; "sum" does not.
      routing: the four views, and the patches that their outputs go to.
        "four_corners", as in the paper: one view from each corner, every output at its own patch.
        "aligned": the views of the authors' code (two from the top left, one from the top right, one from the bottom
        left), every output at its own patch.
        "published": exactly the authors' code, for weights trained with it. The views are those of "aligned", but
        outputs end up at the transposed or mirrored patch, so the grid must be square.
    """

    class_token: None = None
    merge: Literal["mean", "sum"] = "mean"
    routing: Literal["four_corners", "aligned", "published"] = "four_corners"

    @nn.nowrap
    def grid_of(self, size: tuple[int, int], field: str = "images") -> tuple[int, int]:
        """See `Isotropic`; ValueError too if `routing` cannot route the grid."""
        rows, columns = super().grid_of(size, field)
        if self.routing == "published" and rows != columns:
            raise ValueError(
                f'routing: "published" needs a square grid of patches, {field} {size} have {rows} x {columns}; '
                'choose "aligned" or "four_corners"'
            )
        return rows, columns

    def make_mixer(self, grid: tuple[int, int]) -> Callable[..., nn.Module]:
        """See `Isotropic`."""
        return partial(
            Mixer,
            depth=self.depth,
            state_size=self.state_size,
            grid=grid,
            merge=self.merge,
            routing=self.routing,
            dtype=self.dtype,
        )


class View(NamedTuple):
    """Directions of the two passes through the grid.

    Attributes:
      columns: the lines are the columns of the grid, not its rows.
      back: the first pass runs from the end of each line to its start.
      up: the second pass runs from the last line to the first.
    """

    columns: bool
    back: bool
    up: bool


# The grid rotated counter-clockwise by 0, 90, 180 and 270 degrees; each view starts from the corner that is then at the
# top left.
FOUR_CORNERS = (View(False, False, False), View(True, False, True), View(False, True, True), View(True, True, False))
# In the authors' code the second pass never runs backwards, so that no view starts at the bottom right.
AUTHORS = (View(False, False, False), View(True, False, False), View(False, True, False), View(True, True, False))


class Mixer(nn.Module):
    """V2M's mixer: the views share all parameters, and the gate is applied after each of the two passes."""

    depth: int
    state_size: int
    grid: tuple[int, int]
    merge: str
    routing: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, inputs: None = None) -> jax.Array:
        """Maps x (batch, tokens, dim), with tokens in row order, to the same shape."""
        batch, tokens, dim = x.shape
        channels = EXPAND * dim
        in_proj = Dense(2 * channels, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype, name="in_proj")
        x, z = jnp.split(stored(in_proj(x)).reshape(batch, *self.grid, 2 * channels), 2, axis=-1)
        y = self.scan(x, z)
        y = (y / 2 if self.merge == "mean" else y).reshape(batch, tokens, channels)
        return out_projection(dim, self.depth, self.dtype)(y)

    def scan(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Sums the four views: maps x and the gate z, both (batch, rows, columns, channels), to the same shape."""
        line_pass = partial(LinePass, state_size=self.state_size, dtype=self.dtype)
        along = line_pass(selective="B", delta_bias_init=inverse_softplus_of_steps, name="along")
        # The second bias is initialised to 0: a step size of 0.69, against 0.001 to 0.1 in the first pass. This is an
        # oversight of the original, with which its results were obtained.
        across = line_pass(selective="C", delta_bias_init=nn.initializers.zeros, name="across")

        gate = nn.silu(z.astype(jnp.float32))  # once for all eight scans

        def output(view: View) -> jax.Array:
            turn = _transpose if view.columns else _keep
            y = (along(turn(x), view.back) * turn(gate)).astype(x.dtype)
            y = turn(_transpose(across(_transpose(y), view.up)))
            return (y * gate).astype(x.dtype)

        if self.routing == "four_corners":
            return sum(map(output, FOUR_CORNERS))
        rows, columns, rows_back, columns_back = map(output, AUTHORS)
        if self.routing == "aligned":
            return rows + columns + rows_back + columns_back
        return _transpose(rows + columns + rows_back[:, ::-1] + columns_back[:, :, ::-1])


class LinePass(nn.Module):
    """Independent selective scans of all lines of a grid: short convolution, projections, scan.

    One of the matrices B and C depends on the token; the other is all ones.

    Attributes:
      state_size: state dimension of the scan per channel.
      selective: the matrix that depends on the token, "B" or "C".
      delta_bias_init: initialiser of the bias of the step sizes.
      dtype: of the projections.
    """

    state_size: int
    selective: str
    delta_bias_init: nn.initializers.Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, reverse: bool) -> jax.Array:
        """Maps x (batch, lines, length, channels) to the same shape."""
        batch, lines, length, channels = shape = x.shape
        u = ShortConv(reverse, name="conv")(x.reshape(batch * lines, length, channels))
        rank = delta_rank(channels)
        x_proj = Dense(
            rank + self.state_size, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype, name="x_proj"
        )
        code, matrix = jnp.split(stored(x_proj(u)), [rank], axis=-1)
        delta, delta_bias = DeltaProjection(channels, self.delta_bias_init, name="dt_proj")(code)
        A = state_matrix(self, "A_log", channels, self.state_size)
        ones = jnp.ones_like(matrix)  # not a constant in time, whose vectors take the native scan longer to read
        B, C = (matrix, ones) if self.selective == "B" else (ones, matrix)
        D = self.param("D", nn.initializers.ones, (channels,), jnp.float32)
        y = selective_scan(u, delta, A, B, C, D=D, delta_bias=delta_bias, delta_softplus=True, reverse=reverse)
        return y.reshape(shape)


def _keep(x: jax.Array) -> jax.Array:
    return x


def _transpose(x: jax.Array) -> jax.Array:
    """Transposes (batch, rows, columns, channels) to (batch, columns, rows, channels)."""
    return x.swapaxes(1, 2)


MODELS = {"v2m_tiny": partial(V2M, embed_dim=192), "v2m_small": partial(V2M, embed_dim=384)}
