"""Vim, the bidirectional state-space classifier (Zhu et al., "Vision Mamba: Efficient Visual Representation Learning
with Bidirectional State Space Model", ICML 2024, https://arxiv.org/abs/2401.09417, algorithm 1).

Patches become a sequence with a class token in its middle; every layer adds the outputs of two selective scans, one
from each end; a linear head reads the normalised class token (see isotropic.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vimd_jax.models.isotropic import Isotropic, out_projection
from vimd_jax.models.layers import Dense, stored, uniform_fan_in
from vimd_jax.models.mamba import EXPAND, SSM, inverse_softplus_of_steps


class Vim(Isotropic):
    """Image classifier; the options of `Isotropic`, and:

    Attributes:
      merge: "mean" or "sum" of the two scan directions.
    """

    merge: Literal["mean", "sum"] = "mean"

    def make_mixer(self, grid: tuple[int, int]) -> Callable[..., nn.Module]:
        """See `Isotropic`."""
        return partial(Mixer, depth=self.depth, state_size=self.state_size, merge=self.merge, dtype=self.dtype)


class Mixer(nn.Module):
    """Vim's bidirectional mixer: the two directions share only the input and output projections."""

    depth: int
    state_size: int
    merge: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, inputs: None = None) -> jax.Array:
        """Maps x (batch, tokens, dim) to the same shape."""
        dim = x.shape[-1]
        in_proj = Dense(2 * EXPAND * dim, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype, name="in_proj")
        y = self.scan(*jnp.split(stored(in_proj(x)), 2, axis=-1))
        return out_projection(dim, self.depth, self.dtype)(y)

    def scan(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Merges both directions: maps x and the gate z, both (batch, tokens, channels), to the same shape."""
        ssm = partial(SSM, state_size=self.state_size, dtype=self.dtype)
        forward = ssm(reverse=False, delta_bias_init=inverse_softplus_of_steps, name="forward")(x, z)
        # The backward bias is initialised to 0: a step size of 0.69, against 0.001 to 0.1 forward. This is an oversight
        # of the original, with which its published weights were trained.
        backward = ssm(reverse=True, delta_bias_init=nn.initializers.zeros, name="backward")(x, z)
        return (forward + backward) / 2 if self.merge == "mean" else forward + backward


MODELS = {
    "vim_tiny": partial(Vim, embed_dim=192),
    "vim_tiny_stride8": partial(Vim, embed_dim=192, stride=8),
    "vim_small": partial(Vim, embed_dim=384),
    "vim_small_stride8": partial(Vim, embed_dim=384, stride=8),
    "vim_base": partial(Vim, embed_dim=768),
}
