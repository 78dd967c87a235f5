"""Selective scan by a loop over time, with a hand-written gradient that keeps few states. Any backend, meant for CPUs.

One sequence (of one group of channels) after the other, one step after the other: the state, (state, channels), then
stays in the first-level cache and every step is a handful of small vector operations, which XLA's CPU backend runs
several times faster than the same loop over a whole batch. The forward pass keeps the state before every `CHUNK` steps;
the backward pass walks the chunks in the opposite order, recomputes the states of one at a time and runs the adjoint
recurrence through it. Long arrays are read and written in place, a row at a time: they are not transposed, padded or
flipped. Arrays in bfloat16 go through the loops as integers: XLA's CPU backend would convert such an array to float32
and back, all of it, at every step.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.scan.associative import softplus
from kernels.scan.differentiation import differentiable
from kernels.scan.inputs import ScanInputs, ScanOptions, zeros
from kernels.scan.order import gathered

CHUNK = 10  # the kept states and the states of a chunk together are least around here, at the lengths of Vim


# Here what belongs to a group is a part of the last axis of each array: A is (state, channels), B and C are (batch,
# length, groups * state) or (state, channels), the initial and the last state (batch, state, channels).


def forward(inputs: ScanInputs, options: ScanOptions, save: bool) -> tuple:
    """Computes y, the last state and, if asked, the state before every `CHUNK` steps."""
    groups, (batch, length, _) = inputs.groups, inputs.u.shape
    chunks = -(-length // CHUNK)
    inputs = jax.tree.map(_as_bits, _transpose(inputs))

    def sequence(i, results):
        part = _Part(inputs, groups, options, i)

        def step(t, carry):
            state, y = carry
            now = _Step(part, t)
            state = jnp.exp(now.exponent) * state + _outer(now.B, now.delta * now.u)
            out = _contract(now.C, state) + now.D * now.u
            return state, part.put(y, out if now.z is None else out * jax.nn.silu(now.z), *now.row)

        def chunk(c, carry):
            state, y, starts = carry
            starts = part.put(starts, state, part.batch, c)
            state, y = lax.fori_loop(c * CHUNK, jnp.minimum((c + 1) * CHUNK, length), step, (state, y))
            return state, y, starts

        y, last_state, starts = results
        state, y, starts = lax.fori_loop(0, chunks, chunk, (part.get(inputs.initial_state, part.batch), y, starts))
        return y, part.put(last_state, state, part.batch), starts

    starts = zeros((batch, chunks, *inputs.A.shape), like=inputs.u) if save else None
    results = jnp.zeros_like(inputs.u), jnp.zeros_like(inputs.initial_state), starts
    y, last_state, starts = lax.fori_loop(0, batch * groups, sequence, results)
    return _as_floats(y), last_state.swapaxes(1, 2), starts


def backward(given: ScanInputs, starts, dy, d_last_state, options: ScanOptions) -> ScanInputs:
    """Computes the gradients of the inputs."""
    groups, inputs = given.groups, jax.tree.map(_as_bits, _transpose(given))
    dy, d_last_state = _as_bits(dy), d_last_state.swapaxes(1, 2)
    batch, length, channels = inputs.u.shape
    chunks = -(-length // CHUNK)
    empty = zeros((CHUNK, inputs.A.shape[0], channels // groups), like=inputs.u)

    def sequence(i, grads):
        part = _Part(inputs, groups, options, i)
        A = part.get(inputs.A)

        def chunk(i, carry):
            first = (chunks - 1 - i) * CHUNK
            count = jnp.minimum(CHUNK, length - first)

            def replay(k, carry):
                state, decayed_states = carry
                now = _Step(part, first + k)
                decayed = jnp.exp(now.exponent) * state
                return decayed + _outer(now.B, now.delta * now.u), decayed_states.at[k].set(decayed)

            def adjoint(i, carry):
                d_state, grads = carry
                k = count - 1 - i
                now = _Step(part, first + k)
                decayed = decayed_states[k]
                state = decayed + _outer(now.B, now.delta * now.u)

                d_out = part.get(dy, *now.row)
                if now.z is not None:
                    sigmoid = jax.nn.sigmoid(now.z)
                    out = _contract(now.C, state) + now.D * now.u
                    d_z = d_out * out * sigmoid * (1 + now.z * (1 - sigmoid))
                    grads = grads._replace(z=part.put(grads.z, d_z, *now.row))
                    d_out = d_out * now.z * sigmoid

                d_state += _outer(now.C, d_out)
                d_input = _contract(now.B, d_state)  # of delta u
                d_exponent = d_state * decayed
                d_delta = _contract(A, d_exponent) + now.u * d_input
                if options.delta_softplus:
                    d_delta *= jax.nn.sigmoid(now.raw_delta)
                grads = grads._replace(
                    u=part.put(grads.u, now.delta * d_input + now.D * d_out, *now.row),
                    delta=part.put(grads.delta, d_delta, *now.row),
                    A=part.add(grads.A, d_exponent * now.delta),
                    B=part.put_matrix(grads.B, d_state, now.delta * now.u, *now.row),
                    C=part.put_matrix(grads.C, state, d_out, *now.row),
                    D=part.add(grads.D, d_out * now.u),
                    delta_bias=part.add(grads.delta_bias, d_delta),
                )
                return d_state * jnp.exp(now.exponent), grads

            start = part.get(starts, part.batch, first // CHUNK)
            _, decayed_states = lax.fori_loop(0, count, replay, (start, empty))
            return lax.fori_loop(0, count, adjoint, carry)

        d_state, grads = lax.fori_loop(0, chunks, chunk, (part.get(d_last_state, part.batch), grads))
        return grads._replace(initial_state=part.put(grads.initial_state, d_state, part.batch))

    grads = lax.fori_loop(0, batch * groups, sequence, jax.tree.map(jnp.zeros_like, inputs))
    return _transpose_back(jax.tree.map(_as_floats, grads), given)


scan = gathered(differentiable(forward, backward, saved="b..c"))


def _transpose(inputs: ScanInputs) -> ScanInputs:
    """Brings channels to the last axis, and makes the initial state an array."""
    state = inputs.initial_state
    if state is None:
        state = zeros((inputs.batch, *inputs.A.shape), like=inputs.u)
    B, C = (x.T if x.ndim == 2 else x.reshape(*x.shape[:2], -1) for x in (inputs.B, inputs.C))
    return inputs._replace(A=inputs.A.T, B=B, C=C, initial_state=state.swapaxes(1, 2))


def _transpose_back(grads: ScanInputs, inputs: ScanInputs) -> ScanInputs:
    """Brings gradients of what `_transpose` returns to the shapes of its inputs."""
    B, C = (grad.T if x.ndim == 2 else grad.reshape(x.shape) for grad, x in zip(grads[3:5], inputs[3:5]))
    state = None if inputs.initial_state is None else grads.initial_state.swapaxes(1, 2)
    return grads._replace(A=grads.A.T, B=B, C=C, initial_state=state)


def _as_bits(x):
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _as_floats(x):
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


class _Part:
    """One sequence of the batch and one group of its channels: reads and writes its part of arrays, in float32."""

    def __init__(self, inputs: ScanInputs, groups: int, options: ScanOptions, index):
        self.inputs, self.groups, self.options = inputs, groups, options
        self.batch, self.group = index // groups, index % groups

    def get(self, x, *index):
        """Reads the group's part of x[index]."""
        start, size = self._window(x, index)
        part = lax.dynamic_slice(x, start, size).reshape(size[len(index) :])
        return _as_floats(part).astype(jnp.float32)

    def put(self, x, value, *index):
        """Replaces the group's part of x[index]; None stays None."""
        if x is None:
            return None
        start, size = self._window(x, index)
        value = _as_bits(value.astype(jnp.bfloat16)) if x.dtype == jnp.uint16 else value.astype(x.dtype)
        return lax.dynamic_update_slice(x, value.reshape(size), start)

    def add(self, x, value):
        """Adds to the group's part of x; None stays None."""
        return x if x is None else self.put(x, self.get(x) + value)

    def put_matrix(self, grad, state, row, *index):
        """Writes the gradient of a row of B or C, (state, channels) times (channels,); adds it to a constant one's."""
        if grad.ndim == 3:
            return self.put(grad, jnp.dot(state, row, precision="highest"), *index)
        return self.add(grad, state * row)

    def _window(self, x, index):
        size = x.shape[-1] // self.groups
        middle = x.shape[len(index) : -1]
        return (*index, *[0] * len(middle), self.group * size), (*[1] * len(index), *middle, size)


