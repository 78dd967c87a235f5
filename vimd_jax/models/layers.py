"""What every vision network shares: initialisers, input checks, norms, patch embedding, stochastic depth."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# PyTorch's default for the weight of a linear or convolution layer: uniform in ±1/√fan_in.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

rms_norm = partial(nn.RMSNorm, epsilon=1e-5, dtype=jnp.float32)
layer_norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32)


def uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform in ±bound; with bound = 1/√fan_in PyTorch's default for the bias of a linear or convolution layer."""

    def init(key, shape, dtype=float):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def check_images(images: jax.Array) -> None:
    """Raises ValueError unless the images are (batch, height, width, 3) floats."""
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images: shape is {images.shape}, expected (batch, height, width, 3)")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images: dtype is {images.dtype}, expected floats in [0, 1]; divide bytes by 255")


def normalize_images(images: jax.Array) -> jax.Array:
    """Subtracts the mean of ImageNet's images in [0, 1] and divides by their standard deviation."""
    return (images - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)


def patch_embedding(
    dim: int, size: int, stride: int, kernel_init: nn.initializers.Initializer, dtype: Any, **options: Any
) -> nn.Conv:
    """A convolution that maps (batch, height, width, 3) to (batch, rows, columns, dim), a vector for each patch."""
    return nn.Conv(dim, (size, size), strides=stride, padding="VALID", kernel_init=kernel_init, dtype=dtype, **options)


def drop_path(module: nn.Module, update: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Stochastic depth (Huang et al., 2016): drops what a layer adds for whole images at random, scales up the rest.

    Draws from the module's rng stream "drop_path".
    """
    shape = (len(update), *[1] * (update.ndim - 1))
    keep = jax.random.bernoulli(module.make_rng("drop_path"), 1 - rate, shape)
    return jnp.where(keep, update / (1 - rate), 0)


class ChannelGate(nn.Module):
    """Scales each channel by a number in (0, 1) that the mean of all normalised tokens decides (BiAttn of LocalMamba).

        x · sigmoid(W_2 gelu(W_1 mean(norm(x)) + b_1) + b_2),  W_1: channels → channels / 8

    Attributes:
      axes: of the tokens in x.
      dtype: of the two projections.
      kernel_init: initialiser of their kernels; biases start at 0.
    """

    axes: tuple[int, ...] = (1,)
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, ..., channels) to the same shape; only the axes of the tokens are averaged."""
        channels = x.shape[-1]
        dense = partial(nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype)
        mean = layer_norm(name="norm")(x).mean(axis=self.axes, keepdims=True)
        code = jax.nn.gelu(dense(channels // 8, name="reduce")(mean), approximate=False)
        return x * jax.nn.sigmoid(dense(channels, name="select")(code).astype(jnp.float32))


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running averages: they take 1/10 of each batch, and its unbiased variance.

    `flax.linen.BatchNorm` averages the biased variance, which is why this one exists.

    Attributes:
      train: normalise by the batch and update the running averages instead of using them.
      axis_name: axis of devices whose batches are normalised together; None: each device for itself.
    """

    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x (batch, height, width, channels) over all but the channels."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        mean, var = running_mean.value, running_var.value
        if self.train and not self.is_initializing():
            mean = self._mean(x)
            var = self._mean(jnp.square(x - mean))
            count = x.size // channels * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)
            running_mean.value += 0.1 * (mean - running_mean.value)
            running_var.value += 0.1 * (var * count / (count - 1) - running_var.value)
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-5)) + bias

    def _mean(self, x):
        mean = x.mean(axis=(0, 1, 2))
        return jax.lax.pmean(mean, self.axis_name) if self.axis_name else mean
