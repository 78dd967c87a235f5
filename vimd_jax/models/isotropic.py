"""Networks whose layers all have the same shape (Vim, LocalVim, V2M): tokens, layer stack, pooling, head.

    x_0 = tokens + positions      x_{j+1} = x_j + mixer_j(norm_j(x_j))      logits = head(norm(x_depth)[class token])

A family is a subclass that defines its mixer. The originals carry (hidden, residual) pairs between blocks and add
them one block later; the single stream here is the same sum. Parameters, stream, norms and head are float32; the
projections compute in `dtype`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.layers import (
    Dense,
    check_images,
    drop_path,
    normalize_images,
    patch_embedding,
    recomputing,
    rms_norm,
)
from vimd_jax.models.network import Network, check_layers, square
from vimd_jax.models.positions import (
    class_token_positions,
    insert_tokens,
    remove_tokens,
    resize_positions,
    rotary_angles,
    rotate,
)

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, (tokens, embed_dim)
State = Literal["normalized", "stream", "rotated_stream", "update"]  # see `Isotropic.feature_maps`


class Isotropic(Network):
    """Image classifier of identical layers.

    Attributes:
      num_classes: classes of the head; 0 for a network without a head.
      image_size: side, or (height, width), in pixels, of the images that the position table is made for. For other
        sizes the table is resized.
      patch_size: side of a patch in pixels.
      stride: pixels from one patch to the next; below patch_size the patches overlap.
      embed_dim: channels of a token.
      depth: number of layers.
      state_size: state dimension of the scan per channel.
      class_token: "middle" of the sequence, at its "head", "double" (one at each end, averaged) or None.
      pool: input of the head where there is no class token: the "mean" of the tokens, the "last" token, or each token,
        whose logits (features, without a head) are reduced by their "max".
      rope: rotate the stream before every layer by rotary position embeddings.
      drop_path_rate: stochastic depth of the last layer while training; it grows linearly from 0 at the first.
      input_normalization: subtract ImageNet's mean and divide by its deviation first, as pretraining on ImageNet did.
      dtype: of the projections and their outputs, float32 or bfloat16.
      remat: keep only each layer's input for the backward pass and recompute the layer there. Otherwise training keeps
        what takes long to compute, see `layers.recomputing`.
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

    # LeCun's deviation over that of a unit normal truncated at ±2: the originals correct for a truncation that they do
    # not make.
    patch_init = staticmethod(nn.initializers.variance_scaling(1 / 0.87962566**2, "fan_in", "normal"))
    patch_bias_init = staticmethod(nn.initializers.zeros)
    head_init = staticmethod(nn.initializers.normal(0.02))
    class_token_init = staticmethod(nn.initializers.normal(0.02))
    norm_layer = staticmethod(rms_norm)

    def __post_init__(self):
        super().__post_init__()
        if self.rope and self.embed_dim % 4:
            raise ValueError(f"rope: True is not valid with embed_dim {self.embed_dim}, which is not a multiple of 4")
        self.grid_of(square(self.image_size), "image_size")  # raises now, not at the first image

    def make_mixer(self, grid: tuple[int, int]) -> Callable[..., nn.Module]:
        """A function that makes a layer's mixer, given a name; a mixer maps (tokens, layer inputs) to an update."""
        raise NotImplementedError

    def layer_inputs(self, grid: tuple[int, int]) -> Any:
        """Inputs of each layer's mixer besides the tokens: arrays with a leading axis of layers, or None."""
        return None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`, for which the position table is made."""
        return self.grid_of(square(self.image_size), "image_size")

    @nn.nowrap  # it needs no variables, and is called before there are any
    def grid_of(self, size: tuple[int, int], field: str = "images") -> tuple[int, int]:
        """Rows and columns of patches in an image of a size; ValueError, naming the field, if it is below one patch."""
        if min(size) < self.patch_size:
            raise ValueError(f"{field}: (height, width) {size} is less than one patch of {self.patch_size} pixels")
        return tuple((side - self.patch_size) // self.stride + 1 for side in size)

    def setup(self) -> None:
        self.norm = self.norm_layer()
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=self.head_init, dtype=jnp.float32)

    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Class scores of images.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          train: apply stochastic depth; needs the rng stream "drop_path" if drop_path_rate > 0.
          return_features: also return the features below.

        Returns:
          logits (batch, num_classes) float32, without a head the pooled features (batch, embed_dim); with
          `return_features`, the pair of these and a dict of features:
          features["hidden_states"]: (depth, batch, tokens, embed_dim), the stream after each layer, normalised as the
          last one is for the head;
          features["pre_logits"]: the head's input, (batch, embed_dim), or (batch, tokens, embed_dim) with pool "max".

        Raises:
          ValueError: images have a wrong rank, channel count or dtype, or are smaller than a patch.
        """
        x, states = self.run_layers(images, train, keep="stream" if return_features else None)
        positions = class_token_positions(self.class_token, math.prod(self.grid_of(images.shape[1:3])))
        pre_logits = self.pool_tokens(self.norm(x), positions)
        output = self.head(pre_logits) if self.num_classes else pre_logits
        output = output.max(axis=1) if output.ndim == 3 else output
        return (output, {"hidden_states": self.norm(states), "pre_logits": pre_logits}) if return_features else output

    def feature_maps(
        self,
        images: jax.Array,
        layers: Sequence[int] | None = None,
        *,
        state: State = "normalized",
        train: bool = False,
        neck: Callable[..., nn.Module] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Feature maps of chosen layers, on the grid of these images' patches: `apply(…, method="feature_maps")`.

        Args:
          images: (batch, height, width, 3) floats in [0, 1], of any size.
          layers: numbers of layers from 0; None: all.
          state: which state of the layer. "normalized": the stream after it, normalised as for the head and in
            features["hidden_states"]. "stream": the stream after it. "rotated_stream": the same, rotated as the next
            layer does first where there are rotary positions; not rotated after the last layer. "update": what the
            layer adds to the stream, before stochastic depth.
          train: as in a call.
          neck: makes a module inside this network, given a name, that is applied to the maps.

        Returns:
          For each of the layers (batch, rows, columns, embed_dim) float32, without the class tokens; or the neck's
          output for these.

        Raises:
          ValueError: there is no such layer, or the images are not valid.
        """
        layers, size = check_layers(layers, self.depth), images.shape[1:3]

        def chosen(_: jax.Array, states: jax.Array) -> tuple[jax.Array, ...]:
            if state == "rotated_stream" and self.rope:
                rotation = self.rotation(self.grid_of(size))
                states = jnp.concatenate([rotate(states[:-1], *rotation), states[-1:]])
            states = jnp.stack([states[layer] for layer in layers])
            maps = self.to_maps(self.norm(states) if state == "normalized" else states, size)
            return neck(name="neck")(maps) if neck else maps

        return self.run_layers(images, train, "update" if state == "update" else "stream", chosen)

    def to_maps(self, states: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, ...]:
        """Maps (batch, rows, columns, channels) from states (layers, batch, tokens, channels) of images of a size."""
        rows, columns = self.grid_of(size)
        positions = class_token_positions(self.class_token, rows * columns)
        patches = [remove_tokens(state, positions) for state in states]
        return tuple(patch.reshape(patch.shape[0], rows, columns, patch.shape[-1]) for patch in patches)

    @nn.compact
    def run_layers(
        self,
        images: jax.Array,
        train: bool,
        keep: Literal["stream", "update"] | None,
        then: Callable[[jax.Array, jax.Array | None], Any] = lambda x, states: (x, states),
    ) -> Any:
        """The stream after the last layer, and the states that `keep` names, (depth, batch, tokens, embed_dim).

        Or the output of `then` for these; `then` may create modules. The layers run under nn.scan: one compiled body,
        parameters stacked on a leading axis.
        """
        check_images(images)
        grid = self.grid_of(images.shape[1:3])
        layers = nn.scan(
            recomputing(Layer, everything=self.remat) if train or self.remat else Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, 0, nn.broadcast),
            length=self.depth,
        )(
            mixer=self.make_mixer(grid),
            norm=self.norm_layer,
            drops=train and self.drop_path_rate > 0,
            keep=keep,
            name="layers",
        )
        x = self.embed(images, grid)
        rotation = self.rotation(grid) if self.rope else None
        return then(*layers(x, self.drop_rates(), self.layer_inputs(grid), rotation))

    def embed(self, images: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Patches with the class tokens among them, plus positions: (batch, tokens, embed_dim) float32."""
        batch, dim, normal = images.shape[0], self.embed_dim, nn.initializers.normal(0.02)
        patch_embed = patch_embedding(
            dim=dim,
            size=self.patch_size,
            stride=self.stride,
            kernel_init=self.patch_init,
            dtype=self.dtype,
            bias_init=self.patch_bias_init,
            name="patch_embed",
        )
        patches = patch_embed(self.prepare(images)).reshape(batch, math.prod(grid), dim).astype(jnp.float32)

        positions = class_token_positions(self.class_token, math.prod(grid))
        names = {0: [], 1: ["class_token"], 2: ["class_token_head", "class_token_tail"]}[len(positions)]
        tokens = [self.param(name, self.class_token_init, (1, 1, dim), jnp.float32) for name in names]
        # Not jnp.tile: where the batch is sharded over an explicit mesh, the class tokens must be too.
        tokens = [jnp.broadcast_arrays(token, patches[:, :1])[0] for token in tokens]
        table_length = math.prod(self.grid) + len(positions)
        table = self.param("position_embedding", normal, (1, table_length, dim), jnp.float32)
        if grid != self.grid:
            table = resize_positions(table, self.grid, grid, self.class_token)
        return insert_tokens(patches, tokens, positions) + table

    def prepare(self, images: jax.Array) -> jax.Array:
        """The images as the patch embedding reads them."""
        return normalize_images(images) if self.input_normalization else images

    def drop_rates(self) -> jax.Array:
        """Stochastic-depth rate of each layer, (depth,)."""
        return jnp.linspace(0.0, self.drop_path_rate, self.depth, dtype=jnp.float32)

    def rotation(self, grid: tuple[int, int]) -> Rotation:
        """Cosines and sines of the rotary positions of a grid's tokens."""
        angles = rotary_angles(grid, self.class_token, self.embed_dim)
        return jnp.cos(angles), jnp.sin(angles)

    def pool_tokens(self, tokens: jax.Array, positions: tuple[int, ...]) -> jax.Array:
        """The head's input: the class tokens' mean, or the tokens reduced as `pool` says."""
        if positions:
            return tokens[:, np.array(positions)].mean(axis=1)
        return {"mean": tokens.mean(axis=1), "last": tokens[:, -1], "max": tokens}[self.pool]


class Layer(nn.Module):
    """x + mixer(norm(x)), with stochastic depth where `drops` is set.

    Attributes:
      mixer: makes the mixer, given a name.
      norm: makes the norm, given a name.
      drops: whether drop rates apply.
      keep: the state to return besides the next x: the "stream", which is that x, the "update", or None.
    """

    mixer: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    drops: bool
    keep: Literal["stream", "update"] | None

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_rate: jax.Array, inputs: Any, rotation: Rotation | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps x (batch, tokens, dim) to (next x, the state to keep): a step of nn.scan."""
        if rotation is not None:
            x = rotate(x, *rotation)
        update = self.mixer(name="mixer")(self.norm(name="norm")(x), inputs).astype(jnp.float32)
        x = x + (drop_path(self, update, drop_rate) if self.drops else update)
        return x, {"stream": x, "update": update, None: None}[self.keep]


def out_projection(dim: int, depth: int, dtype: Any) -> nn.Dense:
    """The mixer's output projection, initialised by PyTorch's default divided by the square root of the depth."""
    shrunk = nn.initializers.variance_scaling(1 / (3 * depth), "fan_in", "uniform")
    return Dense(dim, use_bias=False, kernel_init=shrunk, dtype=dtype, name="out_proj")
