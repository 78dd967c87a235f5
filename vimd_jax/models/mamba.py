"""The selective state-space model of Mamba, the part that every network here is made of (Gu & Dao, "Mamba: Linear-Time
Sequence Modeling with Selective State Spaces", 2023, https://arxiv.org/abs/2312.00752, algorithm 2).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels import selective_scan
from vimd_jax.models.initializers import uniform, uniform_fan_in

CONV_WIDTH = 4


class SSM(nn.Module):
    """Short convolution, step sizes and matrices from its output, selective scan, gate.

    Attributes:
      delta_rank: numbers per token that the step sizes of all channels are made from.
      state_size: state of the scan per channel.
      direction: "backward" looks and runs from the last token to the first, by index: nothing is flipped. "both" looks
        back, runs either way with a state matrix for each, and adds the results.
      delta_bias_init: what the step sizes start from.
      dtype: of the projections.
      scan_implementation: see `kernels.selective_scan`.
    """

    delta_rank: int
    state_size: int
    direction: str
    delta_bias_init: nn.initializers.Initializer
    dtype: Any
    scan_implementation: str | None

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Maps x and the gate z, both (batch, length, channels), to the same shape."""
        channels, rank, state = x.shape[-1], self.delta_rank, self.state_size
        u = ShortConv(self.direction == "backward", name="conv")(x)
        projected = nn.Dense(
            rank + 2 * state, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype, name="x_proj"
        )(u)
        delta, B, C = jnp.split(projected, [rank, rank + state], axis=-1)
        delta, delta_bias = DeltaProjection(channels, self.delta_bias_init, name="dt_proj")(delta)
        D = self.param("D", nn.initializers.ones, (channels,))

        def scan(matrix: str, reverse: bool) -> jax.Array:
            A = -jnp.exp(self.param(matrix, log_of_counting, (channels, state)))
            options = {"delta_softplus": True, "reverse": reverse, "implementation": self.scan_implementation}
            return selective_scan(u, delta, A, B, C, D, z, delta_bias, **options)

        if self.direction == "both":
            return scan("A_log", False) + scan("A_log_backward", True)
        return scan("A_log", self.direction == "backward")


class ShortConv(nn.Module):
    """Causal convolution of each channel with its own filter, anti-causal if `reverse`; then SiLU."""

    reverse: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, length, channels) to the same shape and dtype."""
        channels = x.shape[-1]
        kernel = self.param("kernel", uniform_fan_in, (CONV_WIDTH, 1, channels))
        bias = self.param("bias", uniform(CONV_WIDTH**-0.5), (channels,))
        # Computed again in the backward pass, which would otherwise keep every shifted copy of x.
        return jax.checkpoint(_silu_of_conv, static_argnums=3, prevent_cse=False)(x, kernel, bias, self.reverse)


def _silu_of_conv(x, kernel, bias, reverse):
    # A sum of shifted copies: on a CPU over ten times faster than XLA's grouped convolution, on a GPU one fused loop.
    length, past = x.shape[1], CONV_WIDTH - 1
    padded = jnp.pad(x, ((0, 0), (0, past) if reverse else (past, 0), (0, 0)))
    taps = kernel[::-1, 0] if reverse else kernel[:, 0]  # the last tap meets the current token
    y = sum(padded[:, k : k + length] * taps[k] for k in range(CONV_WIDTH)) + bias
    return jax.nn.silu(y).astype(x.dtype)


class DeltaProjection(nn.Module):
    """Step sizes from their low-rank code. The bias is handed on: the scan adds it in float32."""

    channels: int
    bias_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, code: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", uniform_fan_in, (code.shape[-1], self.channels))
        bias = self.param("bias", self.bias_init, (self.channels,))
        return code @ kernel.astype(code.dtype), bias


def log_of_counting(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """log(1), log(2), … along the last axis: the state matrix starts as -1, -2, … in every channel (S4D-real)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def inverse_softplus_of_steps(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Biases whose softplus is log-uniform between 0.001 and 0.1: the step sizes at the start (Mamba)."""
    log_step = jax.random.uniform(key, shape, dtype, math.log(0.001), math.log(0.1))
    step = jnp.exp(log_step)
    return step + jnp.log(-jnp.expm1(-step))
