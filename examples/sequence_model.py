"""Uses the selective scan alone, in a sequence model that learns to remember the last marked number.

    python examples/sequence_model.py

A sequence holds pairs (number, mark). The scan selects what enters its state, since Δ and B depend on the input.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kernels import selective_scan

LENGTH, CHANNELS, STATE = 48, 16, 4


def batch(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (size, LENGTH, 2) of a number and a mark, and each one's last marked number (size,)."""
    numbers = rng.normal(size=(size, LENGTH)).astype(np.float32)
    marks = rng.random((size, LENGTH)) < 0.1
    marks[:, 0] = True
    last = LENGTH - 1 - marks[:, ::-1].argmax(axis=1)
    return np.stack([numbers, marks], axis=-1).astype(np.float32), numbers[np.arange(size), last]


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Initial parameters: projections of the input, and the decay rates A = -exp(A_log)."""
    shapes = {"u": (2, CHANNELS), "delta": (2, CHANNELS), "B": (2, STATE), "C": (2, STATE), "out": (CHANNELS, 1)}
    keys = jax.random.split(key, len(shapes))
    params = {name: jax.random.normal(key, shape) / 2 for key, (name, shape) in zip(keys, shapes.items())}
    params |= {f"{name}_bias": jnp.zeros(shapes[name][1]) for name in ("delta", "B", "C")}
    return params | {"A_log": jnp.log(jnp.tile(jnp.arange(1.0, STATE + 1), (CHANNELS, 1)))}


def predict(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Applies the model: (batch, LENGTH, 2) -> (batch,)."""
    B, C = (x @ params[name] + params[f"{name}_bias"] for name in ("B", "C"))
    y = selective_scan(
        x @ params["u"],
        x @ params["delta"],
        -jnp.exp(params["A_log"]),
        B,
        C,
        delta_bias=params["delta_bias"],
        delta_softplus=True,
    )
    return (y[:, -1] @ params["out"])[:, 0]


def main(steps: int = 300) -> tuple[float, float]:
    """Trains; returns the mean squared error on new sequences before and after."""
    rng = np.random.default_rng(0)
    params = init(jax.random.key(0))
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    def loss(params, x, y):
        return jnp.mean((predict(params, x) - y) ** 2)

    @jax.jit
    def train_step(params, state, x, y):
        gradients = jax.grad(loss)(params, x, y)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    test = batch(rng, 500)
    before = float(loss(params, *test))
    for _ in range(steps):
        params, state = train_step(params, state, *batch(rng, 64))
    after = float(loss(params, *test))
    print(f"mean squared error {before:.2f} before training, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
