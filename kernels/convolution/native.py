"""Depthwise convolution in C++ (native.cc) through `jax.ffi`: CPU.

There, groups of channels are images of their own, (groups * batch, positions, channels), as in the native scan.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels import build
from kernels.convolution.inputs import ConvolutionInputs, ConvolutionOptions
from kernels.scan.differentiation import LONG, join, on_devices, refuse_forward_mode, split, sum_groups
from kernels.scan.inputs import vary_like

SOURCE = Path(__file__).with_name("native.cc")
FORWARD, BACKWARD = "vimd_depthwise_convolution_forward", "vimd_depthwise_convolution_backward"
FILTERS = (3, 3), (1, 4)  # rows and columns


def why_unavailable(platform: str, inputs: ConvolutionInputs | None) -> str | None:
    """Returns one line that explains why it cannot run, None if it can. The first call may compile for some seconds."""
    if platform != "cpu":
        return f"it is for CPUs, and JAX runs on {platform} here"
    if inputs and inputs.u.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes float32 and bfloat16, not {inputs.u.dtype}"
    if inputs and inputs.kernel.shape[:2] not in FILTERS:
        return f"it has filters of 3 by 3 and 1 by 4, not of {inputs.kernel.shape[:2]}"
    return build.register(SOURCE, (FORWARD, BACKWARD))


def convolve(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    """See `kernels.convolution.api`."""
    order = inputs.order  # integers have no tangents
    return refuse_forward_mode(lambda inputs: _in_reverse_mode(inputs._replace(order=order), options))(
        inputs._replace(order=None)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _in_reverse_mode(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    layout, size = _layout(inputs)
    return on_devices(_forward, (layout,), LONG, size, (options,))(inputs)


def _forward(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    return join(_call(FORWARD, _result(inputs), inputs, (), options), inputs.groups)


def _backward(inputs: ConvolutionInputs, dy: jax.Array, options: ConvolutionOptions) -> ConvolutionInputs:
    """Computes the gradients of the inputs; the sums over the batch are left to XLA."""
    batch, groups, y = len(inputs.u), inputs.groups, _result(inputs)
    weights = (jax.ShapeDtypeStruct((batch, *x.shape), jnp.float32) for x in (inputs.kernel, inputs.bias))
    du, *of_images = _call(BACKWARD, (y, *weights), inputs, (split(dy, groups),), options)
    shared = inputs.u.shape[2] < inputs.kernel.shape[2]
    du = sum_groups(du, groups) if shared else join(du, groups)
    return ConvolutionInputs(du, *(x.sum(0) for x in of_images))


def _gradients(options: ConvolutionOptions, inputs: ConvolutionInputs, dy: jax.Array) -> tuple[ConvolutionInputs]:
    layout, size = _layout(inputs)
    return (on_devices(_backward, (layout, LONG), layout._replace(order=None), size, (options,))(inputs, dy),)


_in_reverse_mode.defvjp(lambda inputs, options: (_in_reverse_mode(inputs, options), inputs), _gradients)


def _layout(inputs: ConvolutionInputs) -> tuple[ConvolutionInputs, int | None]:
    """The layout of the inputs, and the channels in each of several groups."""
    channels, groups = inputs.kernel.shape[2], inputs.groups
    source = LONG if inputs.u.shape[2] == channels else "b.."
    order = None if inputs.order is None else "g." if groups > 1 else ".."
    return ConvolutionInputs(source, "..c", "c", order), channels // groups if groups > 1 else None


def _result(inputs: ConvolutionInputs) -> jax.ShapeDtypeStruct:
    batch, positions, _ = inputs.u.shape
    shape = inputs.groups * batch, positions, inputs.kernel.shape[2] // inputs.groups
    return jax.ShapeDtypeStruct(shape, inputs.u.dtype)


def _call(target: str, results, inputs: ConvolutionInputs, others: tuple, options: ConvolutionOptions):
    u = split(inputs.u, inputs.u.shape[2] * inputs.groups // inputs.kernel.shape[2])
    order = jnp.zeros((0,), jnp.int32) if inputs.order is None else inputs.order
    top, left = options.before
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    flags = dict(rows=options.rows, top=top, left=left, silu=options.silu)
    outputs = call(u, inputs.kernel, inputs.bias, order, *others, **flags)
    return jax.tree.map(lambda x: vary_like(x, inputs.u), outputs)
