"""Selective scan by `lax.scan` over time, with a hand-written gradient. Any backend."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.associative import softplus


def why_unavailable() -> str | None:
    """Runs wherever JAX runs."""
    return None


def scan(u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse) -> tuple[jax.Array, jax.Array]:
    """See `kernels.selective_scan` for the contract."""
    dtype, (batch, length, channels), state = u.dtype, u.shape, A.shape[1]
    u, delta, B, C = (x.astype(jnp.float32) for x in (u, delta, B, C))
    delta = delta if delta_bias is None else delta + delta_bias
    delta = softplus(delta) if delta_softplus else delta
    groups = max(x.shape[2] if x.ndim == 4 else 1 for x in (B, C))

    def fold(x):  # (batch, length, channels) -> (length, batch, groups, channels // groups)
        return jnp.moveaxis(x, 1, 0).reshape(length, batch, groups, -1)

    def fold_matrix(
        x,
    ):  # -> (length, batch, groups, state, 1), or constant in time: (groups, state, channels // groups)
        if x.ndim == 2:
            return x.reshape(groups, -1, state).swapaxes(1, 2)
        return jnp.moveaxis(x, 1, 0)[..., None]

    def fold_state(x):  # (batch, channels, state) -> (batch, groups, state, channels // groups)
        return x.reshape(batch, groups, -1, state).swapaxes(2, 3)

    if initial_state is None:
        initial_state = jnp.zeros((batch, channels, state), jnp.float32)
    A = A.reshape(1, groups, -1, state).swapaxes(2, 3)
    y, last = _core(fold(delta), fold(u), A, fold_matrix(B), fold_matrix(C), fold_state(initial_state), reverse)
    y = jnp.moveaxis(y.reshape(length, batch, channels), 0, 1)
    y = y if D is None else y + D * u
    y = y if z is None else y * jax.nn.silu(z.astype(jnp.float32))
    return y.astype(dtype), last.swapaxes(2, 3).reshape(batch, channels, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _core(delta, u, A, B, C, initial_state, reverse):
    return _forward(delta, u, A, B, C, initial_state, reverse)[0]


def _at(x, t):
    return x if x.ndim == 3 else lax.dynamic_index_in_dim(x, t, 0, keepdims=False)


def _forward(delta, u, A, B, C, initial_state, reverse):
    def step(h, t):
        delta_t, u_t = delta[t][:, :, None], u[t][:, :, None]
        before = h
        h = jnp.exp(delta_t * A) * h + delta_t * u_t * _at(B, t)
        return h, ((h * _at(C, t)).sum(2), before)

    last, (y, states) = lax.scan(step, initial_state, jnp.arange(delta.shape[0]), reverse=reverse)
    return (y, last), (delta, u, A, B, C, states)


def _backward(reverse, residuals, cotangents):
    delta, u, A, B, C, states = residuals
    dy, dh = cotangents

    def step(carry, t):
        dh, dA, dB, dC = carry
        delta_t, u_t, dy_t = (x[t][:, :, None] for x in (delta, u, dy))
        B_t, C_t, before = _at(B, t), _at(C, t), states[t]
        decay = jnp.exp(delta_t * A)
        h = decay * before + delta_t * u_t * B_t
        dh = dh + dy_t * C_t
        through_decay = dh * decay * before
        through_input = (dh * B_t).sum(2)
        d_delta = (through_decay * A).sum(2) + through_input * u_t[:, :, 0]
        du = through_input * delta_t[:, :, 0]
        dA = dA + (through_decay * delta_t).sum(0, keepdims=True)
        dB_t, dC_t = dh * delta_t * u_t, dy_t * h
        if B.ndim == 3:
            dB, dB_t = dB + dB_t.sum(0), jnp.zeros((), jnp.float32)
        else:
            dB_t = dB_t.sum(-1, keepdims=True)
        if C.ndim == 3:
            dC, dC_t = dC + dC_t.sum(0), jnp.zeros((), jnp.float32)
        else:
            dC_t = dC_t.sum(-1, keepdims=True)
        return (dh * decay, dA, dB, dC), (d_delta, du, dB_t, dC_t)

    constant = (jnp.zeros(x.shape, jnp.float32) if x.ndim == 3 else jnp.zeros(()) for x in (B, C))
    carry, (d_delta, du, dB, dC) = lax.scan(
        step, (dh, jnp.zeros_like(A), *constant), jnp.arange(delta.shape[0]), reverse=not reverse
    )
    dh, dA, dB_constant, dC_constant = carry
    dB = dB_constant if B.ndim == 3 else dB
    dC = dC_constant if C.ndim == 3 else dC
    return d_delta, du, dA, dB, dC, dh


_core.defvjp(_forward, _backward)
