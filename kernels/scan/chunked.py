"""Selective scan in few steps of wide operations: all chunks of time side by side, then a short scan over the chunks.

Chunks of about √length positions start from a zero state and run next to each other. A scan over the chunks then gives
the state h that each of them really starts from, and position t of a chunk receives what that state adds,

    y_t ← y_t + C_t · exp((Δ_1 + … + Δ_t) A) h

That is 3 √length steps instead of length, for not quite twice the arithmetic. Everything is an elementwise operation, a
product of matrices or a loop: meant for graphs that another runtime executes, where every operation of every step has a
price (ONNX). Any backend.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels.scan.associative import softplus
from kernels.scan.inputs import ScanInputs, ScanOptions


def scan(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
    """See `kernels.scan.api` for the contract. The gradient is JAX's own."""
    batch, length, channels = inputs.u.shape
    groups, state, width = inputs.groups, inputs.state, channels // inputs.groups
    steps = math.isqrt(length - 1) + 1
    chunks = -(-length // steps)

    def by_step(x):
        """(batch, length, n) -> (steps, batch, chunks, groups, n // groups), zeros behind the end."""
        x = jnp.flip(x, 1) if options.reverse else x
        x = jnp.pad(x, ((0, 0), (0, chunks * steps - length), (0, 0)))
        return x.reshape(batch, chunks, steps, groups, x.shape[2] // groups).transpose(2, 0, 1, 3, 4)

    def matrices(x):
        """B or C -> (steps, batch, chunks, groups, state, 1), or its last three axes for every channel if constant."""
        if x.ndim == 2:
            return jnp.broadcast_to(of_channels(x), (steps, 1, 1, groups, state, width))
        return by_step(x.reshape(batch, length, groups * state))[..., None]

    def of_channels(x):
        """(channels, state) -> (groups, state, width)."""
        return x.reshape(groups, width, state).swapaxes(1, 2)

    def read(C, h):
        """C · h over the state axis: (…, groups, width)."""
        if C.shape[-1] == 1:
            return jnp.matmul(C.swapaxes(-1, -2), h, precision="highest")[..., 0, :]
        return jnp.sum(C * h, axis=-2)

    def step(h, now):
        delta, increment, B, C = now
        h = jnp.exp(delta[..., None, :] * A) * h + B * increment[..., None, :]
        return h, read(C, h)

    def next_chunk(start, chunk):
        decay, end = chunk
        return decay * start + end, start

    def correct(_, now):
        elapsed, C, y = now
        return None, y + read(C, jnp.exp(elapsed[..., None, :] * A) * starts)

    dtype = inputs.u.dtype
    u, delta, A, B, C, D, z, delta_bias, initial_state = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    delta = delta if delta_bias is None else delta + delta_bias
    delta = softplus(delta) if options.delta_softplus else delta
    A = of_channels(A)[None, None]
    deltas, C = by_step(delta), matrices(C)
    nothing = jnp.zeros((batch, chunks, groups, state, width), jnp.float32)
    ends, y = lax.scan(step, nothing, (deltas, by_step(delta * u), matrices(B), C))

    elapsed = jnp.cumsum(deltas, axis=0)
    start = nothing[:, 0] if initial_state is None else jax.vmap(of_channels)(initial_state)
    chunk = jnp.exp(elapsed[-1][..., None, :] * A), ends
    last_state, starts = lax.scan(next_chunk, start, jax.tree.map(lambda x: x.swapaxes(0, 1), chunk))
    starts = starts.swapaxes(0, 1)
    _, y = lax.scan(correct, None, (elapsed, C, y))

    y = y.transpose(1, 2, 0, 3, 4).reshape(batch, chunks * steps, channels)[:, :length]
    y = jnp.flip(y, 1) if options.reverse else y
    y = y if D is None else y + D * u
    y = y if z is None else y * jax.nn.silu(z)
    return y.astype(dtype), last_state.swapaxes(2, 3).reshape(batch, channels, state)
