"""Selective scan in C++ (native.cc) through `jax.ffi`: CPU.

There, groups of channels are scanned like sequences of their own: what varies in time is (groups * batch, positions,
…), so that a projection with different weights in each group needs no transposition before the scan. Everything else
but A ends in all channels, the states and the matrices that are constant in time in (state, channels).
"""

import functools
from pathlib import Path
from platform import machine

import jax
import jax.numpy as jnp

from kernels import build
from kernels.scan.differentiation import differentiable, join, split, sum_groups
from kernels.scan.inputs import ScanInputs, ScanOptions, vary_like, zeros

SOURCE = Path(__file__).with_name("native.cc")
FORWARD, BACKWARD = "vimd_selective_scan_forward", "vimd_selective_scan_backward"
CHUNK = 16  # steps between two kept states
# A group's channels are cut into ranges of no fewer and no more than these, for about so many tasks in all: long rows
# are read faster, but too few tasks leave cores idle. Each range computes its own part of the gradients of B and C.
# On ARM the fewest are 48, so that one sequence of 192 or 384 channels is even work for four cores.
RANGE_CHANNELS = 48 if machine() in ("aarch64", "arm64") else 64, 512
TASKS = 16

_float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def why_unavailable(platform: str, inputs: ScanInputs) -> str | None:
    """Returns one line that explains why it cannot run, None if it can. The first call may compile for some seconds."""
    if platform != "cpu":
        return f"it is for CPUs, and JAX runs on {platform} here"
    return build.register(SOURCE, (FORWARD, BACKWARD), CHUNK=CHUNK)


def forward(inputs: ScanInputs, options: ScanOptions, save: bool) -> tuple:
    """Computes y, the last state and, if asked, the state before every `CHUNK` steps."""
    batch, state, channels = inputs.batch, inputs.state, inputs.channels
    chunks = -(-inputs.length // CHUNK) if save else 0
    results = _like_delta(inputs), _float32((batch, state, channels)), _float32((batch, chunks, state, channels))
    y, last_state, starts = _call(FORWARD, results, inputs, (_swap(inputs.initial_state),), options)
    return join(y, inputs.groups), _swap(last_state), starts if save else None


def backward(inputs: ScanInputs, starts, dy, d_last_state, options: ScanOptions) -> ScanInputs:
    """Computes the gradients of the inputs; the sums over the batch and over a group's ranges are left to XLA."""
    long, nothing, groups = _like_delta(inputs), _float32((0,)), inputs.groups
    states = _float32((inputs.batch, inputs.state, inputs.channels))
    matrices = _float32((long.shape[0], _ranges(inputs), long.shape[1], inputs.state))
    vectors = _float32((inputs.batch, inputs.channels))
    partial = ScanInputs(
        u=long,
        delta=long,
        A=_float32((inputs.batch, *inputs.A.shape)),
        B=states if inputs.B.ndim == 2 else matrices,
        C=states if inputs.C.ndim == 2 else matrices,
        D=nothing if inputs.D is None else vectors,
        z=nothing if inputs.z is None else long,
        delta_bias=nothing if inputs.delta_bias is None else vectors,
        initial_state=states,
    )
    incoming = split(dy, groups), _swap(d_last_state), starts
    grads = ScanInputs(*_call(BACKWARD, partial[:-1], inputs, incoming, options))

    def source(x, grad):
        """The gradient of u or z, which all groups may have read."""
        if x is None:
            return None
        return join(grad, groups) if x.shape[2] == inputs.channels else sum_groups(grad, groups)

    def matrix(x, grad):
        return _swap(grad.sum(0)) if x.ndim == 2 else join(grad.sum(1), groups).reshape(x.shape)

    return ScanInputs(
        u=source(inputs.u, grads.u),
        delta=join(grads.delta, groups),
        A=grads.A.sum(0),
        B=matrix(inputs.B, grads.B),
        C=matrix(inputs.C, grads.C),
        D=None if inputs.D is None else grads.D.sum(0),
        z=source(inputs.z, grads.z),
        delta_bias=None if inputs.delta_bias is None else grads.delta_bias.sum(0),
        initial_state=None if inputs.initial_state is None else _swap(grads.initial_state),
    )


scan = differentiable(forward, backward, saved="b..c")


def _ranges(inputs: ScanInputs) -> int:
    per_group = inputs.channels // inputs.groups
    most, least = (-(-per_group // channels) for channels in RANGE_CHANNELS)
    return max(least, min(most, -(-TASKS // (inputs.batch * inputs.groups))))


def _call(target: str, results: tuple, inputs: ScanInputs, others: tuple, options: ScanOptions):
    """Absent arrays are passed as empty ones; vmapped axes come first, as native.cc expects them."""
    groups, width = inputs.groups, inputs.channels // inputs.groups
    u, z = (x if x is None else split(x, x.shape[2] // width) for x in (inputs.u, inputs.z))
    B, C = (_swap(x) if x.ndim == 2 else split(x, groups) for x in (inputs.B, inputs.C))
    delta = split(inputs.delta, groups)
    order = jnp.zeros((0,), jnp.int32) if inputs.order is None else inputs.order
    arrays = u, delta, inputs.A, B, C, inputs.D, z, inputs.delta_bias, order, *others
    arrays = [zeros((0,), like=u) if x is None else x for x in arrays]
    call = jax.ffi.ffi_call(target, results, vmap_method="broadcast_all")
    flags = dict(delta_softplus=options.delta_softplus, reverse=options.reverse)
    return jax.tree.map(lambda x: vary_like(x, u), call(*arrays, ranges=_ranges(inputs), **flags))


def _like_delta(inputs: ScanInputs) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda x: split(x, inputs.groups), inputs.delta)


def _swap(x: jax.Array | None) -> jax.Array | None:
    """Swaps the last two axes."""
    return None if x is None else x.swapaxes(-1, -2)
