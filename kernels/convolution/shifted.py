"""Depthwise convolution as a sum of shifted products: any backend.

On a CPU 10 to 30 times faster than XLA's grouped convolution, on a GPU one fused loop.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.convolution.inputs import ConvolutionInputs, ConvolutionOptions


def in_order(convolve: Callable) -> Callable:
    """Makes a `convolve(inputs, options)` that follows `inputs.order` of one that does not, by gathering."""

    @functools.wraps(convolve)
    def convolve_in_order(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
        if inputs.order is None:
            return convolve(inputs, options)
        batch, positions, _ = inputs.u.shape
        group = jnp.arange(inputs.groups)

        def gather(x, order):
            parts = x.reshape(batch, positions, -1, inputs.kernel.shape[2] // inputs.groups)
            parts = parts.at[:, order.T, group if parts.shape[2] > 1 else 0].get(mode="promise_in_bounds")
            return parts.reshape(batch, positions, -1)

        y = convolve(inputs._replace(u=gather(inputs.u, inputs.order), order=None), options)
        return gather(y, jnp.argsort(inputs.order, axis=1))

    return convolve_in_order


@in_order
def convolve(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    """See `kernels.convolution.api`."""
    # Recomputed in the backward pass, which would otherwise keep every shifted copy of x.
    return jax.checkpoint(functools.partial(_shifted_sum, options=options), prevent_cse=False)(inputs)


def _shifted_sum(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    batch, tokens, channels = inputs.u.shape
    height, width = options.rows, tokens // options.rows
    rows, columns, _ = inputs.kernel.shape
    top, left = options.before
    padding = (0, 0), (top, rows - 1 - top), (left, columns - 1 - left), (0, 0)
    x = jnp.pad(inputs.u.reshape(batch, height, width, channels), padding)
    # Broadcast in one step, so that the gradient of each tap is one sum over images and positions: over positions
    # alone, XLA's sum of products is far slower (on a CPU, JAX 0.10).
    taps = jnp.broadcast_to(inputs.kernel[:, :, None, None, None], (rows, columns, batch, height, width, channels))
    products = (x[:, i : i + height, j : j + width] * taps[i, j] for i in range(rows) for j in range(columns))
    y = inputs.bias + sum(products)
    return (jax.nn.silu(y) if options.silu else y).astype(inputs.u.dtype).reshape(inputs.u.shape)
