"""Layers that the vision networks share: initialisers, input checks, norms, patch embedding, stochastic depth."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kernels import depthwise_convolution
from kernels.scan.differentiation import STORED as SCANNED

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

STORED = "stored for the backward pass"  # a name for policies of `jax.checkpoint`
DEVICES = "devices"  # name of the axis of devices that share a batch in training

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
    return (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)


def patch_embedding(
    dim: int, size: int, stride: int, kernel_init: nn.initializers.Initializer, dtype: Any, **options: Any
) -> nn.Conv:
    """A convolution that maps (batch, height, width, 3) to (batch, rows, columns, dim), a vector for each patch."""
    return nn.Conv(dim, (size, size), strides=stride, padding="VALID", kernel_init=kernel_init, dtype=dtype, **options)


portable = jax.make_user_context(False)  # `with portable(True):` traces programs that are the same on every platform


def multiply_rows(x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, precision: Any = None) -> jax.Array:
    """Multiplies vectors (…, inputs) with a kernel (inputs, features), all as rows of one matrix; for `nn.Dense`, too.

    For the gradient of the kernel, XLA sums over a single dimension then; over several, it first copies the cotangents.
    Vectors that are split over devices stay so along the first axis, the batch, alone.
    """
    rows = x if portable.value else x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((rows.ndim - 1,), (0,)), ((), ())), precision)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


Dense = partial(nn.Dense, dot_general=multiply_rows)


def stored(x: jax.Array) -> jax.Array:
    """Marks an array for `recomputing`: of a product's output, more is computed than it takes to store it."""
    return x if portable.value else checkpoint_name(x, STORED)


def recomputing(layer: type[nn.Module], everything: bool) -> type[nn.Module]:
    """A layer whose backward pass computes cheap operations again, which takes less time than storing their results.

    It stores its input, what `stored` marks and the results of scans; with `everything` recomputed, its input alone.
    """
    policy = None if everything else jax.checkpoint_policies.save_only_these_names(STORED, SCANNED)
    return nn.remat(layer, prevent_cse=False, policy=policy)


def on_cpu(cpu: Callable[..., jax.Array], default: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Applies `cpu` in a program for CPUs, `default` in one for other platforms and in a portable one."""
    if portable.value:
        return default(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=default)


class DepthwiseConv(nn.Module):
    """Depthwise 3×3 convolution, initialised as in PyTorch (uniform in ±1/3).

    Attributes:
      use_bias: add a bias per channel.
      silu: apply SiLU to the output; part of this layer so that the backward pass need not keep its input.
    """

    use_bias: bool = True
    silu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, height, width, channels) to the same shape and dtype, padding the borders with zeros."""
        channels = x.shape[-1]
        kernel = self.param("kernel", uniform_fan_in, (3, 3, 1, channels), jnp.float32)
        bias = self.param("bias", uniform(1 / 3), (channels,), jnp.float32) if self.use_bias else None
        return depthwise_convolution(x, kernel[:, :, 0], bias, before=(1, 1), silu=self.silu)


class ChannelGate(nn.Module):
    """Channel gate: squeeze-and-excitation on a normalised map ("BiAttn" in LocalMamba).

        x · sigmoid(W_2 gelu(W_1 mean(norm(x)) + b_1) + b_2),    W_1 to an eighth of the channels

    Attributes:
      axes: the axes to average over.
    """

    axes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, …, channels) to the same shape, in float32."""
        channels, dense = x.shape[-1], partial(nn.Dense, kernel_init=nn.initializers.normal(0.02))
        mean = layer_norm(name="norm")(x).mean(axis=self.axes, keepdims=True)
        code = nn.gelu(dense(channels // 8, name="reduce")(mean), approximate=False)
        return x * nn.sigmoid(dense(channels, name="expand")(code))


def drop_path(module: nn.Module, update: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Stochastic depth (Huang et al., 2016): drops the update of random images and scales up the others.

    Draws from the module's rng stream "drop_path".
    """
    return _drop(module, update, rate, (1,) * (update.ndim - 1))


