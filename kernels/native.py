"""Selective scan in C++ (native.cc) through `jax.ffi`: CPU."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels import build

SOURCE = Path(__file__).with_name("native.cc")
FORWARD, BACKWARD = "vimd_selective_scan_forward", "vimd_selective_scan_backward"
CHUNK = 16  # steps between two kept states
# A group's channels are cut into ranges of no fewer and no more than these, for about so many tasks in all: long rows
# are read faster, but too few tasks leave cores idle. Each range computes its own part of the gradients of B and C.
RANGE_CHANNELS = 64, 512
TASKS = 16


def why_unavailable() -> str | None:
    """One line that says why it cannot run here, None if it can. The first call may compile, for some seconds."""
    if jax.default_backend() != "cpu":
        return f"it is for CPUs, the default backend is {jax.default_backend()}"
    return build.register(SOURCE, (FORWARD, BACKWARD), CHUNK=CHUNK)


def scan(u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse) -> tuple[jax.Array, jax.Array]:
    """See `kernels.selective_scan` for the contract."""
    B, C = B.astype(jnp.float32), C.astype(jnp.float32)
    return _scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def _scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(_forward(inputs, delta_softplus, reverse, chunks=0)[:2])


def _scan_and_keep(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, last_state, starts = _forward(inputs, delta_softplus, reverse, chunks=-(-u.shape[1] // CHUNK))
    return (y, last_state), (inputs, starts)


def _gradients(delta_softplus, reverse, residuals, cotangents):
    inputs, starts = residuals
    dy, d_last_state = cotangents
    return _backward(inputs, dy, d_last_state, starts, delta_softplus, reverse)


_scan.defvjp(_scan_and_keep, _gradients)


def _forward(inputs, delta_softplus, reverse, chunks):
    u, _, A, *_ = inputs
    batch, _, channels = u.shape
    state = A.shape[1]
    results = (
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct((batch, channels, state), jnp.float32),
        jax.ShapeDtypeStruct((batch, chunks, state, channels), jnp.float32),  # the state before every CHUNK steps
    )
    return _call(FORWARD, results, inputs, ranges=_ranges(inputs), delta_softplus=delta_softplus, reverse=reverse)


def _backward(inputs, dy, d_last_state, starts, delta_softplus, reverse):
    """Gradients of the inputs. The kernel leaves the sums over the batch and over a group's ranges to us."""
    u, _, A, B, C, D, z, delta_bias, initial_state = inputs
    ranges = _ranges(inputs)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    long, nothing = jax.ShapeDtypeStruct(u.shape, u.dtype), float32((0,))

    def each_sequence(x):
        return nothing if x is None else float32((len(u), *x.shape))

    def each_range(x):
        return each_sequence(x) if x.ndim == 2 else float32((len(u), ranges, *x.shape[1:]))

    results = (
        *(long, long, each_sequence(A), each_range(B), each_range(C)),
        *(each_sequence(D), nothing if z is None else long, each_sequence(delta_bias), each_sequence(A)),
    )
    arrays = (*inputs[:-1], dy, d_last_state, starts)
    du, d_delta, dA, dB, dC, dD, dz, d_bias, d_initial = _call(
        BACKWARD, results, arrays, ranges=ranges, delta_softplus=delta_softplus, reverse=reverse
    )
    return (
        du,
        d_delta,
        dA.sum(0),
        dB.sum(0 if B.ndim == 2 else 1),
        dC.sum(0 if C.ndim == 2 else 1),
        None if D is None else dD.sum(0),
        None if z is None else dz,
        None if delta_bias is None else d_bias.sum(0),
        None if initial_state is None else d_initial,
    )


def _ranges(inputs) -> int:
    u, _, _, B, C, *_ = inputs
    groups = max(x.shape[2] if x.ndim == 4 else 1 for x in (B, C))
    most, least = (-(-u.shape[2] // groups // channels) for channels in RANGE_CHANNELS)
    return max(least, min(most, -(-TASKS // (len(u) * groups))))


def _call(target, results, arrays, **attributes):
    """Absent arrays are passed as empty ones; vmapped axes come first, as native.cc expects them."""
    arrays = [jnp.zeros((0,), jnp.float32) if x is None else x for x in arrays]
    return jax.ffi.ffi_call(target, results, vmap_method="broadcast_all")(*arrays, **attributes)
