"""Vim, the bidirectional state-space classifier (Zhu et al., "Vision Mamba: Efficient Visual Representation Learning
with Bidirectional State Space Model", ICML 2024, https://arxiv.org/abs/2401.09417, algorithm 1).

Patches become a sequence with a class token in its middle; every layer adds to it what two selective scans, one from
each end, make of it; the class token, normalised, goes to a linear head:

    x_0 = tokens + positions      x_{j+1} = x_j + mixer_j(norm_j(x_j))      logits = head(norm(x_depth)[class token])

The original carries (hidden, residual) pairs between blocks and adds them one block later; the single stream here is
the same sum. Parameters, stream, norms, scan state and head are float32; `dtype` is that of the projections.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.initializers import uniform_fan_in
from vimd_jax.models.mamba import SSM, inverse_softplus_of_steps
from vimd_jax.models.position import (
    CLASS_TOKENS,
    class_token_positions,
    insert_tokens,
    resize_positions,
    rotary_angles,
    rotate,
)

POOLS = ("mean", "max", "last")
MERGES = ("mean", "sum")
BIMAMBA_TYPES = ("v2", "v1", None)
NORMS = {
    "rms": partial(nn.RMSNorm, epsilon=1e-5, dtype=jnp.float32),
    "layer": partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32),
}
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
      merge: "mean" or "sum" of the two scan directions of bimamba_type "v2"; "v1" always sums.
      bimamba_type: "v2", two directions with weights of their own; "v1", two directions that differ in the state
        matrix only; None, a forward scan only.
      norm: "rms" or "layer", of the layers and at the end.
      layer_scale: a learned factor per channel of what a layer adds, and where it starts; None leaves it out.
      rope: rotate the stream before every layer, by rotary position embeddings (Vim's first release).
      paired_layers: every second layer reads the sequence from its end, and each pair adds up beside the stream.
      flip_tokens: reverse the sequence behind the position embedding. As published, the head still reads the place
        where the class token was.
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
    bimamba_type: str | None = "v2"
    norm: str = "rms"
    layer_scale: float | None = None
    rope: bool = False
    paired_layers: bool = False
    flip_tokens: bool = False
    drop_path_rate: float = 0.0
    input_normalization: bool = False
    dtype: Any = jnp.float32
    remat: bool = False
    scan_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        choices = {"class_token": CLASS_TOKENS, "pool": POOLS, "merge": MERGES, "bimamba_type": BIMAMBA_TYPES}
        for field, allowed in (choices | {"norm": tuple(NORMS)}).items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: {getattr(self, field)!r} is unknown, choose one of {allowed}")
        for field in ("num_classes", "patch_size", "stride", "embed_dim", "depth", "state_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: {getattr(self, field)} is too small, it must be at least 1")
        try:
            floating = jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
        except TypeError:
            floating = False
        if not floating:
            raise ValueError(f"dtype: {self.dtype!r} is no floating-point type, choose float32 or bfloat16")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: {self.drop_path_rate} is no probability below 1")
        if self.rope and (self.embed_dim % 4 or self.paired_layers):
            raise ValueError("rope: it needs an embed_dim divisible by 4, and no paired_layers")
        if self.paired_layers and self.depth % 2:
            raise ValueError(f"paired_layers: {self.depth} layers (depth) make no pairs")
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

        angles = rotary_angles(grid, self.class_token, self.embed_dim) if self.rope else None
        x, states = self._run_layers(x, angles, train, return_features)

        norm = NORMS[self.norm](name="norm")
        head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.02), dtype=jnp.float32, name="head")
        pre_logits = self._pool(norm(x), positions)
        logits = head(pre_logits)
        if logits.ndim == 3:
            logits = logits.max(axis=1)
        if not return_features:
            return logits
        return logits, {"hidden_states": norm(states), "pre_logits": pre_logits}

    def _run_layers(self, x, angles, train, return_states):
        """The stream after the last layer and, stacked, after each layer."""
        mixer = partial(
            Mixer,
            depth=self.depth,
            state_size=self.state_size,
            bimamba_type=self.bimamba_type,
            merge=self.merge,
            layer_scale=self.layer_scale,
            dtype=jnp.dtype(self.dtype),
            scan_implementation=self.scan_implementation,
        )
        layer = PairedLayer if self.paired_layers else Layer
        layers = nn.scan(
            nn.remat(layer, prevent_cse=False) if self.remat else layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
        )(mixer, NORMS[self.norm], train and self.drop_path_rate > 0, return_states, name="layers")
        drop_rates = jnp.linspace(0.0, self.drop_path_rate, self.depth)
        if not self.paired_layers:
            return layers(x, drop_rates, angles)
        (x, *_), states = layers((x, jnp.zeros_like(x), False), drop_rates, angles)
        return x, states

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
        x = insert_tokens(patches, tokens, positions) + table
        return x[:, ::-1] if self.flip_tokens else x

    def _pool(self, tokens, positions):
        if positions:
            return tokens[:, np.array(positions)].mean(axis=1)
        return {"mean": tokens.mean(axis=1), "last": tokens[:, -1], "max": tokens}[self.pool]


class Layer(nn.Module):
    """x + mixer(norm(x)), the mixer's part dropped for whole images at random where `drop_path` is on.

    Attributes:
      mixer: makes the mixer, given a name.
      norm: makes the norm, given a name.
      drop_path: whether drop rates apply.
      return_state: whether to return the stream for stacking too.
    """

    mixer: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    drop_path: bool
    return_state: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_rate: jax.Array, angles: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps x (batch, tokens, dim) to (next x, the same for the stack of states or None): a step of nn.scan.

        `angles`, (tokens, dim), rotate x first.
        """
        if angles is not None:
            x = rotate(x, angles)
        x = x + self._update(x, drop_rate)
        return x, (x if self.return_state else None)

    def _update(self, x, drop_rate):
        y = self.mixer(name="mixer")(self.norm(name="norm")(x)).astype(jnp.float32)
        if self.drop_path:
            keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_rate, (x.shape[0], 1, 1))
            y = jnp.where(keep, y / (1 - drop_rate), 0)
        return y


