"""The parts of Mamba's selective state-space model (Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective
State Spaces", 2023, https://arxiv.org/abs/2312.00752, algorithm 2): short convolution, projections, scan and gate.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels import depthwise_convolution, selective_scan
from vimd_jax.models.layers import Dense, multiply_rows, stored, uniform, uniform_fan_in

CONV_WIDTH = 4
EXPAND = 2  # ratio of a mixer's channels to those of a token


class SSM(nn.Module):
    """One scan direction: short convolution, step sizes and matrices from its output, selective scan, gate.

    Attributes:
      state_size: state dimension of the scan per channel.
      reverse: convolve and scan from the last token to the first, by indexing, without flipping the arrays.
      delta_bias_init: initialiser of the bias of the step sizes.
      dtype: of the projections.
    """

    state_size: int
    reverse: bool
    delta_bias_init: nn.initializers.Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Maps x and the gate z, both (batch, length, channels), to the same shape."""
        channels = x.shape[-1]
        u = ShortConv(self.reverse, name="conv")(x)
        delta, B, C, delta_bias = selective_projections(u, self.state_size, self.delta_bias_init, self.dtype)
        A = state_matrix(self, "A_log", channels, self.state_size)
        D = self.param("D", nn.initializers.ones, (channels,), jnp.float32)
        return selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True, reverse=self.reverse
        )


class GroupedSSM(nn.Module):
    """Several scan directions at once, each with its own weights: projections, and one scan with a group per direction.

    Attributes:
      state_size: state dimension of the scan per channel.
      x_proj_init: of the projection to step sizes and matrices, (directions, channels, delta_rank + 2 state_size).
      dt_proj_init: of the projection of the step sizes, (directions, delta_rank, channels).
      dt_bias_init: of the bias of the step sizes, (directions, channels).
      dtype: of the projections.
      expand: ratio of the channels here to those of a token outside the mixer.
    """

    state_size: int
    x_proj_init: nn.initializers.Initializer
    dt_proj_init: nn.initializers.Initializer
    dt_bias_init: nn.initializers.Initializer
    dtype: Any
    expand: float = EXPAND

    @nn.compact
    def __call__(self, u: jax.Array, order: jax.Array | None = None, z: jax.Array | None = None) -> jax.Array:
        """Maps sequences u (directions, batch, length, channels) to the same shape.

        With the token at each step of each direction as `order`, (directions, length), it maps tokens, (batch, tokens,
        channels) for all directions or (directions, batch, tokens, channels), to results at these tokens, (directions,
        batch, tokens, channels). A gate z (batch, tokens, channels) multiplies those of every direction by silu(z).
        """
        groups, channels, shared = len(u if order is None else order), u.shape[-1], u.ndim == 3
        rank, state = delta_rank(channels, self.expand), self.state_size
        x_proj = self.param("x_proj_kernel", self.x_proj_init, (groups, channels, rank + 2 * state), jnp.float32)
        dt_proj = self.param("dt_proj_kernel", self.dt_proj_init, (groups, rank, channels), jnp.float32)
        dt_bias = self.param("dt_proj_bias", self.dt_bias_init, (groups, channels), jnp.float32)
        A = -jnp.exp(self.param("A_log", log_of_counting, (groups, channels, state), jnp.float32)).reshape(-1, state)
        D = self.param("D", nn.initializers.ones, (groups, channels), jnp.float32)

        # Directions first, as the native scan takes them: neither it nor the products then transpose anything long.
        subscripts = "blc,kcr->blkr" if shared else "kblc,kcr->kblr"
        projected = stored(jnp.einsum(subscripts, u.astype(self.dtype), x_proj.astype(self.dtype)))
        projected = jnp.moveaxis(projected, 2, 0) if shared else projected
        code, *matrices = jnp.split(projected, [rank, rank + state], axis=-1)
        delta = jnp.einsum("kblr,krc->kblc", code, dt_proj.astype(self.dtype))

        def last(x):
            """(directions, batch, length, channels) -> (batch, length, directions * channels)."""
            return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1)

        y = selective_scan(
            u if shared else last(u),
            last(delta),
            A,
            *(jnp.moveaxis(x, 0, 2) for x in matrices),
            D=D.reshape(-1),
            z=z,
            delta_bias=dt_bias.reshape(-1),
            delta_softplus=True,
            order=order,
        )
        return jnp.moveaxis(y.reshape(*y.shape[:2], groups, channels), 2, 0)


