"""Selective scan in C++ (native.cc) through `jax.ffi`: CPU."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels import build
from kernels.scan.differentiation import differentiable
from kernels.scan.inputs import ScanInputs, ScanOptions, vary_like, zeros

SOURCE = Path(__file__).with_name("native.cc")
FORWARD, BACKWARD = "vimd_selective_scan_forward", "vimd_selective_scan_backward"
CHUNK = 16  # steps between two kept states
# A group's channels are cut into ranges of no fewer and no more than these, for about so many tasks in all: long rows
# are read faster, but too few tasks leave cores idle. Each range computes its own part of the gradients of B and C.
RANGE_CHANNELS = 64, 512
TASKS = 16

_float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def why_unavailable(platform: str, inputs: ScanInputs) -> str | None:
    """Returns one line that explains why it cannot run, None if it can. The first call may compile for some seconds."""
    if platform != "cpu":
        return f"it is for CPUs, and JAX runs on {platform} here"
    return build.register(SOURCE, (FORWARD, BACKWARD), CHUNK=CHUNK)


def forward(inputs: ScanInputs, options: ScanOptions, save: bool) -> tuple:
    """Computes y, the last state and, if asked, the state before every `CHUNK` steps."""
    chunks = -(-inputs.length // CHUNK) if save else 0
    results = (
        jax.ShapeDtypeStruct(inputs.u.shape, inputs.u.dtype),
        _float32((inputs.batch, inputs.channels, inputs.state)),
        _float32((inputs.batch, chunks, inputs.state, inputs.channels)),
    )
    y, last_state, starts = _call(FORWARD, results, inputs, options, _ranges(inputs))
    return y, last_state, starts if save else None


def backward(inputs: ScanInputs, starts, dy, d_last_state, options: ScanOptions) -> ScanInputs:
    """Computes the gradients of the inputs; the sums over the batch and over a group's ranges are left to XLA."""
    ranges, nothing = _ranges(inputs), _float32((0,))
    long = jax.ShapeDtypeStruct(inputs.u.shape, inputs.u.dtype)

    def each_sequence(x):
        return nothing if x is None else _float32((inputs.batch, *x.shape))

    def each_range(x):
        return each_sequence(x) if x.ndim == 2 else _float32((inputs.batch, ranges, *x.shape[1:]))

    partial = ScanInputs(
        u=long,
        delta=long,
        A=each_sequence(inputs.A),
        B=each_range(inputs.B),
        C=each_range(inputs.C),
        D=each_sequence(inputs.D),
        z=nothing if inputs.z is None else long,
        delta_bias=each_sequence(inputs.delta_bias),
        initial_state=each_sequence(inputs.A),
    )
    partial = _call(BACKWARD, partial, (*inputs[:-1], dy, d_last_state, starts), options, ranges)

    def total(x, partial):
        if x is None:
            return None
        return partial if partial.ndim == x.ndim else partial.sum(1 if x.ndim == 4 else 0)

    return ScanInputs(*map(total, inputs, partial))


scan = differentiable(forward, backward, saved="b..c")


def _ranges(inputs: ScanInputs) -> int:
    per_group = inputs.channels // inputs.groups
    most, least = (-(-per_group // channels) for channels in RANGE_CHANNELS)
    return max(least, min(most, -(-TASKS // (inputs.batch * inputs.groups))))


def _call(target: str, results: tuple, arrays: tuple, options: ScanOptions, ranges: int):
    """Absent arrays are passed as empty ones; vmapped axes come first, as native.cc expects them."""
    arrays = [zeros((0,), like=arrays[0]) if x is None else x for x in arrays]
    call = jax.ffi.ffi_call(target, results, vmap_method="broadcast_all")
    outputs = call(*arrays, ranges=ranges, delta_softplus=options.delta_softplus, reverse=options.reverse)
    return jax.tree.map(lambda x: vary_like(x, arrays[0]), outputs)
