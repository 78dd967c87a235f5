"""Depthwise convolution as the one operation of that name, for programs that another runtime executes operation by
operation (ONNX). XLA's own is slow on a CPU.
"""

import jax
import jax.numpy as jnp

from kernels.convolution.inputs import ConvolutionInputs, ConvolutionOptions
from kernels.convolution.shifted import in_order


@in_order
def convolve(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    """See `kernels.convolution.api`. The gradient is JAX's own, and slow."""
    batch, tokens, channels = inputs.u.shape
    maps = inputs.u.astype(jnp.float32).reshape(batch, options.rows, tokens // options.rows, channels)
    padding = [(before, side - 1 - before) for before, side in zip(options.before, inputs.kernel.shape)]
    y = inputs.bias + jax.lax.conv_general_dilated(
        maps,
        inputs.kernel[:, :, None],
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        precision="highest",
    )
    return (jax.nn.silu(y) if options.silu else y).astype(inputs.u.dtype).reshape(inputs.u.shape)
