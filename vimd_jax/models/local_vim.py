"""LocalVim, Vim with windowed scans (Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan",
2024, https://arxiv.org/abs/2403.09338).

Every layer scans the tokens in several directions, chosen for that layer by a search: by rows, by columns or window by
window, so that neighbours in the image are neighbours in a sequence. A gate weights the channels of each result, and
the results are summed. The search trains a network in which every layer scans in all directions, with learned weights;
the final network keeps the four directions of each layer with the largest weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.isotropic import Isotropic, Rotation, out_projection
from vimd_jax.models.layers import ChannelGate, Dense, layer_norm, portable, rms_norm, stored, uniform, uniform_fan_in
from vimd_jax.models.mamba import EXPAND, GroupedShortConv, GroupedSSM
from vimd_jax.models.network import Network
from vimd_jax.models.positions import class_token_positions, resize_positions, rotary_angles
from vimd_jax.models.scan_order import (
    PADDING,
    LayerDirections,
    ScanOrder,
    VerticalReverse,
    check_directions,
    layer_directions,
    local_scan_order,
    parse_directions,
    stack_orders,
    sum_visits,
    to_sequences,
    to_tokens,
)

# The published result of the search, for 20 layers.
SEARCHED = parse_directions("""
    h v_flip w7 w7_flip
    h_flip w2_flip w7 w7_flip
    h h_flip v w7
    h h_flip v v_flip
    h h_flip v v_flip
    h h_flip v v_flip
    h_flip v v_flip w7
    h_flip v v_flip w2_flip
    h h_flip v v_flip
    h h_flip v v_flip
    h v v_flip w2
    h v v_flip w2_flip
    h h_flip v_flip w7
    h_flip v v_flip w2
    h h_flip v v_flip
    h v w2 w2_flip
    v v_flip w2 w7
    h h_flip v w2
    h h_flip w2_flip w7
    v v_flip w2 w2_flip
""")
# The same in every layer: the paper's comparison without a search.
UNSEARCHED = (("h", "h_flip", "w2", "w2_flip"),)

# The original initialises every linear layer with this deviation, including those that Mamba initialises differently.
normal = nn.initializers.normal(0.02)


class LocalVim(Isotropic):
    """Image classifier; the options of `Isotropic`, and:

    Attributes:
      stride: see `Isotropic`; None: patch_size, as published.
      class_token: in the "middle" of the sequence, at its "head", or None.
      directions: names of the directions that each layer scans (see scan_order.py), a tuple for each layer or one for
        all; the same number in every layer. SEARCHED serves networks of up to 20 layers. None is the network of the
        search: all directions in every layer, each result normalised and weighted by a learned softmax.
      normalization: norm before layers and head, "rms" as published, or "layer" as in the authors' segmenters.
      vertical_reverse: "correct", or "published": on grids that are not square the original returns the results of
        vertical scans to the wrong tokens (see `scan_order.reverse_map`).

    Images of any size are padded with zeros to whole patches, at the bottom and on the right.
    """

    stride: int | None = None
    depth: int = 20
    class_token: Literal["middle", "head"] | None = None
    rope: bool = True
    directions: LayerDirections | None = SEARCHED
    normalization: Literal["rms", "layer"] = "rms"
    vertical_reverse: VerticalReverse = "correct"

    patch_init = staticmethod(uniform_fan_in)
    class_token_init = staticmethod(nn.initializers.zeros)

    def __post_init__(self):
        if self.stride is None:
            self.stride = self.patch_size
        super().__post_init__()
        check_directions(self.directions, self.depth, [SEARCHED])
        if self.embed_dim < 4:
            raise ValueError(f"embed_dim: {self.embed_dim} is not valid, the channel gates need at least 4")

    @property
    def patch_bias_init(self) -> nn.initializers.Initializer:
        """See `Isotropic`."""
        return uniform((3 * self.patch_size**2) ** -0.5)

    @property
    def norm_layer(self) -> Callable[..., nn.Module]:
        """See `Isotropic`."""
        return {"rms": rms_norm, "layer": layer_norm}[self.normalization]

    def make_mixer(self, grid: tuple[int, int]) -> Callable[..., nn.Module]:
        """See `Isotropic`."""
        return partial(
            Mixer,
            depth=self.depth,
            state_size=self.state_size,
            search=self.directions is None,
            moves=self.moves(grid),
            dtype=self.dtype,
        )

    def layer_inputs(self, grid: tuple[int, int]) -> ScanOrder:
        """See `Isotropic`."""
        order = stack_orders(
            [
                local_scan_order(directions, grid, self.class_token, self.vertical_reverse)
                for directions in layer_directions(self.directions, self.depth)
            ]
        )
        gathers = portable.value or self.moves(grid) or np.any(order.tokens == PADDING)
        return order if gathers else order._replace(places=None)

    @nn.nowrap
    def moves(self, grid: tuple[int, int]) -> bool:
        """Whether results of vertical scans return to other tokens than their own, see `scan_order.reverse_map`."""
        return self.vertical_reverse == "published" and grid[0] != grid[1]

    @nn.nowrap
    def grid_of(self, size: tuple[int, int], field: str = "images") -> tuple[int, int]:
        """See `Isotropic`; the last patches may extend beyond the edge."""
        if min(size) < 1:
            raise ValueError(f"{field}: (height, width) {size} is not valid, expected at least one pixel")
        return tuple(-(-max(side - self.patch_size, 0) // self.stride) + 1 for side in size)

    def prepare(self, images: jax.Array) -> jax.Array:
        """See `Isotropic`; pads images to whole patches."""
        images = super().prepare(images)
        size = images.shape[1:3]
        missing = ((n - 1) * self.stride + self.patch_size - side for n, side in zip(self.grid_of(size), size))
        return jnp.pad(images, ((0, 0), *((0, max(pixels, 0)) for pixels in missing), (0, 0)))

    def rotation(self, grid: tuple[int, int]) -> Rotation:
        """See `Isotropic`; for another grid the tables are resized, as published. Class tokens are not rotated."""
        angles = rotary_angles(self.grid, None, self.embed_dim)
        cosines, sines = (
            resize_positions(table[None], self.grid, grid, None)[0] for table in (jnp.cos(angles), jnp.sin(angles))
        )
        for token in class_token_positions(self.class_token, len(cosines)):
            cosines, sines = jnp.insert(cosines, token, 1, axis=0), jnp.insert(sines, token, 0, axis=0)
        return cosines, sines

    @staticmethod
    def decays(path: tuple[str, ...]) -> bool:
        """See `Network`; the search's weights decay too, as published."""
        return Network.decays(path) or path[-1] == "direction_weights"


