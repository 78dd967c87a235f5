"""The public function: it checks the arguments, brings them to one form and passes them to an implementation:

    native       C++ through `jax.ffi`: CPU, where it was compiled
    pallas       Pallas kernels lowered through Triton: GPU
    triton       the same in Triton's own language, through jax_triton: GPU, where Pallas' Triton backend is gone
    sequential   a loop over time with a hand-written gradient: any backend
    plain        one `lax.scan`, the whole batch at every step: any backend, for programs that another runtime executes
    associative  `lax.associative_scan` in chunks of time: any backend, also forward mode and second derivatives

`reference` is the same in float64 NumPy, for tests. Each implementation is a module beside this one with

    scan(inputs: ScanInputs, options: ScanOptions) -> (y, last_state)

where y is like u and the last state like the initial one. It is differentiable in every array, through both results.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, auto_axes

from kernels.choice import OPERATIONS, Implementations
from kernels.scan.inputs import ScanInputs, ScanOptions, canonical, check, vary_like

# Fastest first as scripts/benchmark_scan.py measured them. On a CPU "sequential" beats "associative" at every shape;
# where a device runs wide operations cheaply and loops slowly, as GPUs and TPUs do, "associative" is what remains.
IMPLEMENTATIONS = OPERATIONS["scan"] = Implementations(
    operation="scan",
    title="selective scan",
    package="kernels.scan",
    names=("native", "pallas", "triton", "sequential", "plain", "associative"),
    fastest_first={"cpu": ("native", "sequential"), "gpu": ("pallas", "triton", "associative")},
)


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
    order: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Runs a diagonal linear recurrence whose step, input and output matrices depend on the position.

    With Δ = delta + delta_bias (through softplus if asked; softplus is the identity above 20), for every channel::

        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t        y_t ← y_t silu(z_t) if z is given

    State and arithmetic are float32 whatever the inputs are. Every array has a gradient, the states included; forward
    mode and second derivatives need "associative". On several devices the scan is split over batch and channels as its
    inputs are.

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
      order: (groups, length) integers, the position at which each step of a group is, for scans of an image in several
        directions: u, delta, B, C and z are read and y is written there, so that all of them lie as the image does,
        (batch, positions, …), and need not be permuted. Every group has each position once; a negative one stands for a
        step of zeros without a result. u and z may be (batch, positions, channels // groups), which every group reads.
      implementation: "native", "pallas", "triton", "sequential", "plain" or "associative"; None takes the one named
        by `kernels.use`, else the fastest that can run where JAX runs: on the devices of the current mesh, else on the
        default device. `jax.sharding.use_abstract_mesh` with an abstract GPU lowers for a GPU without having one.

    Returns:
      y, (batch, length, channels) in u's dtype; with `return_last_state` the pair (y, last state).

    Raises:
      ValueError: an argument has a wrong shape or dtype, or the implementation is unknown or cannot run here.
    """
    arrays = u, delta, A, B, C, D, z, delta_bias, initial_state, order
    inputs = ScanInputs(*(None if x is None else jnp.asarray(x) for x in arrays))
    check(inputs)
    dtype, inputs = inputs.u.dtype, canonical(inputs)
    options = ScanOptions(bool(delta_softplus), bool(reverse))
    y, last_state = _on_mesh(lambda x: IMPLEMENTATIONS.call("scan", implementation, x, options), inputs)
    y = y.astype(dtype)
    return (y, last_state) if return_last_state else y


def _on_mesh(scan: Callable, inputs: ScanInputs) -> tuple[jax.Array, jax.Array]:
    """Lets XLA's partitioner split the scan on a mesh with explicit axes, and inputs vary alike in `jax.shard_map`."""
    inputs = ScanInputs(*(None if x is None else vary_like(x, *jax.tree.leaves(inputs)) for x in inputs))
    sharding = jax.typeof(inputs.delta).sharding
    explicit = sharding.mesh.explicit_axes
    if not explicit:
        return scan(inputs)
    batch, _, channels = sharding.spec
    state = NamedSharding(sharding.mesh, PartitionSpec(batch, channels, None))
    return auto_axes(scan, axes=explicit, out_sharding=(sharding, state))(inputs)
