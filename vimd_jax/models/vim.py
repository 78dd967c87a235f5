"""Vim, the bidirectional state-space classifier (Zhu et al., "Vision Mamba: Efficient Visual Representation Learning
with Bidirectional State Space Model", ICML 2024, https://arxiv.org/abs/2401.09417, algorithm 1).

Patches become a sequence with a class token in its middle; every layer adds to it what two selective scans, one from
each end, make of it; the class token, normalised, goes to a linear head:

    x_0 = tokens + positions      x_{j+1} = x_j + mixer_j(norm_j(x_j))      logits = head(norm(x_depth)[class token])

The original carries (hidden, residual) pairs between blocks and adds them one block later; the single stream here is
the same sum. Parameters, stream, norms, scan state and head are float32; `dtype` is that of the projections.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kernels import selective_scan
from vimd_jax.models.initializers import uniform, uniform_fan_in
from vimd_jax.models.position import CLASS_TOKENS, class_token_positions, insert_tokens, resize_positions

POOLS = ("mean", "max", "last")
MERGES = ("mean", "sum")
CONV_WIDTH = 4
EXPAND = 2
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Vim(nn.Module):
    """Image classifier.

    Attributes:
      num_classes: classes of the head.
      image_size: side, or (height, width), in pixels, that the position table is made for. For images of another size
        the table is resized.
      patch_size: side of a patch in pixels.
      stride: pixels from one patch to the next; below patch_size the patches overlap.
      embed_dim: channels of a token. The mixers work on twice as many.
      depth: number of layers.
      state_size: state of the scan per channel.
      class_token: "middle" of the sequence, at its "head", "double" (one at each end, averaged) or None.
      pool: without a class token, what the head reads: the "mean" of the tokens, the "last" token, or every token, of
        whose logits the "max" is taken.
      merge: "mean" or "sum" of the two scan directions.
      drop_path_rate: stochastic depth of the last layer while training; it grows linearly from 0 at the first.
      input_normalization: subtract ImageNet's mean and divide by its deviation first, as pretraining on ImageNet did.
      dtype: of the projections and what they yield, float32 or bfloat16.
      remat: keep only each layer's input for the backward pass and compute the layer again there.
      scan_implementation: see `kernels.selective_scan`; None is the fastest that runs here.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    stride: int = 16
    embed_dim: int = 192
    depth: int = 24
    state_size: int = 16
    class_token: str | None = "middle"
    pool: str = "mean"
    merge: str = "mean"
    drop_path_rate: float = 0.0
    input_normalization: bool = False
    dtype: Any = jnp.float32
    remat: bool = False
    scan_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        choices = {"class_token": CLASS_TOKENS, "pool": POOLS, "merge": MERGES}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: {getattr(self, field)!r} is unknown, choose one of {allowed}")
        for field in ("num_classes", "patch_size", "stride", "embed_dim", "depth", "state_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: {getattr(self, field)} is too small, it must be at least 1")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: {self.drop_path_rate} is no probability below 1")
        self.grid  # noqa: B018  an image_size below one patch is an error now, not at the first image

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`, for which the position table is made."""
        size = (self.image_size, self.image_size) if np.ndim(self.image_size) == 0 else tuple(self.image_size)
        return self._grid("image_size", size)

    def _grid(self, name: str, size: tuple[int, ...]) -> tuple[int, int]:
        if len(size) != 2 or min(size) < self.patch_size:
            raise ValueError(
                f"{name}: (height, width) {size} must be two numbers no smaller than a patch, {self.patch_size}"
            )
        return tuple((side - self.patch_size) // self.stride + 1 for side in size)

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Class scores of images.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          train: apply stochastic depth; needs the rng stream "drop_path" if drop_path_rate > 0.
          return_features: also return the features below.

        Returns:
          logits (batch, num_classes) float32; with `return_features` the pair (logits, features):
          features["hidden_states"]: (depth, batch, tokens, embed_dim), the stream after each layer, through `norm`;
          features["pre_logits"]: the head's input, (batch, embed_dim), or (batch, tokens, embed_dim) with pool "max".

        Raises:
          ValueError: images have a wrong rank, channel count or dtype, or are smaller than a patch.
        """
        grid = self._check(images)
        positions = class_token_positions(self.class_token, grid[0] * grid[1])
        x = self._embed(images, grid, positions)

        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        layers = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True, "drop_path": True}, length=self.depth
        )
        x, states = layers(
            depth=self.depth,
            state_size=self.state_size,
            merge=self.merge,
            drop_path=train and self.drop_path_rate > 0,
            return_state=return_features,
            dtype=jnp.dtype(self.dtype),
            scan_implementation=self.scan_implementation,
            name="layers",
        )(x, jnp.linspace(0.0, self.drop_path_rate, self.depth))

        norm = nn.RMSNorm(epsilon=1e-5, dtype=jnp.float32, name="norm")
        head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.02), dtype=jnp.float32, name="head")
        pre_logits = self._pool(norm(x), positions)
        logits = head(pre_logits)
        if logits.ndim == 3:
            logits = logits.max(axis=1)
        if not return_features:
            return logits
        return logits, {"hidden_states": norm(states), "pre_logits": pre_logits}

    def _check(self, images) -> tuple[int, int]:
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images: shape is {images.shape}, expected (batch, height, width, 3)")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images: dtype is {images.dtype}, expected floats in [0, 1]; divide bytes by 255")
        return self._grid("images", images.shape[1:3])

    def _embed(self, images, grid, positions):
        """Patches with the class tokens among them, plus positions: (batch, tokens, embed_dim) float32."""
        dim = self.embed_dim
        if self.input_normalization:
            images = (images - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)
        patches = nn.Conv(
            dim,
            (self.patch_size, self.patch_size),
            strides=self.stride,
            padding="VALID",
            # LeCun's deviation over that of a unit normal cut at ±2; the originals corrected for a cut but made none.
            kernel_init=nn.initializers.normal(math.sqrt(1 / (3 * self.patch_size**2)) / 0.87962566),
            dtype=jnp.dtype(self.dtype),
            name="patch_embed",
        )(images)
        patches = patches.reshape(images.shape[0], -1, dim).astype(jnp.float32)

        normal = nn.initializers.normal(0.02)
        names = {0: [], 1: ["class_token"], 2: ["class_token_head", "class_token_tail"]}[len(positions)]
        tokens = [jnp.tile(self.param(name, normal, (1, 1, dim)), (images.shape[0], 1, 1)) for name in names]
        table_length = math.prod(self.grid) + len(positions)
        table = self.param("position_embedding", normal, (1, table_length, dim))
        if grid != self.grid:
            table = resize_positions(table, self.grid, grid, self.class_token)
        return insert_tokens(patches, tokens, positions) + table

    def _pool(self, tokens, positions):
        if positions:
            return tokens[:, np.array(positions)].mean(axis=1)
        return {"mean": tokens.mean(axis=1), "last": tokens[:, -1], "max": tokens}[self.pool]


class Layer(nn.Module):
    """x + mixer(norm(x)), the mixer's part dropped for whole images at random where `drop_path` is on."""

    depth: int
    state_size: int
    merge: str
    drop_path: bool
    return_state: bool
    dtype: Any
    scan_implementation: str | None

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Maps x (batch, tokens, dim) to (next x, the same for the stack of states or None): a step of nn.scan."""
        y = nn.RMSNorm(epsilon=1e-5, dtype=jnp.float32, name="norm")(x)
        y = Mixer(self.depth, self.state_size, self.merge, self.dtype, self.scan_implementation, name="mixer")(
            y
        ).astype(jnp.float32)
        if self.drop_path:
            keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_rate, (x.shape[0], 1, 1))
            y = jnp.where(keep, y / (1 - drop_rate), 0)
        x = x + y
        return x, (x if self.return_state else None)


class Mixer(nn.Module):
    """Vim's bidirectional mixer: the two directions share the projections in and out, and nothing else."""

    depth: int
    state_size: int
    merge: str
    dtype: Any
    scan_implementation: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        channels = EXPAND * dim
        xz = nn.Dense(2 * channels, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype, name="in_proj")(x)
        x, z = jnp.split(xz, 2, axis=-1)
        ssm = {"delta_rank": math.ceil(dim / 16), "state_size": self.state_size, "dtype": self.dtype}
        ssm["scan_implementation"] = self.scan_implementation
        forward = SSM(reverse=False, delta_bias_init=inverse_softplus_of_steps, **ssm, name="forward")(x, z)
        # The backward bias starts at 0, a step of 0.69 against 0.001 to 0.1 forward: an oversight of the original, with
        # which its published weights were trained.
        backward = SSM(reverse=True, delta_bias_init=nn.initializers.zeros, **ssm, name="backward")(x, z)
        merged = forward + backward
        if self.merge == "mean":
            merged = merged / 2
        shrunk = nn.initializers.variance_scaling(1 / (3 * self.depth), "fan_in", "uniform")  # uniform_fan_in / √depth
        return nn.Dense(dim, use_bias=False, kernel_init=shrunk, dtype=self.dtype, name="out_proj")(merged)


class SSM(nn.Module):
    """One direction of a mixer: short convolution, step sizes and matrices from its output, selective scan, gate.

    `reverse` looks and runs from the last token to the first, by index: nothing is flipped.
    """

    delta_rank: int
    state_size: int
    reverse: bool
    delta_bias_init: nn.initializers.Initializer
    dtype: Any
    scan_implementation: str | None

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Maps x and the gate z, both (batch, length, channels), to the same shape."""
        channels, rank, state = x.shape[-1], self.delta_rank, self.state_size
        u = ShortConv(self.reverse, name="conv")(x)
        projected = nn.Dense(
            rank + 2 * state, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype, name="x_proj"
        )(u)
        delta, B, C = jnp.split(projected, [rank, rank + state], axis=-1)
        delta, delta_bias = DeltaProjection(channels, self.delta_bias_init, name="dt_proj")(delta)
        return selective_scan(
            u,
            delta,
            -jnp.exp(self.param("A_log", log_of_counting, (channels, state))),
            B,
            C,
            self.param("D", nn.initializers.ones, (channels,)),
            z,
            delta_bias,
            delta_softplus=True,
            reverse=self.reverse,
            implementation=self.scan_implementation,
        )


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
