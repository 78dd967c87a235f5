"""VMamba (Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, https://arxiv.org/abs/2401.10166), in its first
published form ("v0"): every block adds to a map the outputs of selective scans along four paths through it.

The 2D selective scan `SS2D` takes the scan paths as index maps, so that LocalVMamba and EfficientVMamba can use other
paths. The stages and the head are those of hierarchical.py.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.hierarchical import Block, Hierarchical, projection
from vimd_jax.models.layers import DepthwiseConv, layer_norm
from vimd_jax.models.mamba import EXPAND, GroupedSSM, inverse_softplus_of_steps
from vimd_jax.models.scan_order import ScanOrder, stack_orders, sum_visits, to_sequences, to_tokens

# Uniform in ±1/√fan_in for each direction.
_uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)


class VMamba(Hierarchical):
    """Image classifier; its options are those of `Hierarchical`."""

    def make_block(self, stage: int, train: bool) -> partial[Block]:
        """See `Hierarchical`."""
        drops = train and self.drop_path_rate > 0
        return partial(VSSBlock, drops=drops, mixer=partial(SS2D, state_size=self.state_size, dtype=self.dtype))

    def block_inputs(self, stage: int, grid: tuple[int, int]) -> ScanOrder:
        """The scan order of each block, the same for all of them."""
        return stack_orders([cross_scan_order(grid)] * self.depths[stage])


class VSSBlock(Block):
    """x + SS2D(norm(x)), figure 3 (d) of the paper.

    Attributes:
      mixer: makes the mixer, given a name; it maps (x, `ScanOrder`) to an update.
    """

    mixer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, inputs: tuple[jax.Array, ScanOrder]) -> tuple[jax.Array, None]:
        """See `Block`."""
        drop_rate, order = inputs
        return x + self.drop(self.mixer(name="mixer")(layer_norm(name="norm")(x), order), drop_rate), None


class SS2D(nn.Module):
    """The 2D selective scan: the sum of selective scans along several paths through a map.

        u, z = split(W_in x);  y = norm(merge(SSM_k(path_k(silu(conv(u))))));  W_out (y · silu(z))

    Attributes:
      state_size: state dimension of the scan per channel.
      dtype: of the projections.
    """

    state_size: int
    dtype: Any

    expand = EXPAND  # ratio of the scans' channels to those of the map

    @nn.compact
    def __call__(self, x: jax.Array, order: ScanOrder) -> jax.Array:
        """Maps x (batch, rows, columns, dim) to the same shape."""
        dim = x.shape[-1]
        u, z = jnp.split(projection(2 * self.expand * dim, self.dtype, "in_proj")(x), 2, axis=-1)
        u = DepthwiseConv(silu=True, name="conv")(u)
        batch, rows, columns, channels = u.shape
        y = self.merge(self.scan(u.reshape(batch, rows * columns, channels), order))
        y = layer_norm(name="norm")(y).reshape(u.shape) * nn.silu(z)
        return projection(dim, self.dtype, "out_proj")(y)

    def scan(self, u: jax.Array, order: ScanOrder) -> jax.Array:
        """Scans (batch, tokens, channels) in all directions; returns (visits, batch, tokens, channels)."""
        ssm = GroupedSSM(
            state_size=self.state_size,
            x_proj_init=_uniform_fan_in,
            dt_proj_init=_uniform_fan_in,
            dt_bias_init=inverse_softplus_of_steps,
            dtype=self.dtype,
            expand=self.expand,
            name="ssm",
        )
        if order.places is None:
            return ssm(u, order.tokens)
        return to_tokens(ssm(to_sequences(u, order)), order)

    def merge(self, y: jax.Array) -> jax.Array:
        """Merges the directions' results (visits, batch, tokens, channels) into (batch, tokens, channels)."""
        return sum_visits(y.astype(jnp.float32))


@functools.cache
def cross_scan_order(grid: tuple[int, int]) -> ScanOrder:
    """`cross_scan` as a `ScanOrder`."""
    return ScanOrder(np.int32(cross_scan(grid)), None)


def cross_scan(grid: tuple[int, int]) -> np.ndarray:
    """Row by row, column by column, and both reversed: the token at each position, (4, rows * columns) integers."""
    tokens = np.arange(grid[0] * grid[1]).reshape(grid)
    forward = np.stack([tokens.reshape(-1), tokens.T.reshape(-1)])
    return np.concatenate([forward, forward[:, ::-1]])


MODELS = {
    "vmamba_tiny": partial(VMamba, dims=96, depths=(2, 2, 9, 2)),
    "vmamba_small": partial(VMamba, dims=96, depths=(2, 2, 27, 2)),
    "vmamba_base": partial(VMamba, dims=128, depths=(2, 2, 27, 2)),
}
