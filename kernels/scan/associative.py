"""Selective scan by `lax.associative_scan`: logarithmic depth, at the price of every state in memory. Any backend."""

import jax
import jax.numpy as jnp

from kernels.scan.inputs import ScanInputs, ScanOptions


def scan(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
    """See `kernels.scan.api` for the contract. The gradient is JAX's own."""
    dtype, first, last = inputs.u.dtype, *((-1, 0) if options.reverse else (0, -1))
    u, delta, A, B, C, D, z, delta_bias, initial_state = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    delta = delta if delta_bias is None else delta + delta_bias
    delta = softplus(delta) if options.delta_softplus else delta
    decay = jnp.exp(delta[..., None] * A)
    increment = (delta * u)[..., None] * _per_channel(B, inputs.channels)
    if initial_state is not None:
        increment = increment.at[:, first].add(decay[:, first] * initial_state)
    _, states = jax.lax.associative_scan(_compose, (decay, increment), reverse=options.reverse, axis=1)
    y = jnp.sum(states * _per_channel(C, inputs.channels), axis=-1)
    y = y if D is None else y + D * u
    y = y if z is None else y * jax.nn.silu(z)
    return y.astype(dtype), states[:, last]


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x), the identity above 20 as in the published kernels."""
    large = x > 20
    return jnp.where(large, x, jnp.log1p(jnp.exp(jnp.where(large, 0, x))))


def _compose(earlier, later):
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def _per_channel(x: jax.Array, channels: int) -> jax.Array:
    """B or C -> something that broadcasts against (batch, length, channels, state)."""
    if x.ndim == 2 or x.shape[2] == 1:
        return x
    return jnp.repeat(x, channels // x.shape[2], axis=2)
