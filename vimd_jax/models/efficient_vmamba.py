"""EfficientVMamba (Pei et al., "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", AAAI 2025,
https://arxiv.org/abs/2403.09977): two stages of selective scans at the high resolutions, then two of convolutions.

A scanning block (EVSS, figure 3) adds the outputs of two branches: an atrous selective scan, whose four sequences split
the tokens among them instead of each visiting all of them, and a depthwise convolution. Where paper and published code
differ, this follows the code: both branches share one channel gate, which has a norm, and there is no MLP.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.hierarchical import Block, Hierarchical
from vimd_jax.models.layers import BatchNorm, ChannelGate, Dense, DepthwiseConv, layer_norm, uniform, uniform_fan_in
from vimd_jax.models.scan_order import PADDING, ScanOrder, scan_order_of, stack_orders
from vimd_jax.models.vmamba import SS2D

SCANNING_STAGES = 2  # the first two; the others convolve
EXPANSION = 4  # ratio of an inverted residual block's hidden channels to those of the map


class EfficientVMamba(Hierarchical):
    """Image classifier; the options of `Hierarchical`, and:

    Attributes:
      mlp_ratio: ratio of the hidden channels of an MLP after every scanning block to the map's channels; 0 (as
        published): no MLP.
      downsample: between stages, "merge" patches (as published) or apply a 2×2 "conv" with stride 2 and a norm.
      bn_axis_name: axis of devices (pmap, shard_map) across which training batches are normalised together; None: each
        device normalises its own.
    """

    mlp_ratio: float = 0.0
    downsample: Literal["merge", "conv"] = "merge"
    bn_axis_name: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if min(self.widths) < 8:
            raise ValueError(f"dims: {self.dims} is not valid, a channel gate needs at least 8 channels in each stage")
        if self.mlp_ratio < 0 or self.mlp_ratio and min(self.widths) * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} is not valid, expected 0, or enough for one hidden channel")

    def make_block(self, stage: int, train: bool) -> partial[Block]:
        """See `Hierarchical`."""
        norm = partial(BatchNorm, train=train, axis_name=self.bn_axis_name)
        drops = train and self.drop_path_rate > 0
        if stage >= SCANNING_STAGES:
            return partial(InvertedResidual, drops=drops, batch_norm=norm, dtype=self.dtype)
        mixer = partial(SS2D, state_size=self.state_size, dtype=self.dtype)
        return partial(EVSSBlock, drops=drops, mixer=mixer, batch_norm=norm, mlp_ratio=self.mlp_ratio, dtype=self.dtype)

    def block_inputs(self, stage: int, grid: tuple[int, int]) -> ScanOrder | None:
        """The scan order of each scanning block, the same for all of them."""
        if stage >= SCANNING_STAGES:
            return None
        return stack_orders([atrous_scan_order(grid)] * self.depths[stage])

    def make_downsampling(self, stage: int) -> nn.Module:
        """See `Hierarchical`."""
        if self.downsample == "merge":
            return super().make_downsampling(stage)
        return Downsampling(dim=self.widths[stage + 1], dtype=self.dtype, name=f"downsample_{stage}")


class EVSSBlock(Block):
    """x + gate(SS2D(t)) + gate(conv(t)) with t = norm(x); then an MLP, if any.

    Attributes:
      mixer: makes the 2D selective scan, given a name.
      batch_norm: makes a batch norm, given a name.
      mlp_ratio: ratio of the MLP's hidden channels to those of the map; 0 for no MLP.
      dtype: of the convolutions and the MLP.
    """

    mixer: Callable[..., nn.Module]
    batch_norm: Callable[..., nn.Module]
    mlp_ratio: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, inputs: tuple[jax.Array, ScanOrder]) -> tuple[jax.Array, None]:
        """See `Block`."""
        drop_rate, order = inputs
        normalized = layer_norm(name="norm")(x)
        gate = ChannelGate(axes=(1, 2), name="gate")
        scanned = gate(self.mixer(name="mixer")(normalized, order))
        x = x + self.drop(scanned + gate(self.convolve(normalized)), drop_rate)
        if self.mlp_ratio:
            x = x + self.drop(self.mlp(x, self.mlp_ratio, self.dtype), drop_rate)
        return x, None

    def convolve(self, x: jax.Array) -> jax.Array:
        """A depthwise convolution, a batch norm, GELU and a pointwise convolution."""
        x = DepthwiseConv(name="conv")(x.astype(self.dtype))
        x = nn.gelu(self.batch_norm(name="conv_norm")(x.astype(jnp.float32)), approximate=False)
        return _pointwise(x.shape[-1], x.shape[-1], self.dtype, "conv_out")(x)


class InvertedResidual(Block):
    """x + W_2 se(relu(depthwise(relu(W_1 x)))), with a batch norm after every convolution (MobileNetV2, 2018).

    se is squeeze-and-excitation (Hu et al., 2018): each channel is scaled by a function of all channels' averages.

    Attributes:
      batch_norm: makes a batch norm, given a name.
      dtype: of the convolutions.
    """

    batch_norm: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, inputs: tuple[jax.Array, None]) -> tuple[jax.Array, None]:
        """See `Block`."""
        drop_rate, _ = inputs
        dim = x.shape[-1]
        pointwise = partial(Dense, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype)
        y = nn.relu(self.normalize("expand", pointwise(EXPANSION * dim, name="expand")(x))).astype(self.dtype)
        y = nn.relu(self.normalize("depthwise", DepthwiseConv(use_bias=False, name="depthwise")(y)))
        y = y * self.excitation(y.mean(axis=(1, 2), keepdims=True))
        y = self.normalize("project", pointwise(dim, name="project")(y))
        return x + self.drop(y, drop_rate), None

    def normalize(self, convolution: str, x: jax.Array) -> jax.Array:
        """The batch norm after a convolution."""
        return self.batch_norm(name=f"{convolution}_norm")(x.astype(jnp.float32))

    def excitation(self, mean: jax.Array) -> jax.Array:
        """A scaling factor for each channel from the channels' averages, both (batch, 1, 1, channels)."""
        channels = mean.shape[-1]
        code = nn.relu(_pointwise(channels, channels // 8, jnp.float32, "se_reduce")(mean))
        return nn.sigmoid(_pointwise(channels // 8, channels, jnp.float32, "se_expand")(code))


class Downsampling(nn.Module):
    """Halves the resolution by a 2×2 convolution with stride 2, then a norm; an odd last row or column is left out."""

    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, rows, columns, channels) to (batch, ⌊rows/2⌋, ⌊columns/2⌋, dim)."""
        if min(x.shape[1:3]) < 2:
            raise ValueError(f"images: too small, a map of {x.shape[1:3]} tokens remains, which cannot be halved")
        conv = nn.Conv(
            features=self.dim,
            kernel_size=(2, 2),
            strides=2,
            padding="VALID",
            kernel_init=uniform_fan_in,
            bias_init=uniform((4 * x.shape[-1]) ** -0.5),
            dtype=self.dtype,
            name="conv",
        )
        return layer_norm(name="norm")(conv(x))


def _pointwise(inputs: int, outputs: int, dtype: Any, name: str) -> nn.Dense:
    """A 1×1 convolution with bias, initialised as in PyTorch."""
    return Dense(outputs, kernel_init=uniform_fan_in, bias_init=uniform(inputs**-0.5), dtype=dtype, name=name)


@functools.cache
def atrous_scan_order(grid: tuple[int, int]) -> ScanOrder:
    """`atrous_scan` as a `ScanOrder`."""
    return scan_order_of(atrous_scan(grid))


def atrous_scan(grid: tuple[int, int]) -> np.ndarray:
    """Four sequences, each of every second token of every second row, from the four possible first tokens.

    Those that start in the second row go column by column, the others row by row. A grid with an odd side is padded
    with zeros.

    Returns:
      The token at each position, or PADDING: (4, ⌈rows/2⌉ ⌈columns/2⌉) integers.
    """
    rows, columns = grid
    tokens = np.arange(rows * columns).reshape(grid)
    tokens = np.pad(tokens, ((0, rows % 2), (0, columns % 2)), constant_values=PADDING)
    starts = [(0, 0), (1, 0), (0, 1), (1, 1)]
    phases = [tokens[row::2, column::2] for row, column in starts]
    return np.stack([(phase.T if row else phase).reshape(-1) for (row, _), phase in zip(starts, phases)])


MODELS = {
    "efficient_vmamba_tiny": partial(EfficientVMamba, dims=48, depths=(2, 2, 4, 2)),
    "efficient_vmamba_small": partial(EfficientVMamba, dims=64, depths=(2, 2, 4, 2)),
    "efficient_vmamba_base": partial(EfficientVMamba, dims=96, depths=(2, 2, 9, 2)),
}
