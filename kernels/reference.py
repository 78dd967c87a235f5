"""The selective scan as a plain float64 NumPy loop: it defines the semantics, and tests compare against it."""

import numpy as np


def scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, *, delta_softplus=False, reverse=False
) -> tuple[np.ndarray, np.ndarray]:
    """Arguments as in `kernels.selective_scan`, B and C in any of its forms; returns (y, last state) in float64."""
    u, delta, A, B, C = (np.asarray(x, np.float64) for x in (u, delta, A, B, C))
    batch, length, channels = u.shape
    if delta_bias is not None:
        delta = delta + np.asarray(delta_bias, np.float64)
    if delta_softplus:
        delta = np.where(delta > 20, delta, np.log1p(np.exp(np.minimum(delta, 20))))
    B, C = (_per_channel(x, u.shape) for x in (B, C))
    y = np.zeros_like(u)
    h = np.zeros((batch, channels, A.shape[1])) if initial_state is None else np.asarray(initial_state, np.float64)
    for t in reversed(range(length)) if reverse else range(length):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        y[:, t] = (C[:, t] * h).sum(-1)
    if D is not None:
        y += np.asarray(D, np.float64) * u
    if z is not None:
        z = np.asarray(z, np.float64)
        y *= z / (1 + np.exp(-z))
    return y, h


def _per_channel(x: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """B or C in any form -> (batch, length, channels, state)."""
    batch, length, channels = shape
    if x.ndim == 2:
        return np.broadcast_to(x, (batch, length, *x.shape))
    if x.ndim == 3:
        x = x[:, :, None]
    return np.repeat(x, channels // x.shape[2], axis=2)
