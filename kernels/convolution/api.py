"""The public function: it brings its arguments to one form and passes them to an implementation:

    native   C++ through `jax.ffi`: CPU, where it was compiled
    shifted  a sum of shifted products: any backend
    plain    one grouped convolution: any backend, for programs that another runtime executes (ONNX)

Each is a module beside this one with convolve(inputs: ConvolutionInputs, options: ConvolutionOptions) -> y like u.
"""

import jax
import jax.numpy as jnp
from jax.sharding import auto_axes

from kernels.choice import OPERATIONS, Implementations
from kernels.convolution.inputs import ConvolutionInputs, ConvolutionOptions
from kernels.scan.inputs import vary_like

IMPLEMENTATIONS = OPERATIONS["convolution"] = Implementations(
    operation="convolution",
    title="depthwise convolution",
    package="kernels.convolution",
    names=("native", "plain", "shifted"),
    fastest_first={"cpu": ("native", "shifted")},
)


def depthwise_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    before: tuple[int, int],
    silu: bool = False,
    order: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Convolves each channel of a map with its own filter, and applies SiLU if asked.

        y[r, c] = bias + Σ_ij kernel[i, j] x[r + i - before[0], c + j - before[1]], with zeros beyond the borders

    Sums are float32 whatever x is. The backward pass keeps x alone; "native" has no forward mode and no second
    derivatives.

    Args:
      x: (batch, rows, columns, channels), any floating dtype.
      kernel: (filter's rows, filter's columns, channels).
      bias: (channels,); None for 0.
      before: zeros before the first row and before the first column.
      silu: apply x · sigmoid(x) to the result.
      order: (groups, rows * columns) integers, each position once in every group: groups of channels convolve the map
        in orders of their own. Position r * columns + c of a group's map is read from and written to the position
        named there, so that x and the result lie alike. x may have channels // groups, which every group reads.
      implementation: "native", "shifted" or "plain"; None takes the one named by `kernels.use`, else the fastest that
        can run.

    Returns:
      The map, (batch, rows, columns, channels) in the dtype of x.

    Raises:
      ValueError: a shape is wrong, or the implementation is unknown or cannot run here.
    """
    groups = 1 if order is None else len(order)
    if x.ndim != 4 or kernel.ndim != 3 or kernel.shape[2] not in (x.shape[3], groups * x.shape[3]):
        raise ValueError(f"kernel: shape is {kernel.shape}, expected (rows, columns, channels) for x of {x.shape}")
    batch, rows, columns, _ = x.shape
    channels = kernel.shape[2]
    if order is not None and (order.shape[1:] != (rows * columns,) or channels % groups):
        raise ValueError(f"order: shape is {order.shape}, expected (groups, {rows * columns}), groups of {channels}")
    bias = jnp.zeros(channels, jnp.float32) if bias is None else bias.astype(jnp.float32)
    flat = x.reshape(batch, rows * columns, -1)
    kernel, bias = (vary_like(array, x) for array in (kernel.astype(jnp.float32), bias))
    options = ConvolutionOptions(rows, tuple(before), silu)

    def convolve(inputs):
        return IMPLEMENTATIONS.call("convolve", implementation, inputs, options)

    sharding = jax.typeof(flat).sharding
    if explicit := sharding.mesh.explicit_axes:
        convolve = auto_axes(convolve, axes=explicit, out_sharding=sharding)
    order = None if order is None else jnp.asarray(order, jnp.int32)
    return convolve(ConvolutionInputs(flat, kernel, bias, order)).reshape(batch, rows, columns, channels)
