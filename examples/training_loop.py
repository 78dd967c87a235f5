"""Trains a network of `create_model` in a plain JAX loop: a small Vim finds the corner that has a light square.

python examples/training_loop.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vimd_jax.models import create_model


def batch(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Dark, noisy images (size, 32, 32, 3) in [0, 1], and the corner (size,) in which each has a light square."""
    images = rng.uniform(0, 0.5, (size, 2, 16, 2, 16, 3)).astype(np.float32)
    corners = rng.integers(4, size=size)
    images[np.arange(size), corners // 2, 4:12, corners % 2, 4:12] += 0.5
    return images.reshape(size, 32, 32, 3), corners


def main(steps: int = 60) -> float:
    """Trains and returns the accuracy on new images."""
    rng = np.random.default_rng(0)
    model = create_model("vim_tiny", num_classes=4, image_size=32, patch_size=8, stride=8, embed_dim=32, depth=2)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))
    state = optimizer.init(variables["params"])

    @jax.jit
    def train_step(params, state, images, labels):
        def loss(params):
            logits = model.apply({"params": params}, images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params = variables["params"]
    for step in range(1, steps + 1):
        params, state, loss = train_step(params, state, *batch(rng, 32))
        if step % 20 == 0:
            print(f"step {step}  loss {loss:.3f}")
    images, labels = batch(rng, 200)
    accuracy = float((model.apply({"params": params}, images).argmax(axis=-1) == labels).mean())
    print(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
