"""Selective scan in few steps of wide operations: all chunks of time side by side, then a short scan over the chunks.

Chunks of about √length positions start from a zero state and run next to each other. A scan over the chunks then gives
the state h that each of them really starts from, and position t of a chunk receives what that state adds,

    y_t ← y_t + C_t · exp((Δ_1 + … + Δ_t) A) h

That is 3 √length steps instead of length, for not quite twice the arithmetic. Everything is an elementwise operation, a
product of matrices or a loop: meant for programs that another runtime executes, where every operation of every step has
a price (ONNX). Any backend.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels.scan.inputs import ScanInputs, ScanOptions
from kernels.scan.order import gathered


@gathered
def scan(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
    """See `kernels.scan.api` for the contract. The gradient is JAX's own."""
    batch, length, channels = inputs.u.shape
    groups, state = inputs.groups, inputs.state
    steps = math.isqrt(length - 1) + 1
    chunks = -(-length // steps)

    # All that varies is (steps, batch, chunks, groups, rows, columns) before the loops, so that these reshape nothing.
    # Rows are those of the state or 1, columns the channels of a group or 1.
    def by_step(x, rows, columns):
        x = jnp.flip(x, 1) if options.reverse else x
        x = jnp.pad(x, ((0, 0), (0, chunks * steps - length), (0, 0)))
        return x.reshape(batch, chunks, steps, groups, rows, columns).transpose(2, 0, 1, 3, 4, 5)

    def by_state(x):
        """(…, channels, state) -> (…, groups, state, channels of a group)."""
        return x.reshape(*x.shape[:-2], groups, channels // groups, state).swapaxes(-1, -2)

    def matrices(x, rows, columns):
        if x.ndim == 2:
            return jnp.broadcast_to(by_state(x), (steps, 1, 1, groups, state, channels // groups))
        return by_step(x.reshape(batch, length, groups * state), rows, columns)

    def read(C, h):
        """C · h over the states; C is a row for all channels, or like h if constant in time."""
        if inputs.C.ndim == 4:
            return lax.dot_general(C, h, (((4,), (3,)), ((0, 1, 2), (0, 1, 2))), precision="highest")
        return jnp.sum(C * h, axis=-2, keepdims=True)

    def step(h, now):
        delta, increment, B, C = now
        h = jnp.exp(delta * A) * h + B * increment
        return h, read(C, h)

    def next_chunk(start, chunk):
        decay, end = chunk
        return decay * start + end, start

    def correct(_, now):
        elapsed, C, y = now
        return None, y + read(C, jnp.exp(elapsed * A) * starts)

    dtype = inputs.u.dtype
    u, delta, A, B, C, D, z, delta_bias, initial_state, _ = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    delta = delta if delta_bias is None else delta + delta_bias
    delta = softplus(delta) if options.delta_softplus else delta
    A, width = by_state(A)[None, None], channels // groups
    deltas, C = by_step(delta, 1, width), matrices(C, 1, state)
    nothing = jnp.zeros((batch, chunks, groups, state, width), jnp.float32)
    ends, y = lax.scan(step, nothing, (deltas, by_step(delta * u, 1, width), matrices(B, state, 1), C))

    elapsed = jnp.cumsum(deltas, axis=0)
    start = nothing[:, 0] if initial_state is None else by_state(initial_state)
    decays = jnp.exp(elapsed[-1] * A)
    last_state, starts = lax.scan(next_chunk, start, (decays.swapaxes(0, 1), ends.swapaxes(0, 1)))
    starts = starts.swapaxes(0, 1)
    _, y = lax.scan(correct, None, (elapsed, C, y))

    y = y.transpose(1, 2, 0, 3, 4, 5).reshape(batch, chunks * steps, channels)[:, :length]
    y = jnp.flip(y, 1) if options.reverse else y
    y = y if D is None else y + D * u
    y = y if z is None else y * jax.nn.silu(z)
    return y.astype(dtype), last_state.swapaxes(-1, -2).reshape(batch, channels, state)


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x) without a choice; above 20 it is the identity in float32, as in the published kernels."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
