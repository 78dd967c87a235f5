"""Selective scan on GPUs: Pallas kernels for the Triton backend, forward and backward.

A program owns a block of channels of one sequence and walks through time with the state in registers. Its arrays have
the four axes

    (state registers, channel groups, state lanes, channel lanes)

of which the last three, in this order, number the program's threads: each thread holds a few states of one channel.
Time is cut into windows of `WINDOW` steps, and windows into tiles with one step on each state lane: what is done once
for a step and a channel (loads, softplus, gate, stores) is done on tiles, so that no thread repeats another's work;
only the recurrence itself takes the steps one by one.

The forward pass saves the state before every `SAVED` steps. The backward pass visits the windows from the last to the
first, recomputes the states of a window into registers and runs the adjoint recurrence over it. Sums over channels
(gradients of B and C) and over the batch (A, D, delta_bias) leave the kernel as partial sums, one for each program, and
XLA adds them up: there are no atomics, and the same input gives the same bits.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.scan.inputs import ScanInputs, ScanOptions

WINDOW = 8  # steps whose states the backward kernel holds in registers; the most lanes along an axis; a power of two
SAVED = 16  # steps from one saved state to the next; a multiple of WINDOW
LOG2_E = math.log2(math.e)


def why_unavailable(platform: str, inputs: ScanInputs) -> str | None:
    """One line that says why the kernels cannot run, None if they can."""
    if platform != "gpu":
        return f"it needs a GPU, and JAX runs on {platform} here"
    # Pallas computes 64-bit offsets into arrays that need them, but counts along an axis in 32 bits.
    if max(*inputs.u.shape, inputs.state) >= 2**31:
        return f"u has shape {inputs.u.shape}, but no axis may be longer than 2³¹ - 1: cut it into parts"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scan(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
    """See `kernels.scan.api` for the contract."""
    outputs = _forward(inputs, options, save_states=False)
    return outputs["y"], outputs["last_state"]


def _scan_forward(inputs: ScanInputs, options: ScanOptions):
    outputs = _forward(inputs, options, save_states=True)
    return (outputs["y"], outputs["last_state"]), (inputs, outputs["states"])


def _scan_backward(options: ScanOptions, residuals, cotangents):
    return (_backward(*residuals, *cotangents, options),)


scan.defvjp(_scan_forward, _scan_backward)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The problem's sizes and how they are spread over programs and threads; `shape` holds powers of two."""

    batch: int
    length: int
    channels: int  # in each group of B and C
    groups: int
    state: int
    constant_B: bool
    constant_C: bool
    shape: tuple[int, int, int, int]  # of a program's arrays: state registers, channel groups, state and channel lanes

    @classmethod
    def create(cls, inputs: ScanInputs, registers: int, block: int) -> "Plan":
        """Aims at `registers` states in a thread and `block` channels in a program of at most 256 threads."""
        (batch, length, channels), state, groups = inputs.u.shape, inputs.state, inputs.groups
        padded_state = pl.next_power_of_2(state)
        state_lanes = min(max(padded_state // registers, 1), WINDOW)
        block = min(block, 256 // state_lanes, pl.next_power_of_2(channels // groups))
        channel_lanes = min(32 // state_lanes, WINDOW, block)
        shape = padded_state // state_lanes, block // channel_lanes, state_lanes, channel_lanes
        constant = inputs.B.ndim == 2, inputs.C.ndim == 2
        return cls(batch, length, channels // groups, groups, state, *constant, shape)

    @property
    def threads(self) -> int:
        """Threads in a program."""
        return math.prod(self.shape[1:])

    @property
    def block(self) -> int:
        """Channels in a program."""
        return self.shape[1] * self.shape[3]

    @property
    def blocks(self) -> int:
        """Programs for the channels of one group."""
        return pl.cdiv(self.channels, self.block)

    @property
    def windows(self) -> int:
        """Windows in a sequence, counting an incomplete last one."""
        return pl.cdiv(self.length, WINDOW)

    def call(self, kernel, options: ScanOptions, arguments: list, in_specs: list, outputs, out_specs) -> Any:
        """Runs `kernel(plan, options, *arguments, outputs)` in every program; `outputs` is a tree of shapes."""
        call = pl.pallas_call(
            functools.partial(kernel, self, options),
            grid=(self.blocks, self.groups, self.batch),
            in_specs=in_specs,
            out_shape=[outputs],
            out_specs=[out_specs],
            interpret=options.interpret,
            compiler_params=plgpu.CompilerParams(num_warps=max(self.threads // 32, 1), num_stages=1),
        )
        return call(*arguments)[0]


def _forward(inputs: ScanInputs, options: ScanOptions, save_states: bool) -> dict[str, jax.Array]:
    batch, length, channels = inputs.u.shape
    # More states in a thread are less work; few channels are spread over more threads to keep the GPU busy.
    plan = Plan.create(inputs, registers=8 if batch * channels >= 2**14 else 4, block=32)
    outputs = dict(y=_like(inputs.u), last_state=_float32(batch, channels, plan.state))
    if save_states:
        outputs["states"] = _float32(batch, pl.cdiv(length, SAVED), channels, plan.state)
    in_specs = [jax.tree.map(_input_spec, inputs)]
    return plan.call(_forward_kernel, options, [inputs], in_specs, outputs, jax.tree.map(_output_spec, outputs))


def _backward(inputs: ScanInputs, states, dy, d_last_state, options: ScanOptions) -> ScanInputs:
    batch, length, channels = inputs.u.shape
    # Four states in a thread leave registers for a window; wide blocks keep the partial sums for B and C small.
    plan = Plan.create(inputs, registers=4, block=64)
    constant = _float32(batch, channels, plan.state)
    varying = _float32(batch, plan.groups, plan.blocks, length, plan.state)
    vector = _float32(batch, channels)
    partial = ScanInputs(
        u=_like(inputs.u),
        delta=_like(inputs.delta),
        A=constant,
        B=constant if plan.constant_B else varying,
        C=constant if plan.constant_C else varying,
        D=None if inputs.D is None else vector,
        z=None if inputs.z is None else _like(inputs.z),
        delta_bias=None if inputs.delta_bias is None else vector,
        initial_state=None if inputs.initial_state is None else constant,
    )
    arguments = [inputs, states, dy, d_last_state]
    in_specs = [jax.tree.map(_input_spec, inputs), *(_spec(x, batch=0) for x in arguments[1:])]
    partial = plan.call(_backward_kernel, options, arguments, in_specs, partial, jax.tree.map(_output_spec, partial))

    def total(x):
        if x is None:
            return None
        return x.sum(2).swapaxes(1, 2) if x.ndim == 5 else x.sum(0)

    return partial._replace(**{name: total(getattr(partial, name)) for name in ("A", "B", "C", "D", "delta_bias")})


def _spec(x, **axes: int) -> pl.BlockSpec:
    """What a program sees of an array: its own index along the axes of `batch`, `group`, `block`, all along others."""
    programs = {axis: ("block", "group", "batch").index(name) for name, axis in axes.items()}
    shape = [None if axis in programs else size for axis, size in enumerate(x.shape)]
    return pl.BlockSpec(shape, lambda *ids: tuple(ids[programs[i]] if i in programs else 0 for i in range(len(shape))))


def _input_spec(x) -> pl.BlockSpec:
    """Of the parameters, of (batch, length or channels, …) or of (batch, length, groups, state)."""
    return _spec(x) if x.ndim < 3 else _spec(x, batch=0) if x.ndim == 3 else _spec(x, batch=0, group=2)


def _output_spec(x) -> pl.BlockSpec:
    """Of (batch, …) or of (batch, groups, blocks, length, state)."""
    return _spec(x, batch=0) if x.ndim < 5 else _spec(x, batch=0, group=1, block=2)


def _like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _forward_kernel(plan: Plan, options: ScanOptions, inputs: ScanInputs, outputs: dict) -> None:
    program = Program(plan, options, inputs)

    def window(index, h):
        index = index.astype(jnp.int32)  # with jax_enable_x64 it is an int64
        if "states" in outputs:
            saved, rest = _divide(index, SAVED // WINDOW)
            program.store_states(outputs["states"], h, saved, condition=rest == 0)
        for tile in program.load_tiles(index):
            y = program.zero_tile
            for lane in range(program.steps):
                h = program.advance(h, tile, lane)
                y = program.put(y, lane, program.sum_states(h * program.C(tile.first + lane)))
            y = program.add_skip(y, tile)
            if inputs.z is not None:
                y *= jax.nn.silu(program.load(inputs.z, tile.first))
            program.store(outputs["y"], y, tile.first)
        return h

    h = lax.fori_loop(0, plan.windows, window, program.load_states(inputs.initial_state))
    program.store_states(outputs["last_state"], h)


class Sums(NamedTuple):
    """What the backward kernel carries from a window to the one before it: the state's gradient and sums over time."""

    dh: jax.Array
    dA: jax.Array
    dB: jax.Array | None  # None where B varies in time
    dC: jax.Array | None
    dD: jax.Array
    d_bias: jax.Array


def _backward_kernel(
    plan: Plan, options: ScanOptions, inputs: ScanInputs, saved_states, d_output, d_last_state, gradients: ScanInputs
) -> None:
    program = Program(plan, options, inputs)

    def advance_tile(number, h):
        tile = program.load_tile(number * program.steps)
        for lane in range(program.steps):
            h = program.advance(h, tile, lane)
        return h

    def window(number, sums):
        index = (plan.windows - 1 - number).astype(jnp.int32)
        saved, _ = _divide(index, SAVED // WINDOW)
        h = program.load_states(saved_states, saved)
        first_tile = saved * (SAVED // program.steps)
        h = lax.fori_loop(first_tile, index * (WINDOW // program.steps), advance_tile, h)
        states = [h]
        tiles = program.load_tiles(index)
        for tile in tiles:
            for lane in range(program.steps):
                states.append(program.advance(states[-1], tile, lane))
        dB, dC = MatrixGradient(program, gradients.B, sums.dB), MatrixGradient(program, gradients.C, sums.dC)
        for tile in reversed(tiles):
            sums = _pull_back_tile(program, tile, states, d_output, dB, dC, gradients, sums)
        return sums._replace(dB=dB.total, dC=dC.total)

    zeros = jnp.zeros(plan.shape, jnp.float32)
    sums = Sums(
        dh=program.load_states(d_last_state),
        dA=zeros,
        dB=zeros if plan.constant_B else None,
        dC=zeros if plan.constant_C else None,
        dD=program.zero_tile,
        d_bias=program.zero_tile,
    )
    sums = lax.fori_loop(0, plan.windows, window, sums)
    program.store_states(gradients.initial_state, sums.dh)
    program.store_states(gradients.A, sums.dA)
    if plan.constant_B:
        program.store_states(gradients.B, sums.dB)
    if plan.constant_C:
        program.store_states(gradients.C, sums.dC)
    program.store_channels(gradients.D, sums.dD)
    program.store_channels(gradients.delta_bias, sums.d_bias)


def _pull_back_tile(program, tile, states, d_output, dB, dC, gradients: ScanInputs, sums: Sums) -> Sums:
    """Goes back over one tile: stores the gradients of u, delta and z there and returns the new sums."""
    inputs = program.inputs
    dy = d_gated = program.load(d_output, tile.first)
    if inputs.z is not None:
        z = program.load(inputs.z, tile.first)
        sigmoid = jax.nn.sigmoid(z)
        dy = d_gated * z * sigmoid
    y, d_input, d_rate, dh, dA = _pull_back_steps(program, tile, states, dy, dB, dC, sums.dh, sums.dA)
    if inputs.z is not None:
        d_silu = sigmoid * (1 + z * (1 - sigmoid))
        program.store(gradients.z, d_gated * program.add_skip(y, tile) * d_silu, tile.first)
    du = d_input * tile.delta
    if inputs.D is not None:
        du += dy * program.D
    program.store(gradients.u, du, tile.first)
    d_delta = d_input * tile.u + d_rate * (1 / LOG2_E)
    if program.options.delta_softplus:
        d_delta *= jnp.where(tile.raw > 20, 1.0, jax.nn.sigmoid(tile.raw))
    d_delta = jnp.where(program.inside(tile.first), d_delta, 0.0)
    program.store(gradients.delta, d_delta, tile.first)
    return sums._replace(dh=dh, dA=dA, dD=sums.dD + dy * tile.u, d_bias=sums.d_bias + d_delta)


def _pull_back_steps(program, tile, states, dy, dB, dC, dh, dA):
    """Runs the adjoint recurrence over the steps of one tile, whose states it takes off the list.

    With a_t = exp(Δ_t A) and g_t the gradient of h_t: g_t = dy_t C_t + a_{t+1} g_{t+1}, dC_t = Σ_c dy_t h_t,
    dB_t = Σ_c g_t Δ_t u_t, d(Δ_t u_t) = Σ_n g_t B_t and d(Δ_t A) = g_t a_t h_{t-1}. On entry `dh` is a_{t+1} g_{t+1}.

    Returns:
      Σ_n h_t C_t (for the gate), d(Δ_t u_t) and log2(e) Σ_n d(Δ_t A) A as tiles; `dh` before the tile; `dA`.
    """
    y = d_input = d_rate = program.zero_tile
    for lane in reversed(range(program.steps)):
        step, h = tile.first + lane, states.pop()
        B, C = program.B(step), program.C(step)
        delta, delta_u, dy_t = (program.row(x, lane) for x in (tile.delta, tile.delta * tile.u, dy))
        if program.inputs.z is not None:
            y = program.put(y, lane, program.sum_states(h * C))
        dC.add(step, dy_t * h)
        dh = dh + dy_t * C
        dB.add(step, dh * delta_u)
        d_input = program.put(d_input, lane, program.sum_states(dh * B))
        dh = dh * jnp.exp2(delta * program.log2_decay)
        d_exponent = dh * states[-1]
        dA = dA + d_exponent * delta
        d_rate = program.put(d_rate, lane, program.sum_states(d_exponent * program.log2_decay))
    return y, d_input, d_rate, dh, dA


class Tile(NamedTuple):
    """Consecutive steps of a program's channels, one on each state lane: (1, groups, state lanes, channel lanes)."""

    first: jax.Array  # number of the first step
    u: jax.Array
    raw: jax.Array  # the step sizes before softplus
    delta: jax.Array  # the step sizes; 0 after the end of the sequence, where the state must stay as it is


class Program:
    """One program's part of the problem: its indices, what is constant in time, and its access to memory.

    Steps are counted in the direction of the recurrence. Memory with channels is read and written through arrays of one
    axis, the program's threads, because Triton then has no choice of layout, and layouts that differ cost exchanges
    between threads at every step.
    """

    def __init__(self, plan: Plan, options: ScanOptions, inputs: ScanInputs):
        self.plan, self.options, self.inputs = plan, options, inputs
        registers, _, self.steps, channel_lanes = plan.shape
        self.register, _, self.state_lane, self.channel_lane = (
            lax.broadcasted_iota(jnp.int32, [n if i == axis else 1 for i, n in enumerate(plan.shape)], axis)
            for axis in range(4)
        )
        self.state = self.state_lane * registers + self.register
        rest, channel_lane = _divide(lax.iota(jnp.int32, plan.threads), channel_lanes)
        channel_group, self.thread_lane = _divide(rest, self.steps)
        channel = pl.program_id(0) * plan.block + channel_group * channel_lanes + channel_lane
        self.thread_channel = pl.program_id(1) * plan.channels + channel
        self.thread_mask = channel < plan.channels
        self.zero_tile = jnp.zeros((1, *plan.shape[1:]), jnp.float32)
        self.log2_decay = self._load_matrix(inputs.A) * LOG2_E  # exp(Δ A) = exp2(Δ A log2(e)), one instruction
        self.constant_B = self._load_matrix(inputs.B) if plan.constant_B else None
        self.constant_C = self._load_matrix(inputs.C) if plan.constant_C else None
        self.D, self.delta_bias = (self._load_channels(x) for x in (inputs.D, inputs.delta_bias))

    def load_tiles(self, window) -> list[Tile]:
        """The tiles of one window, in order."""
        return [self.load_tile(window * WINDOW + offset) for offset in range(0, WINDOW, self.steps)]

    def load_tile(self, first) -> Tile:
        """The tile that begins at a step."""
        u, raw = self.load(self.inputs.u, first), self.load(self.inputs.delta, first)
        if self.delta_bias is not None:
            raw += self.delta_bias
        delta = raw
        if self.options.delta_softplus:
            delta = jnp.where(raw > 20, raw, jnp.log1p(jnp.exp(jnp.minimum(raw, 20.0))))
        return Tile(first, u, raw, jnp.where(self.inside(first), delta, 0.0))

    def advance(self, h, tile: Tile, lane: int) -> jax.Array:
        """h_t from h_{t-1}, t being the step on a lane of the tile."""
        delta, delta_u = self.row(tile.delta, lane), self.row(tile.delta * tile.u, lane)
        return jnp.exp2(delta * self.log2_decay) * h + delta_u * self.B(tile.first + lane)

    def add_skip(self, y, tile: Tile) -> jax.Array:
        """y + D u."""
        return y if self.D is None else y + self.D * tile.u

    def B(self, step) -> jax.Array:
        """B_t, to broadcast over channels, or B where it is constant."""
        return self._load_row(self.inputs.B, step) if self.constant_B is None else self.constant_B

    def C(self, step) -> jax.Array:
        """C_t, to broadcast over channels, or C where it is constant."""
        return self._load_row(self.inputs.C, step) if self.constant_C is None else self.constant_C

    def row(self, tile, lane: int) -> jax.Array:
        """What a tile holds for the step on one lane, to broadcast over the state."""
        return _sum(jnp.where(self.state_lane == lane, tile, 0.0), axis=2)

    def put(self, tile, lane: int, row) -> jax.Array:
        """The tile with the step on one lane replaced."""
        return jnp.where(self.state_lane == lane, row, tile)

    def sum_states(self, x) -> jax.Array:
        """Sum over the state."""
        return _sum(_sum(x, axis=0), axis=2)

    def inside(self, first) -> jax.Array:
        """Which steps of the tile that begins at `first` exist."""
        return first + self.state_lane < self.plan.length

    def load(self, reference, first) -> jax.Array:
        """The tile of (length, channels) that begins at a step; 0 where nothing exists."""
        return self._load_threads(*self._tile_access(reference, first))

    def store(self, reference, tile, first) -> None:
        """The opposite of `load`."""
        self._store_threads(*self._tile_access(reference, first), tile)

    def load_states(self, reference, *index) -> jax.Array:
        """The states in (…, channels, state), zeros if there is no such array."""
        if reference is None:
            return jnp.zeros(self.plan.shape, jnp.float32)
        return self._load_matrix(reference, *index)

    def store_states(self, reference, states, *index, condition=True) -> None:
        """Stores in (…, channels, state), if there is such an array and the condition is met."""
        if reference is not None:
            for register in range(self.plan.shape[0]):
                part = _sum(jnp.where(self.register == register, states, 0.0), axis=0)
                access, mask = self._matrix_access(reference, register, *index)
                self._store_threads(access, mask & condition, part)

    def store_channels(self, reference, tile) -> None:
        """Stores a tile's sum over steps in (channels,), if there is such an array."""
        if reference is not None:
            total = jnp.broadcast_to(_sum(tile, axis=2), tile.shape)  # every state lane stores the same
            self._store_threads(reference.at[self.thread_channel], self.thread_mask, total)

    def store_rows(self, reference, first, rows) -> None:
        """Stores in (length, state) the steps from `first` on, one on each channel lane."""
        step = first + self.channel_lane
        mask = (step < self.plan.length) & (self.state < self.plan.state)
        plgpu.store(reference.at[self._position(step), self.state], rows, mask=mask)

    def _tile_access(self, reference, first):
        step = first + self.thread_lane
        access = reference.at[self._position(step), self.thread_channel]
        return access, self.thread_mask & (step < self.plan.length)

    def _matrix_access(self, reference, register: int, *index):
        state = self.thread_lane * self.plan.shape[0] + register
        return reference.at[*index, self.thread_channel, state], self.thread_mask & (state < self.plan.state)

    def _load_matrix(self, reference, *index):
        matrix = jnp.zeros(self.plan.shape, jnp.float32)
        for register in range(self.plan.shape[0]):
            part = self._load_threads(*self._matrix_access(reference, register, *index))
            matrix = jnp.where(self.register == register, part, matrix)
        return matrix

    def _load_channels(self, reference):
        return None if reference is None else self._load_threads(reference.at[self.thread_channel], self.thread_mask)

    def _load_row(self, reference, step):
        mask = (self.state < self.plan.state) & (step < self.plan.length)
        return plgpu.load(reference.at[self._position(step), self.state], mask=mask, other=0.0)

    def _load_threads(self, access, mask):
        return plgpu.load(access, mask=mask, other=0.0).astype(jnp.float32).reshape(self.zero_tile.shape)

    def _store_threads(self, access, mask, tile) -> None:
        plgpu.store(access, tile.reshape(self.plan.threads).astype(access.dtype), mask=mask)

    def _position(self, step):
        """Index of a step; a step past the end stays past the end."""
        length = self.plan.length
        return jnp.where(step < length, length - 1 - step, step) if self.options.reverse else step


class MatrixGradient:
    """Gradient of B or C while the backward kernel goes through one window, step by step from the last to the first.

    Where the matrix varies in time, sums over a warp's channels wait on the channel lanes, one step on each, so that
    the warps are summed once for all of them.
    """

    def __init__(self, program: Program, reference, total):
        self.program, self.reference, self.total = program, reference, total
        self.lane, self.rows = 0, jnp.zeros(program.plan.shape, jnp.float32)

    def add(self, step, contribution) -> None:
        """Takes what one step contributes, for every channel and state."""
        if self.total is not None:
            self.total = self.total + contribution
            return
        lanes = self.program.plan.shape[3]
        self.lane = (self.lane - 1) % lanes
        self.rows = jnp.where(self.program.channel_lane == self.lane, _sum(contribution, axis=3), self.rows)
        if self.lane == 0:
            self.program.store_rows(self.reference, step, _sum(self.rows, axis=1))


def _divide(x, divisor: int):
    """Quotient and remainder of 32-bit integers that are not negative."""
    return lax.div(x, np.int32(divisor)), lax.rem(x, np.int32(divisor))


def _sum(x, axis: int):
    return x if x.shape[axis] == 1 else jnp.sum(x, axis, keepdims=True)
