"""Wraps a network of this library, a Flax Linen module, as a Flax NNX module.

python examples/flax_nnx.py
"""

import jax.numpy as jnp
from flax import nnx

from vimd_jax.models import create_model


def main() -> nnx.Module:
    """Builds the module, calls it, and takes a gradient with respect to its parameters."""
    linen = create_model("vim_tiny", num_classes=10, image_size=32, embed_dim=32, depth=2)
    images = jnp.full((2, 32, 32, 3), 0.5)
    model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(images)
    gradients = nnx.grad(lambda model: model(images).var())(model)
    print(model(images).shape, "logits;", len(nnx.to_flat_state(gradients)), "gradients")
    return model


if __name__ == "__main__":
    main()
