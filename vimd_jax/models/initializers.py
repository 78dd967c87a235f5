"""The initial distributions of the original PyTorch networks, as Flax initialisers."""

import jax
from flax import linen as nn

# PyTorch's default for the weight of a linear or convolution layer: uniform in ±1/√fan_in.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform in ±bound; with bound = 1/√fan_in PyTorch's default for the bias of a linear or convolution layer."""

    def init(key, shape, dtype=float):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
