"""Orders of traversal for implementations that scan arrays as they lie: they gather before and after the scan."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.scan.inputs import ScanInputs, ScanOptions


def gathered(scan: Callable) -> Callable:
    """Makes a `scan(inputs, options)` that follows `inputs.order` of one that does not."""

    @functools.wraps(scan)
    def scan_in_order(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
        if inputs.order is None:
            return scan(inputs, options)
        y, last_state = scan(_to_sequences(inputs), options)
        return _to_positions(y, inputs.order, inputs.u.shape[1]), last_state

    return scan_in_order


def _to_sequences(inputs: ScanInputs) -> ScanInputs:
    """Brings what varies in time to the order of each group's steps; where a step has no position it is zero."""
    (groups, length), positions = inputs.order.shape, inputs.u.shape[1]

    def gather(x):
        """(batch, positions, groups or 1, …) -> (batch, length, groups, …)."""
        if length > positions:  # -1 refers to the last row
            x = jnp.pad(x, ((0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)))
        group = jnp.arange(groups) if x.shape[2] == groups else 0
        return x.at[:, inputs.order.T, group].get(mode="promise_in_bounds")

    def long(x):
        if x is None:
            return None
        parts = x.reshape(*x.shape[:2], -1, inputs.channels // groups)
        return gather(parts).reshape(x.shape[0], length, inputs.channels)

    u, delta, z = map(long, (inputs.u, inputs.delta, inputs.z))
    B, C = (x if x.ndim == 2 else gather(x) for x in (inputs.B, inputs.C))
    return inputs._replace(u=u, delta=delta, B=B, C=C, z=z, order=None)


def _to_positions(y: jax.Array, order: jax.Array, positions: int) -> jax.Array:
    """Brings (batch, length, channels) from the order of each group's steps back to (batch, positions, channels)."""
    groups, length = order.shape
    group = jnp.arange(groups)
    steps = jnp.zeros((positions + 1, groups), jnp.int32)  # the last row is that of steps without a position
    steps = steps.at[order.T, group].set(jnp.arange(length, dtype=jnp.int32)[:, None])[:positions]
    parts = y.reshape(y.shape[0], length, groups, -1)
    return parts.at[:, steps, group].get(mode="promise_in_bounds").reshape(y.shape[0], positions, -1)
