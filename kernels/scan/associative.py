"""Selective scan by `lax.associative_scan` within chunks of time, in plain JAX: any backend, every derivative.

A loop over the chunks carries the state. Chunks are short, so that their states take little memory, and the gradient
computes them again: it keeps the state between chunks only.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.scan.inputs import ScanInputs, ScanOptions, zeros
from kernels.scan.order import gathered

CHUNK = 8  # steps; longer chunks take more memory, at 730 steps more than 1.5 times the inputs and results


@gathered
def scan(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
    """See `kernels.scan.api` for the contract. Its derivatives are JAX's own."""
    batch, length, channels = inputs.u.shape
    missing = -length % CHUNK  # steps of the last chunk; for the reverse direction they come first
    width = (missing, 0) if options.reverse else (0, missing)

    def split(x):
        x = jnp.pad(x, ((0, 0), width, *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)

    varying = {name: getattr(inputs, name) for name in ("u", "delta", "B", "C", "z")}
    varying = {name: split(x) for name, x in varying.items() if x is not None and x.ndim > 2}
    exists = split(jnp.ones((1, length, 1), bool))

    @functools.partial(jax.checkpoint, prevent_cse=False)  # as the documentation advises for the body of a scan
    def chunk(state, parts):
        exists, varying = parts
        part = jax.tree.map(lambda x: x.astype(jnp.float32), inputs._replace(**varying))
        states, y = _scan_chunk(part, exists, state, options)
        return states[:, 0 if options.reverse else -1], y.astype(inputs.u.dtype)

    state = inputs.initial_state
    if state is None:
        state = zeros((batch, *inputs.A.shape), like=inputs.u)
    last_state, y = jax.lax.scan(chunk, state, (exists, varying), reverse=options.reverse)
    return y.swapaxes(0, 1).reshape(batch, -1, channels)[:, width[0] : width[0] + length], last_state


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x), the identity above 20 as in the published kernels."""
    large = x > 20
    return jnp.where(large, x, jnp.log1p(jnp.exp(jnp.where(large, 0, x))))


def _scan_chunk(inputs: ScanInputs, exists, state, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
    """Computes all states, (batch, CHUNK, channels, state), and y; steps that do not exist leave the state as it is."""
    u, delta, A, B, C, D, z, delta_bias = inputs[:-2]
    delta = delta if delta_bias is None else delta + delta_bias
    delta = softplus(delta) if options.delta_softplus else delta
    delta = jnp.where(exists, delta, 0)
    decay = jnp.exp(delta[..., None] * A)
    increment = (delta * u)[..., None] * _per_channel(B, inputs.channels)
    decay, states = jax.lax.associative_scan(_compose, (decay, increment), reverse=options.reverse, axis=1)
    states += decay * state[:, None]
    y = jnp.sum(states * _per_channel(C, inputs.channels), axis=-1)
    y = y if D is None else y + D * u
    return states, y if z is None else y * jax.nn.silu(z)


def _compose(earlier, later):
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def _per_channel(x: jax.Array, channels: int) -> jax.Array:
    """Repeats B or C so that it broadcasts against (batch, length, channels, state)."""
    if x.ndim == 2 or x.shape[2] == 1:
        return x
    return jnp.repeat(x, channels // x.shape[2], axis=2)
