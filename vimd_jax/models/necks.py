"""What stands between a backbone and a dense head: a norm for each map, or maps of four resolutions out of one."""

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
    """Maps of one resolution to resolutions that halve from one to the next, the first a quarter of the image's.

    Deconvolutions enlarge and maxima shrink them, as in Vim's segmenter and, before it, in BEiT's (Bao et al., 2022).

    Attributes:
      stride: pixels from one token to the next, 4, 8 or 16.
      normalize_last: normalise the last map first. The norm is there in any case, as in the authors' files.
      train: normalise by the batch, and update running averages.
      bn_axis_name: axis of devices whose batches are normalised together; None: each device for itself.
      dtype: of the deconvolutions.
    """

    stride: int
    normalize_last: bool
    train: bool
    bn_axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Maps arrays (batch, rows, columns, channels); map i has stride 4 · 2^i pixels then."""
        normalized = rms_norm(name="final_norm")(maps[-1])
        maps = (*maps[:-1], normalized if self.normalize_last else maps[-1])
        return tuple(self.rescale(x, i) for i, x in enumerate(maps))

    def rescale(self, x: jax.Array, level: int) -> jax.Array:
        """One map at the resolution of its level."""
        stride = 4 * 2**level
        if stride >= self.stride:
            window = tuple(min(stride // self.stride, side) for side in x.shape[1:3])  # of a short side one is left
            return nn.max_pool(x, window, window)
        x = Deconvolution(self.dtype, name=f"deconv_{level}_0")(x)
        if self.stride // stride == 4:
            x = nn.gelu(BatchNorm(self.train, self.bn_axis_name, name=f"norm_{level}")(x), approximate=False)
            x = Deconvolution(self.dtype, name=f"deconv_{level}_1")(x)
        return x


class Deconvolution(nn.Module):
    """Twice the resolution: 2×2 pixels from each, by a linear layer for each of the four; starts like PyTorch's."""

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
