"""The selective scan of Mamba: one function, several implementations (Gu & Dao, "Mamba", 2023, arXiv:2312.00752, §3.2).

This module is the public door: it checks the arguments, brings them to one canonical form and hands them to one of the
implementations, each a module beside this one:

    sequential   a loop over time with a hand-written gradient: any backend
    associative  `lax.associative_scan` over time: any backend, log-depth, memory for every state
    native       C++ through `jax.ffi`: CPU, where a compiler is found
    pallas       Pallas kernels lowered through Triton: GPU

`reference.py` is the same in float64 NumPy, for tests. An implementation is a module with

    scan(u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse) -> (y, last_state)
    why_unavailable() -> str | None      one line that says why it cannot run here, None if it can

where `u`, `delta`, `z`, `y` are (batch, length, channels) and share one dtype (float32, bfloat16 or float16); `B` and
`C` are (batch, length, groups, state) with a common number of groups, or constant in time (channels, state), in any of
these dtypes; `A` (channels, state), `D`, `delta_bias` (channels,), `initial_state` and `last_state` (batch, channels,
state) are float32. `D`, `z`, `delta_bias`, `initial_state` may be None. Differentiable in every array, through both
results.
"""

import functools
import importlib
import logging
import math
import threading

import jax
import jax.numpy as jnp

_lock = threading.Lock()

IMPLEMENTATIONS = ("native", "pallas", "sequential", "associative")

# What `implementation=None` takes by platform: the first that can run, fastest first as scripts/benchmark_scan.py
# measured them. On a CPU "sequential" beats "associative" at every shape; where a device runs wide operations cheaply
# and loops dearly, "associative" is what remains.
FASTEST_FIRST = {
    "cpu": ("native", "sequential"),
    "gpu": ("pallas", "associative"),
    "tpu": ("associative",),
}


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: jax.Array | None = None,
    return_last_state: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Runs a diagonal linear recurrence whose step, input and output matrices depend on the position.

    With Δ = delta + delta_bias (through softplus if asked; softplus is the identity above 20), for every channel::

        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t        y_t ← y_t silu(z_t) if z is given

    State and arithmetic are float32 whatever the inputs are. Every array has a gradient (in reverse mode), the states
    included.

    Args:
      u: input, (batch, length, channels), any floating dtype.
      delta: step sizes, (batch, length, channels).
      A: (channels, state), real and negative for a recurrence that forgets.
      B: (batch, length, state); or (batch, length, groups, state), where channel c reads group
        c // (channels // groups); or (channels, state), constant in time.
      C: like B.
      D: skip connection, (channels,).
      z: gate, (batch, length, channels).
      delta_bias: added to delta before softplus, (channels,).
      delta_softplus: apply softplus to the step sizes.
      reverse: run from the last position to the first; equals flip(scan(flip(inputs))) without flipping anything.
      initial_state: the state before the first step (which is at the last position if `reverse`),
        (batch, channels, state); zero if None.
      return_last_state: also return the state after the final step, (batch, channels, state) float32.
      implementation: one of the names above; None takes the fastest that can run on JAX's default backend. To lower
        "pallas" for a GPU without having one, name it under `jax.sharding.use_abstract_mesh` with an abstract GPU.

    Returns:
      y, (batch, length, channels) in u's dtype; with `return_last_state` the pair (y, last state).

    Raises:
      ValueError: an argument has a wrong shape or dtype, or the implementation is unknown or cannot run here.
    """
    u, delta, A, B, C, D, z, delta_bias, initial_state = (
        None if x is None else jnp.asarray(x) for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    scan = _implementation(implementation)
    dtype = u.dtype
    u, delta, z = _common_dtype(u, delta, z)
    B, C = _common_groups(_narrow(B), _narrow(C))
    A, D, delta_bias, initial_state = (_float32(x) for x in (A, D, delta_bias, initial_state))
    y, last_state = scan(
        *(u, delta, A, B, C, D, z, delta_bias, initial_state),
        delta_softplus=bool(delta_softplus),
        reverse=bool(reverse),
    )
    y = y.astype(dtype)
    return (y, last_state) if return_last_state else y


def why_unavailable(name: str) -> str | None:
    """One line that says why a named implementation cannot run here, None if it can."""
    return importlib.import_module(f"kernels.{name}").why_unavailable()


def choose_implementation() -> str:
    """What `implementation=None` takes on the default backend. Logs once if that is not the platform's fastest."""
    with _lock:  # so that threads that come first together log once together
        return _choose(jax.default_backend())


