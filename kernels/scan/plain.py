"""Selective scan as one plain `lax.scan` over time, the whole batch at every step.

A step is six operations on arrays of the size of the state, with nothing to index: meant for programs that another
runtime executes operation by operation (ONNX). Any backend.
"""

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
    width = channels // groups

    # All that varies in time is (length, batch, groups, rows, columns), in the order of the steps: rows are those of
    # the state or 1, columns the channels of a group or 1.
    def by_step(x, rows, columns):
        x = jnp.flip(x, 1) if options.reverse else x
        return x.reshape(batch, length, groups, rows, columns).swapaxes(0, 1)

    def by_state(x):
        """(…, channels, state) -> (…, groups, state, channels of a group)."""
        return x.reshape(*x.shape[:-2], groups, width, state).swapaxes(-1, -2)

    def step(h, now):
        delta, increment, *matrices = now
        B, C = (x if constant is None else constant for x, constant in zip(matrices, constants))
        h = jnp.exp(delta * A) * h + (B * increment if inputs.B.ndim == 2 else product(B, increment))
        return h, read(C, h)

    def product(x, y):
        """x · y for every image and group; a matrix product takes the runtime less than a product by broadcasting."""
        return lax.dot_general(x, y, (((3,), (2,)), ((0, 1), (0, 1))), precision="highest")

    def read(C, h):
        """C · h over the states."""
        return jnp.sum(C * h, axis=-2, keepdims=True) if inputs.C.ndim == 2 else product(C, h)

    dtype = inputs.u.dtype
    u, delta, A, B, C, D, z, delta_bias, initial_state, _ = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    delta = delta if delta_bias is None else delta + delta_bias
    delta = softplus(delta) if options.delta_softplus else delta
    A = by_state(A)[None]  # as many axes as the state, so that a step reshapes nothing
    constants = [by_state(x)[None] if x.ndim == 2 else None for x in (B, C)]
    matrices = [
        None if x.ndim == 2 else by_step(x.reshape(batch, length, -1), *shape)
        for x, shape in ((B, (state, 1)), (C, (1, state)))
    ]
    start = jnp.zeros((batch, channels, state), jnp.float32) if initial_state is None else initial_state
    steps = by_step(delta, 1, width), by_step(delta * u, 1, width), *matrices
    last_state, y = lax.scan(step, by_state(start), steps)

    y = y.swapaxes(0, 1).reshape(batch, length, channels)
    y = jnp.flip(y, 1) if options.reverse else y
    y = y if D is None else y + D * u
    y = y if z is None else y * jax.nn.silu(z)
    return y.astype(dtype), last_state.swapaxes(-1, -2).reshape(batch, channels, state)


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x) without a choice, in few operations; from 20 on it is the identity in float32. e^80 is finite."""
    return jnp.maximum(x, jnp.log1p(jnp.exp(jnp.minimum(x, 80))))
