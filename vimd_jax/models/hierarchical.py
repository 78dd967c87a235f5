"""Networks with stages of decreasing resolution (VMamba, LocalVMamba, EfficientVMamba): stem, stages, head.

    x_0 = norm(patches)    x_s = blocks_s(x_{s-1}), then half the resolution and more channels    head(mean(norm(x)))

A family is a subclass that defines the blocks of a stage. The stream is a map (batch, rows, columns, channels).
Parameters, stream, norms and head are float32; projections and convolutions compute in `dtype`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.layers import (
    Dense,
    check_images,
    drop_path,
    layer_norm,
    normalize_images,
    patch_embedding,
    uniform,
    uniform_fan_in,
)
from vimd_jax.models.network import Network, check_layers

UNROLLED = 4  # blocks of the longest stage that is compiled block by block
PATCH_SIZE = 4  # pixels; patches do not overlap, and incomplete ones at the borders are left out


class Hierarchical(Network):
    """Image classifier of stages.

    Attributes:
      num_classes: classes of the head; 0 for a network without a head.
      image_size: side, or (height, width), in pixels, that the network is meant for. It accepts images of any size.
      dims: channels of each stage; one number is that of the first stage and doubles from stage to stage.
      depths: number of blocks of each stage.
      state_size: state dimension of the scan per channel.
      drop_path_rate: stochastic depth of the last block while training; it grows linearly from 0 at the first.
      input_normalization: subtract ImageNet's mean and divide by its deviation first, as pretraining on ImageNet did.
      dtype: of the projections and convolutions and their outputs, float32 or bfloat16.
      remat: keep only each block's input for the backward pass and recompute the block there.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, int] = 224
    dims: int | tuple[int, ...] = 96
    depths: tuple[int, ...] = (2, 2, 9, 2)
    state_size: int = 16
    drop_path_rate: float = 0.0
    input_normalization: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths: {self.depths} is not valid, expected an integer of at least 1 for each stage")
        if len(self.widths) != len(self.depths) or min(self.widths) < 1:
            raise ValueError(
                f"dims: {self.dims} is not valid, expected an integer of at least 1, "
                f"or one for each of the {len(self.depths)} stages"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        if isinstance(self.dims, int):
            return tuple(self.dims * 2**stage for stage in range(len(self.depths)))
        return self.dims

    def make_block(self, stage: int, train: bool) -> "partial[Block]":
        """The class of a stage's blocks, with their options."""
        raise NotImplementedError

    def block_inputs(self, stage: int, grid: tuple[int, int]) -> Any:
        """Inputs of each block of a stage besides the map: arrays with a leading axis of blocks, or None."""
        return None

    def make_downsampling(self, stage: int) -> nn.Module:
        """The module between a stage and the next."""
        return PatchMerging(dim=self.widths[stage + 1], dtype=self.dtype, name=f"downsample_{stage}")

    @staticmethod
    def decays(path: tuple[str, ...]) -> bool:
        """See `Network`. The biases of the step sizes decay too: the originals exempt vectors, these are matrices."""
        return Network.decays(path) or path[-1] == "dt_proj_bias"

    def setup(self) -> None:
        self.norm = layer_norm()
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.02))

    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, Any]]:
        """Class scores of images.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          train: apply stochastic depth; needs the rng stream "drop_path" if drop_path_rate > 0. Networks with batch
            normalisation then use batch statistics and update the running averages: pass mutable=["batch_stats"].
          return_features: also return the features below.

        Returns:
          logits (batch, num_classes) float32, without a head the pooled features (batch, channels of the last stage);
          with `return_features`, the pair of these and a dict of features:
          features["hidden_states"]: the map after the last block of each stage, a tuple of arrays
          (batch, rows, columns, channels);
          features["pre_logits"]: the head's input, (batch, channels of the last stage).

        Raises:
          ValueError: images have a wrong rank, channel count or dtype, or are smaller than a patch.
        """
        states = self.run_stages(images, train)
        pre_logits = self.norm(states[-1]).mean(axis=(1, 2))
        output = self.head(pre_logits) if self.num_classes else pre_logits
        return (output, {"hidden_states": states, "pre_logits": pre_logits}) if return_features else output

    def feature_maps(
        self,
        images: jax.Array,
        layers: Sequence[int] | None = None,
        *,
        train: bool = False,
        neck: Callable[..., nn.Module] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Feature maps of chosen stages: `apply(…, method="feature_maps")`.

        Args:
          images: (batch, height, width, 3) floats in [0, 1], of any size.
          layers: numbers of stages from 0; None: all.
          train: as in a call.
          neck: makes a module inside this network, given a name, that is applied to the maps.

        Returns:
          For each of these stages the map after its last block, as in features["hidden_states"]: (batch, rows, columns,
          channels of the stage) float32, not normalised; or the neck's output for them.

        Raises:
          ValueError: there is no such stage, or the images are not valid.
        """
        layers = check_layers(layers, len(self.depths))

        def chosen(states: list[jax.Array]) -> tuple[jax.Array, ...]:
            maps = tuple(states[stage] for stage in layers)
            return neck(name="neck")(maps) if neck else maps

        return self.run_stages(images, train, chosen)

    def to_maps(self, states: Sequence[jax.Array], size: tuple[int, int]) -> tuple[jax.Array, ...]:
        """Maps (batch, rows, columns, channels) from features["hidden_states"], which are such maps already."""
        return tuple(states)

    @nn.compact
    def run_stages(
        self, images: jax.Array, train: bool, then: Callable[[list[jax.Array]], tuple[jax.Array, ...]] = tuple
    ) -> tuple[jax.Array, ...]:
        """The map after the last block of each stage, or the output of `then` for them; `then` may create modules."""
        x, states = self.embed(images), []
        rates = np.split(np.linspace(0.0, self.drop_path_rate, sum(self.depths)), np.cumsum(self.depths)[:-1])
        for stage, stage_rates in enumerate(rates):
            x = self.run_stage(stage, x, stage_rates, train)
            states.append(x)
            if stage < len(self.depths) - 1:
                x = self.make_downsampling(stage)(x)
        return then(states)

    def embed(self, images: jax.Array) -> jax.Array:
        """Normalised patches, (batch, rows, columns, channels)."""
        check_images(images)
        if min(images.shape[1:3]) < PATCH_SIZE:
            size = images.shape[1:3]
            raise ValueError(f"images: (height, width) {size} is less than one patch of {PATCH_SIZE} pixels")
        images = normalize_images(images) if self.input_normalization else images
        bias_init = uniform((3 * PATCH_SIZE**2) ** -0.5)
        patches = patch_embedding(
            dim=self.widths[0],
            size=PATCH_SIZE,
            stride=PATCH_SIZE,
            kernel_init=uniform_fan_in,
            bias_init=bias_init,
            dtype=self.dtype,
            name="patch_embed",
        )
        return layer_norm(name="patch_norm")(patches(images))

    def run_stage(self, stage: int, x: jax.Array, drop_rates: np.ndarray, train: bool) -> jax.Array:
        """Applies the blocks of a stage by nn.scan: one compiled body, parameters stacked on a leading axis.

        In training a short stage is compiled block by block, since a loop copies what it keeps for the backward pass
        into stacked arrays and out of them again; with `remat` it keeps little.
        """
        block, depth = self.make_block(stage, train), self.depths[stage]
        scanned = nn.scan(
            nn.remat(block.func, prevent_cse=False) if self.remat else block.func,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "drop_path": True},
            length=depth,
            unroll=depth if train and not self.remat and depth <= UNROLLED else 1,
        )
        blocks = scanned(**block.keywords, name=f"stage_{stage}")
        return blocks(x, (jnp.asarray(drop_rates, jnp.float32), self.block_inputs(stage, x.shape[1:3])))[0]


class Block(nn.Module):
    """A step of nn.scan; each family defines its own.

    Attributes:
      drops: whether drop rates apply.
    """

    drops: bool

    def drop(self, update: jax.Array, rate: jax.Array) -> jax.Array:
        """The update of a branch in float32, with stochastic depth where `drops` is set."""
        update = update.astype(jnp.float32)
        return drop_path(self, update, rate) if self.drops else update

    def mlp(self, x: jax.Array, ratio: float, dtype: Any) -> jax.Array:
        """A norm and an MLP of two linear layers, with `ratio` times the channels between them."""
        dense = partial(Dense, kernel_init=nn.initializers.normal(0.02), dtype=dtype)
        hidden = dense(int(x.shape[-1] * ratio), name="mlp_in")(layer_norm(name="mlp_norm")(x))
        return dense(x.shape[-1], name="mlp_out")(nn.gelu(hidden, approximate=False))

    def __call__(self, x: jax.Array, inputs: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
        """Maps x (batch, rows, columns, channels) and (drop rate, the block's inputs) to (the next x, None)."""
        raise NotImplementedError


class PatchMerging(nn.Module):
    """Merges every 2×2 tokens: concatenates, normalises and projects them (Liu et al., "Swin Transformer", 2021).

    A map with an odd side is padded with a row or column of zeros before the norm.
    """

    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, rows, columns, channels) to (batch, ⌈rows/2⌉, ⌈columns/2⌉, dim)."""
        batch, rows, columns, channels = x.shape
        x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
        x = x.reshape(batch, (rows + 1) // 2, 2, *x.shape[2:])  # one side at a time, to preserve the batch's sharding
        x = x.reshape(*x.shape[:3], (columns + 1) // 2, 2, channels)
        x = x.transpose(0, 1, 3, 4, 2, 5)  # within the 2×2, the row index varies faster than the column index
        x = layer_norm(name="norm")(x.reshape(*x.shape[:3], 4 * channels))
        return projection(self.dim, self.dtype, "reduction")(x).astype(jnp.float32)


def projection(dim: int, dtype: Any, name: str) -> nn.Dense:
    """A linear layer without bias, initialised as in these networks."""
    return Dense(dim, use_bias=False, kernel_init=nn.initializers.normal(0.02), dtype=dtype, name=name)
