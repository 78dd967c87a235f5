"""Depthwise convolution in C++ (native.cc) through `jax.ffi`: CPU."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels import build
from kernels.convolution.inputs import ConvolutionInputs, ConvolutionOptions
from kernels.scan.differentiation import LONG, on_devices, refuse_forward_mode
from kernels.scan.inputs import vary_like

SOURCE = Path(__file__).with_name("native.cc")
FORWARD, BACKWARD = "vimd_depthwise_convolution_forward", "vimd_depthwise_convolution_backward"
FILTERS = (3, 3), (1, 4)  # rows and columns

_LAYOUT = ConvolutionInputs(u=LONG, kernel="..c", bias="c")


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
    return refuse_forward_mode(lambda inputs: _in_reverse_mode(inputs, options))(inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _in_reverse_mode(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    return on_devices(_forward, (_LAYOUT,), LONG, None, (options,))(inputs)


def _forward(inputs: ConvolutionInputs, options: ConvolutionOptions) -> jax.Array:
    return _call(FORWARD, _like(inputs.u), inputs, options)


def _backward(inputs: ConvolutionInputs, dy: jax.Array, options: ConvolutionOptions) -> ConvolutionInputs:
    """Computes the gradients of the inputs; the sums over the batch are left to XLA."""
    images = len(inputs.u)
    results = _like(inputs.u), *(jax.ShapeDtypeStruct((images, *x.shape), jnp.float32) for x in inputs[1:])
    du, *of_images = _call(BACKWARD, results, (*inputs, dy), options)
    return ConvolutionInputs(du, *(x.sum(0) for x in of_images))


_in_reverse_mode.defvjp(
    lambda inputs, options: (_in_reverse_mode(inputs, options), inputs),
    lambda options, *arrays: (on_devices(_backward, (_LAYOUT, LONG), _LAYOUT, None, (options,))(*arrays),),
)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _call(target: str, results, arrays: tuple, options: ConvolutionOptions):
    top, left = options.before
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    outputs = call(*arrays, rows=options.rows, top=top, left=left, silu=options.silu)
    return jax.tree.map(lambda x: vary_like(x, arrays[0]), outputs)
