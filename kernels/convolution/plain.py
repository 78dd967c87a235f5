"""Depthwise convolution in few operations, for programs that another runtime executes operation by operation (ONNX)."""

import jax

from kernels.convolution.inputs import ConvolutionInputs, ConvolutionOptions
from kernels.convolution.shifted import in_order, shifted_sum


def convolve(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    """See `kernels.convolution.api`. The gradient is JAX's own, and slow."""
    return in_order(lambda inputs: shifted_sum(inputs, options, broadcast=False), inputs)
