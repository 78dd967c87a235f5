"""VMamba in its second release (the authors' code calls its scan "v05_noz"; the networks of the paper's final version,
https://arxiv.org/abs/2401.10166, table 1, and most published weights are of this kind).

Blocks also have an MLP; the scan has one state per channel, no gate, and as many channels as the map or twice as many;
the stem and the layers between stages are 3×3 convolutions with stride 2. Scan paths and stages are those of vmamba.py.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vimd_jax.models.hierarchical import Block, Hierarchical, projection
from vimd_jax.models.layers import (
    DepthwiseConv,
    check_images,
    layer_norm,
    normalize_images,
    uniform,
    uniform_fan_in,
)
from vimd_jax.models.scan_order import ScanOrder, stack_orders
from vimd_jax.models.vmamba import SS2D, cross_scan_order


class VMamba2(Hierarchical):
    """Image classifier; the options of `Hierarchical`, and:

    Attributes:
      expand: ratio of the scans' channels to those of the map.
      mlp_ratio: ratio of the MLPs' hidden channels to those of the map.

    Images may have any size: a convolution with stride 2 maps a side to ⌈side/2⌉.
    """

    depths: tuple[int, ...] = (2, 2, 5, 2)
    state_size: int = 1
    expand: int = 2
    mlp_ratio: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        if self.widths[0] % 2:
            raise ValueError(f"dims: {self.dims} is not valid, the stem needs an even number in the first stage")
        if self.mlp_ratio * min(self.widths) < 1:
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} is not valid, expected enough for one hidden channel")

    def embed(self, images: jax.Array) -> jax.Array:
        """See `Hierarchical`; reduces the resolution to a quarter by two convolutions."""
        check_images(images)
        x = normalize_images(images) if self.input_normalization else images
        x = Halving(dim=self.widths[0] // 2, dtype=self.dtype, name="stem_0")(x)
        return Halving(dim=self.widths[0], dtype=self.dtype, name="stem_1")(nn.gelu(x, approximate=False))

    def make_block(self, stage: int, train: bool) -> partial[Block]:
        """See `Hierarchical`."""
        drops = train and self.drop_path_rate > 0
        mixer = partial(UngatedSS2D, state_size=self.state_size, dtype=self.dtype, expand=self.expand)
        return partial(MLPBlock, drops=drops, mixer=mixer, mlp_ratio=self.mlp_ratio)

    def block_inputs(self, stage: int, grid: tuple[int, int]) -> ScanOrder:
        """The scan order of each block, the same for all of them."""
        return stack_orders([cross_scan_order(grid)] * self.depths[stage])

    def make_downsampling(self, stage: int) -> nn.Module:
        """See `Hierarchical`."""
        return Halving(dim=self.widths[stage + 1], dtype=self.dtype, name=f"downsample_{stage}")


class Halving(nn.Module):
    """Halves the resolution by a 3×3 convolution with stride 2 and zero padding, then a norm."""

    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, rows, columns, channels) to (batch, ⌈rows/2⌉, ⌈columns/2⌉, dim) float32."""
        conv = nn.Conv(
            features=self.dim,
            kernel_size=(3, 3),
            strides=2,
            padding=1,
            kernel_init=uniform_fan_in,
            bias_init=uniform((9 * x.shape[-1]) ** -0.5),
            dtype=self.dtype,
            name="conv",
        )
        return layer_norm(name="norm")(conv(x))


class MLPBlock(Block):
    """x + SS2D(norm(x)), then x + MLP(norm(x)).

    Attributes:
      mixer: makes the mixer, given a name; it maps (x, `ScanOrder`) to an update.
      mlp_ratio: ratio of the MLP's hidden channels to those of the map.
    """

    mixer: Callable[..., nn.Module]
    mlp_ratio: float

    @nn.compact
    def __call__(self, x: jax.Array, inputs: tuple[jax.Array, ScanOrder]) -> tuple[jax.Array, None]:
        """See `Block`."""
        drop_rate, order = inputs
        mixer = self.mixer(name="mixer")
        x = x + self.drop(mixer(layer_norm(name="norm")(x), order), drop_rate)
        return x + self.drop(self.mlp(x, self.mlp_ratio, mixer.dtype), drop_rate), None


class UngatedSS2D(SS2D):
    """`SS2D` without its gate: W_out norm(merge(SSM_k(path_k(silu(conv(W_in x)))))), with a convolution without bias.

    Attributes:
      expand: ratio of the scans' channels to those of the map.
    """

    expand: int

    @nn.compact
    def __call__(self, x: jax.Array, order: ScanOrder) -> jax.Array:
        """See `SS2D`."""
        dim = x.shape[-1]
        u = projection(self.expand * dim, self.dtype, "in_proj")(x)
        u = DepthwiseConv(use_bias=False, silu=True, name="conv")(u)
        batch, rows, columns, channels = u.shape
        y = self.merge(self.scan(u.reshape(batch, rows * columns, channels), order))
        return projection(dim, self.dtype, "out_proj")(layer_norm(name="norm")(y).reshape(u.shape))


MODELS = {  # "s1" and "s2" are the authors' names for `expand`, "l" and a number for the blocks of the third stage
    "vmamba2_tiny": partial(VMamba2, dims=96, depths=(2, 2, 5, 2)),
    "vmamba2_tiny_s1l8": partial(VMamba2, dims=96, depths=(2, 2, 8, 2), expand=1),
    "vmamba2_small": partial(VMamba2, dims=96, depths=(2, 2, 15, 2)),
    "vmamba2_small_s1l20": partial(VMamba2, dims=96, depths=(2, 2, 20, 2), expand=1),
    "vmamba2_base": partial(VMamba2, dims=128, depths=(2, 2, 15, 2)),
    "vmamba2_base_s1l20": partial(VMamba2, dims=128, depths=(2, 2, 20, 2), expand=1),
}
