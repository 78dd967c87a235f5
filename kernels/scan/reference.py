"""The selective scan as a plain float64 NumPy loop: it defines the semantics, and tests compare against it."""

import numpy as np

from kernels.scan.inputs import ScanInputs, ScanOptions


def scan(inputs: ScanInputs, options: ScanOptions) -> tuple[np.ndarray, np.ndarray]:
    """Takes B and C in any form that `selective_scan` allows; returns (y, last state) in float64."""
    u, delta, A, B, C, D, z, delta_bias, h = (None if x is None else np.asarray(x, np.float64) for x in inputs[:-1])
    batch, length, channels = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias
    if options.delta_softplus:
        delta = np.where(delta > 20, delta, np.log1p(np.exp(np.minimum(delta, 20))))
    B, C = (_per_channel(x, u.shape) for x in (B, C))
    y = np.zeros_like(u)
    h = np.zeros((batch, *A.shape)) if h is None else h
    for t in reversed(range(length)) if options.reverse else range(length):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        y[:, t] = (C[:, t] * h).sum(-1)
    if D is not None:
        y += D * u
    if z is not None:
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