class _Step:
    """The inputs of a part at one step."""

    def __init__(self, part: _Part, step):
        inputs, options = part.inputs, part.options
        self.row = (part.batch, inputs.u.shape[1] - 1 - step if options.reverse else step)
        self.u = part.get(inputs.u, *self.row)
        self.raw_delta = part.get(inputs.delta, *self.row)
        if inputs.delta_bias is not None:
            self.raw_delta += part.get(inputs.delta_bias)
        self.delta = softplus(self.raw_delta) if options.delta_softplus else self.raw_delta
        self.exponent = self.delta * part.get(inputs.A)
        self.B, self.C = (part.get(x, *self.row) if x.ndim == 3 else part.get(x) for x in (inputs.B, inputs.C))
        self.D = 0.0 if inputs.D is None else part.get(inputs.D)
        self.z = None if inputs.z is None else part.get(inputs.z, *self.row)


def _outer(matrix, row):
    """(state,) or (state, channels) times (channels,) -> (state, channels)."""
    return (matrix[:, None] if matrix.ndim == 1 else matrix) * row


def _contract(matrix, state):
    """Sum over the state axis, as a dot product: XLA's CPU backend runs it far faster than a sum over that axis."""
    if matrix.ndim == 1:
        return jnp.dot(matrix, state, precision="highest")
    return jnp.dot(jnp.ones(len(matrix), jnp.float32), matrix * state, precision="highest")
