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

from vimd_jax.models.layers import BatchNorm, check_images, uniform, uniform_fan_in
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
        shallow = PReLU(name="prelu_in")(_conv(self.channels, 9, images.shape[3], name="conv_in")(images))

        blocks = nn.scan(
            ResidualBlock,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.num_blocks,
            # Not a compiled loop: inside one, XLA's gradient of a convolution is 20 times slower on a CPU.
            unroll=self.num_blocks,
        )
        x, _ = blocks(self.channels, train, self.bn_axis_name, name="blocks")(shallow)
        x = _conv(self.channels, 3, use_bias=False, name="conv_mid")(x)
        x = shallow + BatchNorm(train, self.bn_axis_name, name="norm_mid")(x)

        for i in range(self.scale.bit_length() - 1):
            x = Doubling(self.channels, name=f"upsample_{i}")(x)
        x = _conv(3, 9, self.channels, name="conv_out")(x)
        return jnp.clip(x, 0.0, 1.0)


class ResidualBlock(nn.Module):
    """x + norm(conv(prelu(norm(conv(x))))), as a step of nn.scan."""

    channels: int
    train: bool
    bn_axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Maps x (batch, height, width, channels) to (the same shape, None)."""
        y = _conv(self.channels, 3, use_bias=False, name="conv1")(x)
        y = BatchNorm(self.train, self.bn_axis_name, name="norm1")(y)
        y = PReLU(name="prelu")(y)
        y = _conv(self.channels, 3, use_bias=False, name="conv2")(y)
        return x + BatchNorm(self.train, self.bn_axis_name, name="norm2")(y), None


class Doubling(nn.Module):
    """Sub-pixel convolution: four times the channels, rearranged to twice the height and width."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _conv(4 * self.channels, 3, self.channels, name="conv")(x)
        return PReLU(name="prelu")(pixel_shuffle(x))


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """(batch, h, w, 4c) to (batch, 2h, 2w, c): channel 4k + 2i + j is channel k, row i, column j, as in PyTorch."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


class PReLU(nn.Module):
    """x where positive, alpha x elsewhere, with one learned alpha that starts at 1/4."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        alpha = self.param("alpha", nn.initializers.constant(0.25), (1,))
        return jnp.where(x > 0, x, alpha * x)


def _conv(features: int, size: int, inputs: int = 0, use_bias: bool = True, name: str | None = None) -> nn.Conv:
    """A square convolution that keeps the resolution; `inputs`, its input channels, is read for the bias' start."""
    bound = (inputs * size**2) ** -0.5 if use_bias else 0.0
    return nn.Conv(
        features, (size, size), use_bias=use_bias, kernel_init=uniform_fan_in, bias_init=uniform(bound), name=name
    )


MODELS = {f"srresnet_x{scale}": partial(SRResNet, scale=scale) for scale in (2, 4, 8)}
