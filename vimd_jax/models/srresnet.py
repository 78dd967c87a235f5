"""SRResNet, the super-resolution network of SRGAN (Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a
Generative Adversarial Network", CVPR 2017, https://arxiv.org/abs/1609.04802, figure 4).

Residual blocks at the low resolution are followed by sub-pixel convolutions that each double the resolution.
Convolutions are initialised as in the original, by PyTorch's default (uniform in ±1/√fan_in).
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.layers import BatchNorm, Conv, check_images, convolve, on_cpu, portable
from vimd_jax.models.network import Network


class SRResNet(Network):
    """Super-resolution network.

    Attributes:
      scale: ratio of the output's side to the input's, 2, 4 or 8.
      channels: width of the residual blocks.
      num_blocks: number of residual blocks.
      bn_axis_name: axis of devices (pmap, shard_map) across which training batches are normalised together; None: each
        device normalises its own.
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
          train: normalise by batch statistics instead of the running averages, and update these: pass
            mutable=["batch_stats"].

        Returns:
          (batch, scale * height, scale * width, 3) float32, clipped to [0, 1]; no gradient passes where it was clipped.

        Raises:
          ValueError: images are not (batch, height, width, 3) floats.
        """
        check_images(images)
        shallow = PReLU(name="prelu_in")(Conv(self.channels, 9, name="conv_in")(images.astype(jnp.float32)))

        blocks = nn.scan(
            ResidualBlock,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.num_blocks,
            # Unrolled in training: inside a loop, XLA's gradient of a convolution is 20 times slower on a CPU.
            unroll=self.num_blocks if train else 1,
        )
        # No loop for ONNX Runtime, which prepares the weights of a convolution where they are constants.
        with jax.disable_jit(portable.value and not self.is_initializing()):
            x, _ = blocks(self.channels, train, self.bn_axis_name, name="blocks")(shallow)
        conv_mid = Conv(self.channels, 3, use_bias=False, convolve=trunk_convolve(train), name="conv_mid")
        x = shallow + BatchNorm(train, self.bn_axis_name, name="norm_mid")(x, conv_mid)

        for i in range(self.scale.bit_length() - 1):
            x = Doubling(self.channels, name=f"upsample_{i}")(x)
        x = Conv(3, 9, convolve=output_convolve(self.channels), name="conv_out")(x)
        return jnp.clip(x, 0.0, 1.0)


class ResidualBlock(nn.Module):
    """x + norm(conv(prelu(norm(conv(x))))), as the body of nn.scan."""

    channels: int
    train: bool
    bn_axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Maps x (batch, height, width, channels) to (the same shape, None)."""
        conv = partial(Conv, self.channels, 3, use_bias=False, convolve=trunk_convolve(self.train))
        conv1, conv2 = conv(name="conv1"), conv(name="conv2")
        y = BatchNorm(self.train, self.bn_axis_name, name="norm1")(x, conv1)
        y = PReLU(name="prelu")(y)
        return x + BatchNorm(self.train, self.bn_axis_name, name="norm2")(y, conv2), None


class Doubling(nn.Module):
    """Sub-pixel convolution: four times the channels, rearranged to twice the height and width."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # In PyTorch's order, feature 4k + 2i + j is channel k of the pixel in row i, column j. Sorting the features by
        # pixel first makes all channels of a pixel contiguous, and sorting the weights is cheaper than sorting outputs.
        x = Conv(4 * self.channels, 3, name="conv")(x, lambda kernel, bias: (_pixel_first(kernel), _pixel_first(bias)))
        return pixel_shuffle(PReLU(name="prelu")(x))


def trunk_convolve(train: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The convolution at the low resolution: `winograd` on a CPU, unless `train`; else `convolve`.

    XLA's own convolution (JAX 0.10) runs on a single core where it has no more than 64 features.
    """
    if train:
        return convolve
    return partial(on_cpu, winograd, convolve)