class Mixer(nn.Module):
    """LocalVim's mixer: several scans of one projection, gated by z, then by a channel gate, and summed.

    Attributes:
      search: combine the directions by `DirectionWeights` instead of summing them.
      moves: results may return to other tokens than their own, see `scan_order.reverse_map`.
    """

    depth: int
    state_size: int
    search: bool
    moves: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, order: ScanOrder) -> jax.Array:
        """Maps x (batch, tokens, dim) to the same shape; `order` is that of the layer's directions."""
        dim = x.shape[-1]
        in_proj = Dense(2 * EXPAND * dim, use_bias=False, kernel_init=normal, dtype=self.dtype, name="in_proj")
        x, z = jnp.split(stored(in_proj(x)), 2, axis=-1)
        conv = GroupedShortConv(name="conv")
        ssm = GroupedSSM(
            state_size=self.state_size,
            x_proj_init=normal,
            dt_proj_init=normal,
            dt_bias_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="ssm",
        )
        if order.places is None:
            y = ssm(conv(x, order.tokens), order.tokens, z)
        else:  # what runs anywhere gathers once; padding is convolved and scanned, too; results may move
            gate = nn.silu(z.astype(jnp.float32))
            gate = to_tokens(to_sequences(gate, order), order) if self.moves else gate
            y = to_tokens(ssm(conv(to_sequences(x, order))), order) * gate
        y = ChannelGate(axes=(2,), name="gate")(y)
        y = DirectionWeights(name="search")(y) if self.search else sum_visits(y)
        return out_projection(dim, self.depth, self.dtype)(y)


class DirectionWeights(nn.Module):
    """The search's relaxation: an average of normalised results, weighted by a softmax of learned numbers."""

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """Maps y (directions, batch, tokens, channels) to (batch, tokens, channels)."""
        weights = self.param("direction_weights", nn.initializers.normal(1e-3), (len(y),), jnp.float32)
        norm = layer_norm(use_scale=False, use_bias=False, name="norm")
        return sum_visits(norm(y) * jax.nn.softmax(weights)[:, None, None, None])


MODELS = {
    "local_vim_tiny": partial(LocalVim, embed_dim=192),
    "local_vim_tiny_middle_token": partial(LocalVim, embed_dim=192, class_token="middle", rope=False),
    # The original registers two networks under this name. The second, without a search, overrides the first, which the
    # paper describes (directions=SEARCHED).
    "local_vim_small": partial(LocalVim, embed_dim=384, directions=UNSEARCHED),
    "local_vim_search": partial(LocalVim, embed_dim=128, directions=None),
}