def selective_projections(
    u: jax.Array, state_size: int, delta_bias_init: nn.initializers.Initializer, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Step sizes and matrices from the input; for compact modules, to which it adds "x_proj" and "dt_proj".

    Args:
      u: (batch, length, channels).
      state_size: state dimension of the scan per channel.
      delta_bias_init: initialiser of the bias of the step sizes.
      dtype: of the projections.

    Returns:
      delta (batch, length, channels), B and C (batch, length, state_size), and the bias of delta (channels,), which the
      scan adds in float32.
    """
    channels = u.shape[-1]
    rank = delta_rank(channels)
    width = rank + 2 * state_size
    x_proj = Dense(width, use_bias=False, kernel_init=uniform_fan_in, dtype=dtype, name="x_proj")
    code, B, C = jnp.split(stored(x_proj(u)), [rank, rank + state_size], axis=-1)
    delta, delta_bias = DeltaProjection(channels, delta_bias_init, name="dt_proj")(code)
    return delta, B, C, delta_bias


def delta_rank(channels: int, expand: float = EXPAND) -> int:
    """Rank of the projection to step sizes: a sixteenth of a token's channels, rounded up."""
    return math.ceil(channels // expand / 16)


def state_matrix(module: nn.Module, name: str, channels: int, state_size: int) -> jax.Array:
    """A = -exp(parameter), (channels, state_size); adds the parameter to the module."""
    return -jnp.exp(module.param(name, log_of_counting, (channels, state_size), jnp.float32))


class ShortConv(nn.Module):
    """Causal convolution of each channel with its own filter, anti-causal if `reverse`; then SiLU."""

    reverse: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, length, channels) to the same shape and dtype."""
        batch, length, channels = x.shape
        kernel = self.param("kernel", uniform_fan_in, (CONV_WIDTH, 1, channels), jnp.float32)
        bias = self.param("bias", uniform(CONV_WIDTH**-0.5), (channels,), jnp.float32)
        taps, before = (kernel[::-1, 0], 0) if self.reverse else (kernel[:, 0], CONV_WIDTH - 1)
        line = x.reshape(batch, 1, length, channels)
        return depthwise_convolution(line, taps[None], bias, before=(0, before), silu=True).reshape(x.shape)


class GroupedShortConv(nn.Module):
    """`ShortConv` for several scan directions at once, each with its own filters."""

    @nn.compact
    def __call__(self, x: jax.Array, order: jax.Array | None = None) -> jax.Array:
        """Maps sequences x (directions, batch, length, channels) to the same shape and dtype.

        With an `order`, see `GroupedSSM`, it maps tokens (batch, tokens, channels) to (directions, batch, tokens,
        channels).
        """
        groups, channels = len(x if order is None else order), x.shape[-1]
        kernel = self.param("kernel", uniform(CONV_WIDTH**-0.5), (groups, CONV_WIDTH, 1, channels), jnp.float32)
        bias = self.param("bias", uniform(CONV_WIDTH**-0.5), (groups, channels), jnp.float32)
        convolve = partial(depthwise_convolution, before=(0, CONV_WIDTH - 1), silu=True)
        if order is not None:
            taps = jnp.moveaxis(kernel[:, :, 0], 0, 1).reshape(1, CONV_WIDTH, -1)
            y = convolve(x[:, None], taps, bias.reshape(-1), order=order)[:, 0]
            return jnp.moveaxis(y.reshape(*x.shape[:2], groups, channels), 2, 0)
        directions = zip(x, kernel, bias, strict=True)
        return jnp.stack([convolve(of[:, None], taps[:, 0][None], offset)[:, 0] for of, taps, offset in directions])


class DeltaProjection(nn.Module):
    """Projection of low-rank codes to step sizes, which returns the bias separately."""

    channels: int
    bias_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, code: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps code (batch, length, rank) to step sizes without bias (batch, length, channels) and the bias."""
        kernel = self.param("kernel", uniform_fan_in, (code.shape[-1], self.channels), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.channels,), jnp.float32)
        return multiply_rows(code, kernel.astype(code.dtype)), bias


def log_of_counting(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """log(1), log(2), … along the last axis: the state matrix starts as -1, -2, … in every channel (S4D-real)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def inverse_softplus_of_steps(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Biases whose softplus is log-uniform between 0.001 and 0.1: the step sizes at the start (Mamba)."""
    log_step = jax.random.uniform(key, shape, dtype, math.log(0.001), math.log(0.1))
    step = jnp.exp(log_step)
    return step + jnp.log(-jnp.expm1(-step))