def output_convolve(channels: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The last convolution: `convolve_tiles` on a CPU for few input channels, where XLA's own (JAX 0.10) is slow."""
    if portable.value:
        return convolve_to_few
    return partial(on_cpu, convolve_tiles, convolve) if channels < 32 else convolve


def convolve_tiles(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` for few channels and features: the pixels of each 2×4 tile are features of one strided convolution.

    It multiplies 48 % more with a 9×9 filter, but XLA (JAX 0.10) is far from its speed on a CPU with few features.
    """
    rows, columns = 2, 4
    size, _, inputs, features = kernel.shape
    batch, height, width, _ = x.shape
    moved = [
        jnp.pad(kernel, ((i, rows - 1 - i), (j, columns - 1 - j), (0, 0), (0, 0)))
        for i in range(rows)
        for j in range(columns)
    ]
    padding = [(size // 2, size // 2 + tile - 1) for tile in (rows, columns)]  # for sides that may be symbolic
    y = jax.lax.conv_general_dilated(
        x, jnp.concatenate(moved, axis=3), (rows, columns), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    tiles = y.reshape(batch, *y.shape[1:3], rows, columns, features).swapaxes(2, 3)
    return merge_tiles(tiles)[:, :height, :width]


def convolve_to_few(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` for few features, which ONNX Runtime pads to 16: first each column of the filter, then the sum."""
    size, _, inputs, features = kernel.shape
    margin, width = size // 2, x.shape[2]
    filters = kernel.swapaxes(1, 2).reshape(size, 1, inputs, size * features)
    padding = ((margin, margin), (margin, margin))
    y = jax.lax.conv_general_dilated(x, filters, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    columns = jnp.split(y, size, axis=3)
    # Not by indexing, which is no slice where the width is symbolic.
    return sum(jax.lax.slice_in_dim(column, j, j + width, axis=2) for j, column in enumerate(columns))


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` for 3×3 kernels, 4×4 pixels at a time with 36 multiplications instead of 144 (Lavin & Gray, "Fast
    Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.3), computed as 36 matrix products.
    """
    pixels, taps, results = _winograd_matrices()
    size = len(pixels)
    (batch, height, width, inputs), features = x.shape, kernel.shape[-1]
    rows, columns = -(-height // 4), -(-width // 4)
    x = jnp.pad(x, ((0, 0), (1, 1 + 4 * rows - height), (1, 1 + 4 * columns - width), (0, 0)))
    kernels = jnp.stack(_combine(taps, [jnp.stack(_combine(taps, list(row))) for row in kernel]))
    lines = _combine(pixels, [x[:, i : i + 4 * rows - 3 : 4] for i in range(size)])
    tiles = [_combine(pixels, [line[:, :, j : j + 4 * columns - 3 : 4] for j in range(size)]) for line in lines]
    products = jnp.einsum("kbrci,kif->kbrcf", jnp.stack(sum(tiles, [])), kernels.reshape(size**2, inputs, features))
    lines = _combine(results, list(products.reshape(size, size, batch, rows, columns, features)))
    y = jnp.stack([jnp.stack(_combine(results, list(line)), axis=3) for line in lines], axis=2)
    return merge_tiles(y)[:, :height, :width]


@functools.cache
def _winograd_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transforms of six pixels, of three taps, and back to four results, by the Toom-Cook algorithm.

    It multiplies polynomials through their values at five points and their highest coefficients. These points give
    smaller rounding errors than the usual 0, ±1, ±2.
    """
    points = np.array([0, 2**0.5, -(2**0.5), 0.5**0.5, -(0.5**0.5)])
    others = [np.delete(points, i) for i in range(5)]
    pixels = [[*np.polynomial.polynomial.polyfromroots(roots), 0] for roots in others]
    pixels.append(np.polynomial.polynomial.polyfromroots(points))
    taps = [point ** np.arange(3) / np.prod(point - roots) for point, roots in zip(points, others)] + [[0, 0, 1]]
    results = np.column_stack([points ** np.arange(4)[:, None], [0, 0, 0, 1]])
    return tuple(np.round(matrix, 15) for matrix in (pixels, taps, results))  # so that zeros are exact


def _combine(matrix: np.ndarray, parts: list) -> list:
    """The product of a matrix with a vector whose entries are arrays."""
    return [sum(float(factor) * part for factor, part in zip(row, parts) if factor) for row in matrix]


def _pixel_first(features: jax.Array) -> jax.Array:
    return features.reshape(*features.shape[:-1], -1, 4).swapaxes(-1, -2).reshape(features.shape)


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """(batch, h, w, 4c) to (batch, 2h, 2w, c): feature (2i + j) c + k is channel k, row i, column j."""
    batch, height, width, features = x.shape
    return merge_tiles(x.reshape(batch, height, width, 2, 2, features // 4).swapaxes(2, 3))


def merge_tiles(x: jax.Array) -> jax.Array:
    """(batch, rows, height, columns, width, channels) to (batch, rows * height, columns * width, channels)."""
    batch, rows, height, columns, width, channels = x.shape
    x = x.reshape(
        batch, rows * height, columns, width, channels
    )  # one side at a time, to preserve the batch's sharding
    return x.reshape(batch, rows * height, columns * width, channels)


class PReLU(nn.Module):
    """x where positive, alpha x elsewhere, with one learned alpha, initially 1/4."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        alpha = self.param("alpha", nn.initializers.constant(0.25), (1,), jnp.float32)
        if portable.value:
            return jnp.maximum(x, 0) + alpha * jnp.minimum(x, 0)  # `where` is slow in ONNX Runtime
        return jnp.where(x > 0, x, alpha * x)


MODELS = {f"srresnet_x{scale}": partial(SRResNet, scale=scale) for scale in (2, 4, 8)}
