"""Heads that predict a label map from a backbone's feature maps: UperNet, FCN, and a linear one for probing.

All return class scores (batch, rows, columns, num_classes) float32 at the resolution of the first map they read. Norms
and the last layer compute in float32, the other convolutions in `dtype`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vimd_jax.models.layers import BatchNorm, drop_channels
from vimd_jax.models.network import Network
from vimd_jax.models.resize import adaptive_average_pool, resize_bilinear

POOL_SCALES = (1, 2, 3, 6)  # cells along each side to which the pyramid of UperNet pools the last map


class Head(Network):
    """Options and layers that the heads share.

    Attributes:
      num_classes: classes of the label map.
      channels: width of the convolutions.
      dropout_rate: probability that a channel of an image is dropped before the last layer in training.
      bn_axis_name: axis of devices (pmap, shard_map) across which training batches are normalised together; None: each
        device normalises its own.
      dtype: of the convolutions, float32 or bfloat16.
    """

    num_classes: int = 150
    channels: int = 512
    dropout_rate: float = 0.1
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"dropout_rate: {self.dropout_rate} is not valid, expected a probability from 0 to below 1"
            )

    def block(self, x: jax.Array, size: int, name: str, train: bool) -> jax.Array:
        """relu(norm(conv(x))) with size × size filters, at the same resolution."""
        start = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al., 2015
        conv = nn.Conv(self.channels, (size, size), use_bias=False, kernel_init=start, dtype=self.dtype, name=name)
        norm = BatchNorm(train, self.bn_axis_name, name=f"{name}_norm")
        return nn.relu(norm(conv(x).astype(jnp.float32)))

    def classify(self, x: jax.Array, train: bool) -> jax.Array:
        """Class scores at every position."""
        if train and self.dropout_rate:
            x = drop_channels(self, x, self.dropout_rate)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="classes")(x)


class UperNet(Head):
    """Unified perceptual parsing (Xiao et al., ECCV 2018, https://arxiv.org/abs/1807.10221, figure 4).

    The last map, pooled to several grids (pyramid pooling, Zhao et al., CVPR 2017), goes top-down through the others
    (feature pyramid, Lin et al., CVPR 2017); the results are concatenated at the resolution of the first.
    """

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], *, train: bool = False) -> jax.Array:
        """Class scores from maps.

        Args:
          maps: arrays (batch, rows, columns, channels) of any size, from high to low resolution.
          train: normalise by batch statistics and update the running averages (pass mutable=["batch_stats"]); drop
            channels, which needs the rng stream "drop_path" if dropout_rate > 0.

        Returns:
          (batch, rows, columns, num_classes) float32, of the first map's size.

        Raises:
          ValueError: a training batch of a single image, whose pooled maps batch normalisation cannot normalise.
        """
        levels = [self.block(x, 1, f"lateral_{i}", train) for i, x in enumerate(maps[:-1])]
        levels.append(self.pool_pyramid(maps[-1], train))
        for i in reversed(range(len(levels) - 1)):
            levels[i] += resize_bilinear(levels[i + 1], levels[i].shape[1:3])
        levels[:-1] = [self.block(x, 3, f"level_{i}", train) for i, x in enumerate(levels[:-1])]
        joined = jnp.concatenate([resize_bilinear(x, levels[0].shape[1:3]) for x in levels], axis=-1)
        return self.classify(self.block(joined, 3, "fusion", train), train)

    def pool_pyramid(self, x: jax.Array, train: bool) -> jax.Array:
        """Pyramid pooling of the last map: it and its averages over several grids, joined by a convolution."""
        x = x.astype(jnp.float32)
        pooled = [self.block(adaptive_average_pool(x, scale), 1, f"pool_{scale}", train) for scale in POOL_SCALES]
        joined = jnp.concatenate([x, *(resize_bilinear(y, x.shape[1:3]) for y in pooled)], axis=-1)
        return self.block(joined, 3, "bottleneck", train)


class FCN(Head):
    """Convolutions and a classifier at every position (Long et al., CVPR 2015), UperNet's auxiliary head.

    Attributes:
      num_convs: 3×3 convolutions.
      join_input: one more convolution, of their output concatenated with their input.
    """

    channels: int = 256
    num_convs: int = 1
    join_input: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Class scores from a map (batch, rows, columns, channels), of the same size; see `UperNet` for `train`."""
        y = x
        for i in range(self.num_convs):
            y = self.block(y, 3, f"conv_{i}", train)
        if self.join_input:
            y = self.block(jnp.concatenate([x.astype(y.dtype), y], axis=-1), 3, "joint", train)
        return self.classify(y, train)


class Linear(Network):
    """A linear classifier at every position, to probe what a backbone's maps encode.

    Attributes:
      num_classes: classes of the label map.
      bn_axis_name: see `Head`.
    """

    num_classes: int = 150
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], *, train: bool = False) -> jax.Array:
        """Class scores from maps, concatenated at the resolution of the first and normalised; see `UperNet`."""
        joined = jnp.concatenate([resize_bilinear(x, maps[0].shape[1:3]) for x in maps], axis=-1)
        x = BatchNorm(train, self.bn_axis_name, name="norm")(joined.astype(jnp.float32))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="classes")(x)
