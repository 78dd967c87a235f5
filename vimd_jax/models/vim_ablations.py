"""The ablations of Vim's original code. No released network uses them; recorded results of the original hold them."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels import selective_scan
from vimd_jax.models.isotropic import Layer
from vimd_jax.models.layers import layer_norm, rms_norm
from vimd_jax.models.mamba import SSM, ShortConv, inverse_softplus_of_steps, selective_projections, state_matrix
from vimd_jax.models.vim import Mixer, Vim


class VimAblation(Vim):
    """Vim with the switches of its original code; the options of `Vim`, and:

    Attributes:
      bimamba_type: "v2", two directions with weights of their own; "v1", two directions that differ in the state
        matrix only and are summed; None, a forward scan only.
      norm: "rms" or "layer", of the layers and at the end.
      layer_scale: a learned factor per channel of what a layer adds, and where it starts; None leaves it out.
      paired_layers: every second layer reads the sequence from its end, and each pair adds up beside the stream.
      flip_tokens: reverse the sequence behind the position embedding. As published, the head still reads the place
        where the class token was.
    """

    bimamba_type: Literal["v2", "v1"] | None = "v2"
    norm: Literal["rms", "layer"] = "rms"
    layer_scale: float | None = None
    paired_layers: bool = False
    flip_tokens: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.paired_layers and (self.depth % 2 or self.rope):
            raise ValueError("paired_layers: True is not valid with an odd depth or with rope")

    @property
    def norm_layer(self) -> Callable[..., nn.Module]:
        """See `Isotropic`."""
        return {"rms": rms_norm, "layer": layer_norm}[self.norm]

    def make_mixer(self, grid: tuple[int, int]) -> Callable[..., nn.Module]:
        """See `Isotropic`."""
        common = (self.depth, self.state_size, self.merge, self.dtype, self.scan_implementation)
        return partial(AblationMixer, *common, self.bimamba_type, self.layer_scale)

    def embed(self, images: jax.Array, grid: tuple[int, int], positions: tuple[int, ...]) -> jax.Array:
        """See `Isotropic`."""
        x = super().embed(images, grid, positions)
        return x[:, ::-1] if self.flip_tokens else x

    def run_layers(self, x: jax.Array, grid: tuple[int, int], train: bool, return_states: bool):
        """See `Isotropic`."""
        if not self.paired_layers:
            return super().run_layers(x, grid, train, return_states)
        layers = self.stack(PairedLayer, grid, train, return_states)
        (x, *_), states = layers((x, jnp.zeros_like(x), False), self.drop_rates(), None, None)
        return x, states


class AblationMixer(Mixer):
    """Vim's mixer with fewer weights, or with a learned scale."""

    bimamba_type: str | None
    layer_scale: float | None

    @nn.compact
    def __call__(self, x: jax.Array, inputs: None = None) -> jax.Array:
        """Maps x (batch, tokens, dim) to the same shape."""
        y = Mixer.__call__(self, x, inputs)
        if self.layer_scale is None:
            return y
        return y * self.param("layer_scale", nn.initializers.constant(self.layer_scale), (x.shape[-1],))

    def scan(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """See `Mixer`."""
        common = (inverse_softplus_of_steps, self.dtype, self.scan_implementation)
        if self.bimamba_type == "v1":
            return SharedSSM(self.state_size, False, *common, name="forward")(x, z)
        if self.bimamba_type is None:
            return SSM(self.state_size, False, *common, name="forward")(x, z)
        return super().scan(x, z)


class SharedSSM(SSM):
    """Both directions from one set of weights, all but the state matrix; both look back. The results are added."""

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Maps x and the gate z, both (batch, length, channels), to the same shape."""
        channels = x.shape[-1]
        u = ShortConv(False, name="conv")(x)
        delta, B, C, delta_bias = selective_projections(u, self.state_size, self.delta_bias_init, self.dtype)
        D = self.param("D", nn.initializers.ones, (channels,))

        def scan(name: str, reverse: bool) -> jax.Array:
            A = state_matrix(self, name, channels, self.state_size)
            options = {"delta_softplus": True, "reverse": reverse, "implementation": self.scan_implementation}
            return selective_scan(u, delta, A, B, C, D, z, delta_bias, **options)

        return scan("A_log", False) + scan("A_log_backward", True)


class PairedLayer(Layer):
    """Half of a pair that reads the same stream from both ends: x becomes (x + f(x)) + (x + flip(g(flip(x)))).

    That doubles the stream, as published; what the first layer of a pair makes waits for the second.
    """

    @nn.compact
    def __call__(self, carry: tuple, drop_rate: jax.Array, inputs: None, rotation: None) -> tuple:
        """Maps (x, the first layer's result, whether this layer is the second) to the next such triple."""
        x, first, second = carry
        y = self.update(jnp.where(second, x[:, ::-1], x), drop_rate, inputs)
        result = x + jnp.where(second, y[:, ::-1], y)
        x = jnp.where(second, first + result, x)
        state = jnp.where(second, x, result)
        return (x, result, ~second), (state if self.return_state else None)


MODELS = {"vim_ablation": VimAblation}