@functools.cache
def _choose(platform: str) -> str:
    reasons = []
    for name in FASTEST_FIRST.get(platform, ("associative",)):
        reason = why_unavailable(name)
        if reason is None:
            break
        reasons.append(f"{name!r} cannot run: {reason}")
    if reasons:
        logging.getLogger(__name__).warning("selective scan runs as %r; %s", name, "; ".join(reasons))
    return name


def _implementation(name: str | None):
    if name is None:
        name = choose_implementation()
    elif name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: unknown {name!r}, choose one of {', '.join(IMPLEMENTATIONS)} or None")
    elif reason := why_unavailable(name):
        raise ValueError(f"implementation: {name!r} cannot run here: {reason}")
    return importlib.import_module(f"kernels.{name}").scan


def _check(u, delta, A, B, C, D, z, delta_bias, initial_state) -> None:
    arrays = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    for name, array in arrays.items():
        if array is None and name in ("u", "delta", "A", "B", "C"):
            raise ValueError(f"{name}: it is None, expected an array")
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: dtype is {array.dtype}, expected a real floating dtype")
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u: shape is {u.shape}, expected (batch, length, channels), none of them 0")
    if A.ndim != 2 or A.shape[0] != u.shape[2] or A.shape[1] == 0:
        raise ValueError(f"A: shape is {A.shape}, expected ({u.shape[2]}, state) for u of shape {u.shape}")
    batch, length, channels = u.shape
    state = A.shape[1]
    expected = dict(
        delta=u.shape, z=u.shape, D=(channels,), delta_bias=(channels,), initial_state=(batch, channels, state)
    )
    for name, shape in expected.items():
        array = arrays[name]
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}: shape is {array.shape}, expected {shape} for u {u.shape} and A {A.shape}")
    for name in ("B", "C"):
        shape = arrays[name].shape
        allowed = {2: (channels, state), 3: (batch, length, state), 4: (batch, length, "groups", state)}
        grouped = len(shape) == 4 and shape[2] > 0 and channels % shape[2] == 0
        if shape not in allowed.values() and not (grouped and shape == (batch, length, shape[2], state)):
            forms = ", ".join(str(form).replace("'", "") for form in allowed.values())
            raise ValueError(
                f"{name}: shape is {shape}, expected one of {forms} with groups dividing channels, "
                f"for u {u.shape} and A {A.shape}"
            )


def _float32(x):
    return None if x is None else x.astype(jnp.float32)


def _narrow(x):
    """The three dtypes that implementations read stay; float64 and the 8-bit ones become float32."""
    return x if x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else x.astype(jnp.float32)


def _common_dtype(u, delta, z):
    """One dtype for the three long inputs: theirs if they agree, else float32, which holds them all exactly."""
    arrays = [_narrow(x) for x in (u, delta, z) if x is not None]
    if len({x.dtype for x in arrays}) > 1:
        arrays = [x.astype(jnp.float32) for x in arrays]
    return arrays if z is not None else [*arrays, None]


def _common_groups(B, C):
    """Adds the group axis and repeats groups until B and C have equally many; constants in time pass through."""
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
    if B.ndim == C.ndim == 4 and B.shape[2] != C.shape[2]:
        groups = math.lcm(B.shape[2], C.shape[2])
        # In float32, for the gradients of the repetitions to be added before they are rounded.
        B, C = (jnp.repeat(x.astype(jnp.float32), groups // x.shape[2], axis=2) for x in (B, C))
    return B, C
