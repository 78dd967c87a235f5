"""SRResNet, the super-resolution network of SRGAN (Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a
Generative Adversarial Network", CVPR 2017, https://arxiv.org/abs/1609.04802, figure 4).

Residual blocks at the low resolution, then one doubling of the resolution after the other by sub-pixel convolution.
Convolutions start from PyTorch's default (uniform in ±1/√fan_in), which the original network was built with.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vimd_jax.models.layers import BatchNorm, Conv, check_images
from vimd_jax.models.network import Network


class SRResNet(Network):
    """Super-resolution network.

    Attributes:
      scale: 2, 4 or 8, output side over input side.
      channels: width of the residual blocks.
      num_blocks: number of residual blocks.
      bn_axis_name: axis of devices (pmap, shard_map) whose batches are normalised together while training; None: each
        device for itself.
    """

    scale: Literal[2, 4, 8] = 4
    channels: int = 64
    num_blocks: int = 16
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Enlarges images.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          train: normalise by the batch instead of the running averages, and update these: pass
            mutable=["batch_stats"].

        Returns:
          (batch, scale * height, scale * width, 3) float32, clamped to [0, 1]; no gradient passes where it was clamped.

        Raises:
          ValueError: images are not (batch, height, width, 3) floats.
        """
        check_images(images)
        shallow = PReLU(name="prelu_in")(Conv(self.channels, 9, name="conv_in")(images))

        blocks = nn.scan(
            ResidualBlock,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.num_blocks,
            # Not a compiled loop: inside one, XLA's gradient of a convolution is 20 times slower on a CPU.
            unroll=self.num_blocks,
        )
        x, _ = blocks(self.channels, train, self.bn_axis_name, name="blocks")(shallow)
        conv_mid = Conv(self.channels, 3, use_bias=False, name="conv_mid")
        x = shallow + BatchNorm(train, self.bn_axis_name, name="norm_mid")(x, conv_mid)

        for i in range(self.scale.bit_length() - 1):
            x = Doubling(self.channels, name=f"upsample_{i}")(x)
        x = Conv(3, 9, name="conv_out")(x)
        return jnp.clip(x, 0.0, 1.0)


class ResidualBlock(nn.Module):
    """x + norm(conv(prelu(norm(conv(x))))), as a step of nn.scan."""

    channels: int
    train: bool
    bn_axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Maps x (batch, height, width, channels) to (the same shape, None)."""
        conv1, conv2 = (Conv(self.channels, 3, use_bias=False, name=name) for name in ("conv1", "conv2"))
        y = BatchNorm(self.train, self.bn_axis_name, name="norm1")(x, conv1)
        y = PReLU(name="prelu")(y)
        return x + BatchNorm(self.train, self.bn_axis_name, name="norm2")(y, conv2), None


class Doubling(nn.Module):
    """Sub-pixel convolution: four times the channels, rearranged to twice the height and width."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Feature 4k + 2i + j is channel k, row i, column j, as in PyTorch. Sorted by the pixel, not the channel, channels
        # move as a whole: the weights are cheaper to sort than what they make.
        x = Conv(4 * self.channels, 3, name="conv")(x, lambda kernel, bias: (_pixel_first(kernel), _pixel_first(bias)))
        return pixel_shuffle(PReLU(name="prelu")(x))


def _pixel_first(features: jax.Array) -> jax.Array:
    return features.reshape(*features.shape[:-1], -1, 4).swapaxes(-1, -2).reshape(features.shape)


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """(batch, h, w, 4c) to (batch, 2h, 2w, c): feature (2i + j) c + k is channel k, row i, column j."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height, width, 2, 2, features // 4).swapaxes(2, 3)
    return x.reshape(batch, 2 * height, 2 * width, features // 4)


class PReLU(nn.Module):
    """x where positive, alpha x elsewhere, with one learned alpha that starts at 1/4."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        alpha = self.param("alpha", nn.initializers.constant(0.25), (1,))
        return jnp.where(x > 0, x, alpha * x)


MODELS = {f"srresnet_x{scale}": partial(SRResNet, scale=scale) for scale in (2, 4, 8)}
