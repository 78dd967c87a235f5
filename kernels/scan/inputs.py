"""The arguments of a selective scan: their checks, and the one form in which implementations take them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HALVES = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}


class ScanInputs(NamedTuple):
    """The arrays of a scan, or a shape, a reference or a gradient for each of them; None for an absent one.

    The comments describe the canonical form. All but u, delta and z are float32.
    """

    u: Any  # (batch, length, channels), like delta and z; the three share a dtype: float32, bfloat16 or float16
    delta: Any
    A: Any  # (channels, state)
    B: Any  # (batch, length, groups, state), or (channels, state) if constant in time
    C: Any  # like B, with as many groups
    D: Any = None  # (channels,), like delta_bias
    z: Any = None
    delta_bias: Any = None
    initial_state: Any = None  # (batch, channels, state)
    order: Any = None  # (groups, length) int32; then long arrays have positions instead of a length

    batch = property(lambda self: self.u.shape[0])
    length = property(lambda self: self.u.shape[1] if self.order is None else self.order.shape[1])
    channels = property(lambda self: self.A.shape[0])
    state = property(lambda self: self.A.shape[1])

    @property
    def groups(self) -> int:
        """Groups of channels that share B and C; channel c is in group c // (channels // groups)."""
        if self.order is not None:
            return self.order.shape[0]
        return max(x.shape[2] if x.ndim == 4 else 1 for x in (self.B, self.C))


class ScanOptions(NamedTuple):
    """Settings of a scan that are fixed when it is traced."""

    delta_softplus: bool = False
    reverse: bool = False
    interpret: bool = False  # for tests: Pallas kernels run as plain JAX, on any backend


def check(inputs: ScanInputs) -> None:
    """Raises a ValueError that names the argument whose shape or dtype is wrong, in any form that is allowed."""
    for name, array in inputs._asdict().items():
        if array is None and name not in ScanInputs._field_defaults:
            raise ValueError(f"{name}: it is None, expected an array")
        kind = jnp.integer if name == "order" else jnp.floating
        if array is not None and not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name}: dtype is {array.dtype}, expected a real {kind.__name__} dtype")
    u, A = inputs.u.shape, inputs.A.shape
    if len(u) != 3 or 0 in u:
        raise ValueError(f"u: shape is {u}, expected (batch, length, channels), none of them 0")
    order = (1, u[1]) if inputs.order is None else inputs.order.shape
    if len(order) != 2 or 0 in order:
        raise ValueError(f"order: shape is {order}, expected (groups, length), none of them 0")
    if len(A) != 2 or A[0] not in (u[2], u[2] * order[0]) or A[1] == 0:
        raise ValueError(f"A: shape is {A}, expected ({u[2]}, state) for u of shape {u}")
    channels, state = A
    if channels % order[0]:
        raise ValueError(f"order: shape is {order}, expected (groups, length) with groups dividing {channels} channels")
    delta, shared = (*u[:2], channels), (*u[:2], channels // order[0])
    z = shared if getattr(inputs.z, "shape", None) == shared else delta
    expected = dict(delta=delta, z=z, D=(channels,), delta_bias=(channels,), initial_state=(u[0], channels, state))
    for name, shape in expected.items():
        array = getattr(inputs, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}: shape is {array.shape}, expected {shape} for u {u} and A {A}")
    for name in ("B", "C"):
        shape = getattr(inputs, name).shape
        groups = shape[2] if len(shape) == 4 else 1
        varying, grouped = (*u[:2], state), (*u[:2], groups, state)
        ordered = inputs.order is None or shape == A or groups == order[0]
        if shape not in (A, varying, grouped) or groups == 0 or channels % groups or not ordered:
            raise ValueError(
                f"{name}: shape is {shape}, expected one of {A}, {varying}, ({u[0]}, {u[1]}, groups, {state}) "
                f"with groups dividing channels, as many as any order has, for u {u} and A {A}"
            )


def canonical(inputs: ScanInputs) -> ScanInputs:
    """Brings valid inputs to the form that implementations take."""
    dtypes = {x.dtype for x in (inputs.u, inputs.delta, inputs.z) if x is not None}
    kept = ("u", "delta", "z") if len(dtypes) == 1 and dtypes <= HALVES else ()  # float32 holds every mixture exactly
    arrays = {n: x if x is None or n in kept else x.astype(jnp.float32) for n, x in inputs._asdict().items()}
    if inputs.order is not None:
        arrays["order"] = inputs.order.astype(jnp.int32)
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (arrays["B"], arrays["C"]))
    if B.ndim == C.ndim == 4 and B.shape[2] != C.shape[2]:
        groups = math.lcm(B.shape[2], C.shape[2])
        # Already in float32, so that the gradients of the repetitions are added before they are rounded.
        B, C = (jnp.repeat(x, groups // x.shape[2], axis=2) for x in (B, C))
    return ScanInputs(**arrays | dict(B=B, C=C))


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Makes zeros in float32 that may become part of a loop with another array, in `jax.shard_map` too."""
    return vary_like(jnp.zeros(shape, jnp.float32), like)


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Marks x as varying over the axes of `jax.shard_map` over which others vary; its gradient is summed over them."""
    varying = [jax.typeof(other).manual_axis_type.varying for other in (x, *others)]
    return jax.lax.pcast(x, tuple(sorted(frozenset().union(*varying) - varying[0])), to="varying")
