"""Necks between a backbone and a dense head: a norm for each map, or a pyramid of four resolutions from one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vimd_jax.models.layers import BatchNorm, layer_norm, rms_norm, uniform


class OutputNorms(nn.Module):
    """A layer norm for each map."""

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Maps arrays (batch, rows, columns, channels) to float32 arrays of the same shapes."""
        return tuple(layer_norm(name=f"norm_{i}")(x) for i, x in enumerate(maps))


class Pyramid(nn.Module):
    """Rescales maps of one resolution to a pyramid: 1/4 of the image's resolution, 1/8, and so on.

    Deconvolutions enlarge maps and max pooling shrinks them, as in the segmenters of BEiT (Bao et al., 2022) and Vim.

    Attributes:
      stride: pixels from one token to the next, 4, 8 or 16.
      normalize_last: normalise the last map first. The norm has its parameters in any case, as in the authors' files.
      train: normalise by batch statistics, and update the running averages.
      bn_axis_name: axis of devices across which batches are normalised together; None: each device normalises its own.
      dtype: of the deconvolutions.
    """

    stride: int
    normalize_last: bool
    train: bool
    bn_axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Maps arrays (batch, rows, columns, channels) to arrays of which number i has a stride of 4 · 2^i pixels."""
        normalized = rms_norm(name="final_norm")(maps[-1])
        maps = (*maps[:-1], normalized if self.normalize_last else maps[-1])
        return tuple(self.rescale(x, i) for i, x in enumerate(maps))

    def rescale(self, x: jax.Array, level: int) -> jax.Array:
        """The map at the resolution of a level of the pyramid."""
        stride = 4 * 2**level
        if stride >= self.stride:
            window = tuple(
                min(stride // self.stride, side) for side in x.shape[1:3]
            )  # one pixel is left of a short side
            return _maxima(x, window)
        x = Deconvolution(self.dtype, name=f"deconv_{level}_0")(x)
        if self.stride // stride == 4:
            x = nn.gelu(BatchNorm(self.train, self.bn_axis_name, name=f"norm_{level}")(x), approximate=False)
            x = Deconvolution(self.dtype, name=f"deconv_{level}_1")(x)
        return x


class Deconvolution(nn.Module):
    """A 2×2 transposed convolution with stride 2, which doubles the resolution; initialised as in PyTorch."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, rows, columns, channels) to (batch, 2 rows, 2 columns, channels) float32."""
        batch, rows, columns, channels = x.shape
        bound = (4 * channels) ** -0.5
        kernel = self.param("kernel", uniform(bound), (2, 2, channels, channels), jnp.float32)
        bias = self.param("bias", uniform(bound), (channels,), jnp.float32)
        y = jnp.einsum("byxc,uvcd->byuxvd", x.astype(self.dtype), kernel.astype(self.dtype))
        return y.reshape(batch, 2 * rows, 2 * columns, channels).astype(jnp.float32) + bias


def _maxima(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """The maxima of windows side by side, by `reshape`: ONNX Runtime pools the last axes of an array only."""
    (rows, columns), (height, width) = window, (side // size for side, size in zip(x.shape[1:3], window))
    x = x[:, : height * rows, : width * columns]
    return x.reshape(x.shape[0], height, rows, width, columns, x.shape[3]).max(axis=(2, 4))
