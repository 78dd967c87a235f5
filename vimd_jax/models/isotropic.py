"""The trunk of networks whose layers all have one shape (Vim, LocalVim, V2M): tokens, layer stack, pooling, head.

    x_0 = tokens + positions      x_{j+1} = x_j + mixer_j(norm_j(x_j))      logits = head(norm(x_depth)[class token])

A family is a subclass that says what its mixer is. The originals carry (hidden, residual) pairs between blocks and add
them one block later; the single stream here is the same sum. Parameters, stream, norms and head are float32; `dtype` is
that of the projections.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.layers import check_images, drop_path, normalize_images, patch_embedding, rms_norm
from vimd_jax.models.network import Network, square
from vimd_jax.models.positions import class_token_positions, insert_tokens, resize_positions, rotary_angles, rotate

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, (tokens, embed_dim)
Tapped = Literal["stream", "update", "rotated_stream"]  # see `Isotropic.feature_maps`


class Isotropic(Network):
    """Image classifier of equal layers.

    Attributes:
      num_classes: classes of the head; 0: there is none.
      image_size: side, or (height, width), in pixels, that the position table is made for. For images of another size
        the table is resized.
      patch_size: side of a patch in pixels.
      stride: pixels from one patch to the next; below patch_size the patches overlap.
      embed_dim: channels of a token.
      depth: number of layers.
      state_size: state of the scan per channel.
      class_token: "middle" of the sequence, at its "head", "double" (one at each end, averaged) or None.
      pool: without a class token, what the head reads: the "mean" of the tokens, the "last" token, or every token, of
        whose logits the "max" is taken.
      rope: rotate the stream before every layer, by rotary position embeddings.
      drop_path_rate: stochastic depth of the last layer while training; it grows linearly from 0 at the first.
      input_normalization: subtract ImageNet's mean and divide by its deviation first, as pretraining on ImageNet did.
      dtype: of the projections and what they yield, float32 or bfloat16.
      remat: keep only each layer's input for the backward pass and compute the layer again there.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    stride: int = 16
    embed_dim: int = 192
    depth: int = 24
    state_size: int = 16
    class_token: Literal["middle", "head", "double"] | None = "middle"
    pool: Literal["mean", "max", "last"] = "mean"
    rope: bool = False
    drop_path_rate: float = 0.0
    input_normalization: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    # LeCun's deviation over that of a unit normal cut at ±2: the originals corrected for a cut but made none.
    patch_init = staticmethod(nn.initializers.variance_scaling(1 / 0.87962566**2, "fan_in", "normal"))
    patch_bias_init = staticmethod(nn.initializers.zeros)
    head_init = staticmethod(nn.initializers.normal(0.02))
    class_token_init = staticmethod(nn.initializers.normal(0.02))
    norm_layer = staticmethod(rms_norm)

    def __post_init__(self):
        super().__post_init__()
        if self.rope and self.embed_dim % 4:
            raise ValueError(f"rope: True is not valid with embed_dim {self.embed_dim}, which is not a multiple of 4")
        self.grid  # noqa: B018  an image_size below one patch is an error now, not at the first image

    def make_mixer(self, grid: tuple[int, int]) -> Callable[..., nn.Module]:
        """What makes the mixer of a layer, given a name; it maps (tokens, the layer's inputs) to an update."""
        raise NotImplementedError

    def layer_inputs(self, grid: tuple[int, int]) -> Any:
        """What each layer's mixer is given beside the tokens: arrays with a leading axis of layers, or None."""
        return None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`, for which the position table is made."""
        return self.grid_of(square(self.image_size), "image_size")

    def grid_of(self, size: tuple[int, int], field: str = "images") -> tuple[int, int]:
        """Rows and columns of patches in an image of a size; ValueError, naming the field, if it is below one patch."""
        if min(size) < self.patch_size:
            raise ValueError(f"{field}: (height, width) {size} is less than one patch of {self.patch_size} pixels")
        return tuple((side - self.patch_size) // self.stride + 1 for side in size)

    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Class scores of images.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          train: apply stochastic depth; needs the rng stream "drop_path" if drop_path_rate > 0.
          return_features: also return the features below.

        Returns:
          logits (batch, num_classes) float32, without a head (num_classes 0) the head's input; with `return_features`
          the pair (logits, features):
          features["hidden_states"]: (depth, batch, tokens, embed_dim), the stream after each layer, normalised as the
          last one is for the head;
          features["pre_logits"]: the head's input, (batch, embed_dim), or (batch, tokens, embed_dim) with pool "max".

        Raises:
          ValueError: images have a wrong rank, channel count or dtype, or are smaller than a patch.
        """
        finish = partial(self._classify, return_features=return_features)
        return self._run(images, train, "stream" if return_features else None, finish)

    def feature_maps(
        self,
        images: jax.Array,
        layers: Sequence[int] | None = None,
        *,
        train: bool = False,
        tapped: Tapped = "stream",
        neck: Callable[..., nn.Module] | None = None,
    ) -> tuple[jax.Array, ...]:
        """What chosen layers make of images, as maps; class tokens are left out.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          layers: numbers of layers, from 0; None: the last of each quarter of them.
          train: see `__call__`.
          tapped: the "stream" after a layer; the "update" that a layer adds, as the authors of Vim-Ti's and LocalVim's
            segmenters take it; or the "rotated_stream", as those of Vim-S's do: with rotary positions what the next
            layer makes of it at once, after the last layer the stream.
          neck: makes a module of this network, given a name, that the maps go through.

        Returns:
          Arrays (batch, rows, columns, embed_dim) float32, or what the neck makes of them.
        """
        return self._run(images, train, tapped, partial(self._maps, layers=layers, tapped=tapped, neck=neck))

    @nn.compact
    def _run(self, images: jax.Array, train: bool, tapped: Tapped | None, finish: Callable[..., Any]) -> Any:
        """The layers, and then, in the same scope, finish(stream, what is tapped after each layer, grid)."""
        check_images(images)
        grid = self.grid_of(images.shape[1:3])
        positions = class_token_positions(self.class_token, math.prod(grid))
        x, states = self.run_layers(self.embed(images, grid, positions), grid, train, tapped)
        return finish(x, states, grid)

    def _classify(self, x: jax.Array, states: jax.Array | None, grid: tuple[int, int], return_features: bool) -> Any:
        norm = self.norm_layer(name="norm")
        logits = pre_logits = self.pool_tokens(norm(x), class_token_positions(self.class_token, math.prod(grid)))
        if self.num_classes:
            head = nn.Dense(self.num_classes, kernel_init=self.head_init, dtype=jnp.float32, name="head")
            logits = head(pre_logits)
        if logits.ndim == 3:
            logits = logits.max(axis=1)
        return (logits, {"hidden_states": norm(states), "pre_logits": pre_logits}) if return_features else logits

    def _maps(
        self,
        x: jax.Array,
        states: jax.Array,
        grid: tuple[int, int],
        layers: Sequence[int] | None,
        tapped: Tapped,
        neck: Callable[..., nn.Module] | None,
    ) -> tuple[jax.Array, ...]:
        if layers is None:
            layers = self.quarters
        if tapped == "rotated_stream" and self.rope:
            states = jnp.concatenate([rotate(states[:-1], *self.rotation(grid)), states[-1:]])
        class_tokens = class_token_positions(self.class_token, math.prod(grid))
        patches = np.delete(np.arange(states.shape[2]), class_tokens)
        maps = tuple(states[layer][:, patches].reshape(len(x), *grid, self.embed_dim) for layer in layers)
        return maps if neck is None else neck(name="neck")(maps)

    @property
    def quarters(self) -> tuple[int, ...]:
        """The last layer of each quarter of the layers."""
        return tuple(max(self.depth * quarter // 4, 1) - 1 for quarter in (1, 2, 3, 4))

    def embed(self, images: jax.Array, grid: tuple[int, int], positions: tuple[int, ...]) -> jax.Array:
        """Patches with the class tokens among them, plus positions: (batch, tokens, embed_dim) float32."""
        dim, normal = self.embed_dim, nn.initializers.normal(0.02)
        patch_embed = patch_embedding(
            dim=dim,
            size=self.patch_size,
            stride=self.stride,
            kernel_init=self.patch_init,
            dtype=self.dtype,
            bias_init=self.patch_bias_init,
            name="patch_embed",
        )
        patches = patch_embed(self.prepare(images)).reshape(len(images), -1, dim).astype(jnp.float32)

        names = {0: [], 1: ["class_token"], 2: ["class_token_head", "class_token_tail"]}[len(positions)]
        tokens = [self.param(name, self.class_token_init, (1, 1, dim)) for name in names]
        tokens = [jnp.tile(token, (len(images), 1, 1)) for token in tokens]
        table_length = math.prod(self.grid) + len(positions)
        table = self.param("position_embedding", normal, (1, table_length, dim))
        if grid != self.grid:
            table = resize_positions(table, self.grid, grid, self.class_token)
        return insert_tokens(patches, tokens, positions) + table

    def prepare(self, images: jax.Array) -> jax.Array:
        """What is cut into patches."""
        return normalize_images(images) if self.input_normalization else images

    def run_layers(
        self, x: jax.Array, grid: tuple[int, int], train: bool, tapped: Tapped | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The stream after the last layer and, stacked, what is tapped after each layer."""
        layers = self.stack(Layer, grid, train, tapped)
        return layers(x, self.drop_rates(), self.layer_inputs(grid), self.rotation(grid) if self.rope else None)

    def stack(self, layer: type, grid: tuple[int, int], train: bool, tapped: Tapped | None) -> nn.Module:
        """The layers under nn.scan: one compiled body, parameters stacked on a leading axis."""
        scanned = nn.scan(
            nn.remat(layer, prevent_cse=False) if self.remat else layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, 0, nn.broadcast),
            length=self.depth,
        )
        drops = train and self.drop_path_rate > 0
        return scanned(self.make_mixer(grid), self.norm_layer, drops, tapped, name="layers")

    def drop_rates(self) -> jax.Array:
        """Stochastic depth of each layer, (depth,)."""
        return jnp.linspace(0.0, self.drop_path_rate, self.depth)

    def rotation(self, grid: tuple[int, int]) -> Rotation:
        """Cosines and sines by which rotary positions turn the tokens of a grid."""
        angles = rotary_angles(grid, self.class_token, self.embed_dim)
        return jnp.cos(angles), jnp.sin(angles)

    def pool_tokens(self, tokens: jax.Array, positions: tuple[int, ...]) -> jax.Array:
        """What the head reads."""
        if positions:
            return tokens[:, np.array(positions)].mean(axis=1)
        return {"mean": tokens.mean(axis=1), "last": tokens[:, -1], "max": tokens}[self.pool]


class Layer(nn.Module):
    """x + mixer(norm(x)), the mixer's part dropped for whole images at random where `drops` is on.

    Attributes:
      mixer: makes the mixer, given a name.
      norm: makes the norm, given a name.
      drops: whether drop rates apply.
      tapped: what to return for stacking too, see `Isotropic.feature_maps`; None: nothing.
    """

    mixer: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    drops: bool
    tapped: Tapped | None

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_rate: jax.Array, inputs: Any, rotation: Rotation | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps x (batch, tokens, dim) to (next x, the same for the stack of states or None): a step of nn.scan."""
        if rotation is not None:
            x = rotate(x, *rotation)
        update = self.mixer(name="mixer")(self.norm(name="norm")(x), inputs).astype(jnp.float32)
        x = x + (drop_path(self, update, drop_rate) if self.drops else update)
        return x, {None: None, "update": update}.get(self.tapped, x)


def out_projection(dim: int, depth: int, dtype: Any) -> nn.Dense:
    """The mixer's projection back to the stream: PyTorch's default start divided by the square root of the depth."""
    shrunk = nn.initializers.variance_scaling(1 / (3 * depth), "fan_in", "uniform")
    return nn.Dense(dim, use_bias=False, kernel_init=shrunk, dtype=dtype, name="out_proj")