class PairedLayer(Layer):
    """Half of a pair that reads the same stream from both ends: x becomes (x + f(x)) + (x + flip(g(flip(x)))).

    That doubles the stream, as published; what the first layer of a pair makes waits for the second.
    """

    @nn.compact
    def __call__(self, carry, drop_rate: jax.Array, angles: None):
        """Maps (x, the first layer's result, whether this layer is the second) to the next such triple."""
        x, first, second = carry
        y = self._update(jnp.where(second, x[:, ::-1], x), drop_rate)
        result = x + jnp.where(second, y[:, ::-1], y)
        x = jnp.where(second, first + result, x)
        state = jnp.where(second, x, result)
        return (x, result, ~second), (state if self.return_state else None)


class Mixer(nn.Module):
    """Vim's bidirectional mixer: the two directions share the projections in and out, and nothing else.

    Ablations share everything but the state matrix (bimamba_type "v1") or have one direction (None).
    """

    depth: int
    state_size: int
    bimamba_type: str | None
    merge: str
    layer_scale: float | None
    dtype: Any
    scan_implementation: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, tokens, dim) to the same shape."""
        dim = x.shape[-1]
        channels = EXPAND * dim
        xz = nn.Dense(2 * channels, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype, name="in_proj")(x)
        y = self._scan(*jnp.split(xz, 2, axis=-1), math.ceil(dim / 16))
        shrunk = nn.initializers.variance_scaling(1 / (3 * self.depth), "fan_in", "uniform")  # uniform_fan_in / √depth
        y = nn.Dense(dim, use_bias=False, kernel_init=shrunk, dtype=self.dtype, name="out_proj")(y)
        if self.layer_scale is None:
            return y
        return y * self.param("layer_scale", nn.initializers.constant(self.layer_scale), (dim,))

    def _scan(self, x, z, delta_rank):
        ssm = partial(
            SSM,
            delta_rank=delta_rank,
            state_size=self.state_size,
            dtype=self.dtype,
            scan_implementation=self.scan_implementation,
        )
        direction = "both" if self.bimamba_type == "v1" else "forward"
        forward = ssm(direction=direction, delta_bias_init=inverse_softplus_of_steps, name="forward")(x, z)
        if self.bimamba_type != "v2":
            return forward
        # The backward bias starts at 0, a step of 0.69 against 0.001 to 0.1 forward: an oversight of the original, with
        # which its published weights were trained.
        backward = ssm(direction="backward", delta_bias_init=nn.initializers.zeros, name="backward")(x, z)
        return (forward + backward) / 2 if self.merge == "mean" else forward + backward