def drop_channels(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
    """Dropout of random channels of each image in x (batch, rows, columns, channels); scales up the others.

    Draws from the module's rng stream "drop_path".
    """
    return _drop(module, x, rate, (1, 1, x.shape[-1]))


def _drop(module: nn.Module, x: jax.Array, rate: jax.Array | float, shape: tuple[int, ...]) -> jax.Array:
    """Drops entries of x by a random mask of this shape for each image, and scales up the others.

    Where devices share a batch (`DEVICES`), each draws the mask of the whole batch, so that it does not depend on their
    number.
    """
    count = x.shape[0]
    try:
        first, total = count * jax.lax.axis_index(DEVICES), count * jax.lax.axis_size(DEVICES)
    except NameError:  # there is no such axis
        first, total = 0, count
    keep = jax.random.bernoulli(module.make_rng("drop_path"), 1 - rate, (total, *shape))
    return jnp.where(jax.lax.dynamic_slice_in_dim(keep, first, count), x / (1 - rate), 0)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x (batch, height, width, inputs) with a kernel (size, size, inputs, features), padding with zeros."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Conv(nn.Module):
    """A square convolution that keeps the resolution, initialised as in PyTorch.

    Attributes:
      features: output channels.
      size: side of a filter.
      use_bias: add a bias per channel.
      convolve: the function that computes it, see `convolve`.
    """

    features: int
    size: int
    use_bias: bool = True
    convolve: Callable[[jax.Array, jax.Array], jax.Array] = convolve

    @nn.compact
    def __call__(self, x: jax.Array, change: Callable = lambda kernel, bias: (kernel, bias)) -> jax.Array:
        """Maps x (batch, height, width, inputs) to (batch, height, width, features), padding the borders with zeros.

        `change` maps the kernel (size, size, inputs, features) and the bias (0 without one) to those to use.
        """
        inputs = x.shape[-1]
        kernel = self.param("kernel", uniform_fan_in, (self.size, self.size, inputs, self.features), jnp.float32)
        bias = (
            self.param("bias", uniform((inputs * self.size**2) ** -0.5), (self.features,), jnp.float32)
            if self.use_bias
            else 0.0
        )
        kernel, bias = change(kernel, bias)
        return self.convolve(x, kernel) + bias


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running averages: momentum 0.1, and the unbiased variance.

    `flax.linen.BatchNorm` averages the biased variance instead.

    Attributes:
      train: normalise by batch statistics and update the running averages, instead of using these.
      axis_name: axis of devices across which batches are normalised together; None: each device normalises its own.
    """

    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, conv: "Conv | None" = None) -> jax.Array:
        """Normalises x (batch, height, width, channels), or the output of `conv` for it, over all axes but the last.

        Outside training, `conv` runs with the normalisation folded into its kernel and bias.
        """
        channels = conv.features if conv else x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        mean, var = running_mean.value, running_var.value
        if self.train and not self.is_initializing():
            x, conv = conv(x) if conv else x, None
            mean = self._mean(x)
            var = self._mean(jnp.square(x - mean))
            count = x.size // channels * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)
            if count < 2:
                raise ValueError(
                    f"images: batch normalisation has a single value for each channel of {'/'.join(self.path)}, "
                    "train with at least two images per step"
                )
            running_mean.value += 0.1 * (mean - running_mean.value)
            running_var.value += 0.1 * (var * count / (count - 1) - running_var.value)
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        if conv:
            return conv(x, lambda kernel, offset: (kernel * factor, (offset - mean) * factor + bias))
        return (x - mean) * factor + bias

    def _mean(self, x):
        mean = x.mean(axis=(0, 1, 2))
        return jax.lax.pmean(mean, self.axis_name) if self.axis_name else mean
