"""Selective scan on NVIDIA GPUs: Pallas kernels for the Triton backend, forward and backward.

A program owns a block of channels of one sequence and walks through time with the state in registers. Its arrays have
the four axes

    (state registers, channel groups, state lanes, channel lanes)

of which the last three, in this order, number the program's threads: each thread holds a few states of one channel.
Time is cut into windows of `WINDOW` steps, and windows into tiles with one step on each state lane: what is done once
for a step and a channel (loads, softplus, gate, stores) is done on tiles, so that no thread repeats another's work;
only the recurrence itself takes the steps one by one. The forward pass loads ahead of use, by a window for u, delta and
z, by a step for B and C. A store stands between such a load and what is computed from it, because the assembler moves
loads down to their first use, but not past a store.

The forward pass saves the state before every `SAVED` steps. The backward pass visits the windows from the last to the
first, recomputes the states of a window into registers and runs the adjoint recurrence over it. Sums over channels
(gradients of B and C) and over the batch (A, D, delta_bias) leave the kernel as partial sums, one for each program, and
XLA adds them up: there are no atomics, and the same input gives the same bits.

Where batch and channels are too few to keep a GPU busy, time is also cut into chunks, which run at the same time. The
recurrence is linear, so a first kernel finds what each chunk adds to a state, and multiplies it by exp(A Σ Δ); from
these each program computes the state at which its own chunk starts. The adjoint recurrence is cut in the same way.
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

WINDOW = 8  # steps whose states the backward kernel holds in registers; the most state lanes; a power of two
SAVED = 16  # steps from one saved state to the next; a multiple of WINDOW
CHUNK = 32  # steps of the shortest chunks; a multiple of SAVED
PROCESSORS = 132  # of an H100 or H200; fewer programs than two for each are cut into chunks of time
LOG2_E = math.log2(math.e)
# log(1 + x) / x on [0, 1] at Chebyshev nodes; with the rounding of float32 the relative error is 2e-7.
LOG1P = (
    *(0.9999999403953552, -0.4999944567680359, 0.3331812024116516, -0.2483539879322052, 0.19076880812644958),
    *(-0.13602247834205627, 0.0775160863995552, -0.029074065387248993, 0.0051261018961668015),
)


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
    outputs = forward(pad(inputs, options), options, save_states=False)
    return outputs["y"], outputs["last_state"]


def _scan_forward(inputs: ScanInputs, options: ScanOptions):
    inputs = pad(inputs, options)
    outputs = forward(inputs, options, save_states=True)
    return (outputs["y"], outputs["last_state"]), (inputs, outputs["states"])


def _scan_backward(options: ScanOptions, residuals, cotangents):
    return (backward(*residuals, *cotangents, options),)


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
        """Aims at `registers` states in a thread and `block` channels in a program."""
        (batch, length, channels), state, groups = inputs.u.shape, inputs.state, inputs.groups
        padded_state = pl.next_power_of_2(state)
        state_lanes = min(max(padded_state // registers, 1), WINDOW)
        block = min(block, pl.next_power_of_2(channels // groups))
        channel_lanes = min(32 // state_lanes, block)
        shape = padded_state // state_lanes, block // channel_lanes, state_lanes, channel_lanes
        constant = inputs.B.ndim == 2, inputs.C.ndim == 2
        return cls(batch, length, channels // groups, groups, state, *constant, shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """`shape` with an axis for each bit of the numbers of lanes: lanes exchange values without changing layouts."""
        registers, groups, *lanes = self.shape
        return registers, groups, *(2 for n in lanes for _ in range(n.bit_length() - 1))

    def axis(self, lanes: int, distance: int) -> int:
        """The axis along which state (2) or channel (3) lanes differ in one bit of their number, `distance`."""
        bits = [n.bit_length() - 1 for n in self.shape[2 : lanes + 1]]
        return 2 + sum(bits) - distance.bit_length()

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

    @property
    def chunk(self) -> int:
        """Windows in a chunk: all of them if there are programs enough."""
        programs = self.blocks * self.groups * self.batch
        if programs >= 2 * PROCESSORS:
            return self.windows
        saved = SAVED // WINDOW
        wanted = pl.cdiv(self.windows * programs, 4 * PROCESSORS)
        return min(max(pl.cdiv(wanted, saved) * saved, CHUNK // WINDOW), self.windows)

    @property
    def chunks(self) -> int:
        """Chunks in a sequence."""
        return pl.cdiv(self.windows, self.chunk)

    def call(self, kernel, options: ScanOptions, arguments: list, in_specs: list, outputs) -> Any:
        """Runs `kernel(plan, options, *arguments, outputs)` in every program; `outputs` is a tree of shapes."""
        call = pl.pallas_call(
            functools.partial(kernel, self, options),
            grid=(self.blocks, self.chunks, self.groups, self.batch),
            in_specs=in_specs,
            out_shape=[outputs],
            out_specs=[jax.tree.map(_output_spec, outputs)],
            interpret=options.interpret,
            compiler_params=plgpu.CompilerParams(num_warps=max(self.threads // 32, 1), num_stages=1),
        )
        return call(*arguments)[0]

    def summarize(self, options: ScanOptions, inputs: ScanInputs, d_output=None) -> "Summary | None":
        """What each chunk does to the state, or with `d_output` to its gradient; None if there is one chunk."""
        if self.chunks == 1:
            return None
        chunks, channels = (self.batch, self.chunks), self.channels * self.groups
        summary = Summary(_float32(*chunks, channels, self.state), _float32(*chunks, channels))
        in_specs = [jax.tree.map(_input_spec, inputs), None if d_output is None else _spec(d_output, batch=0)]
        return self.call(_summary_kernel, options, [inputs, d_output], in_specs, summary)


class Summary(NamedTuple):
    """What chunks do to the state before them, or to its gradient after them: h ← exp(A total_delta) h + end."""

    end: Any  # (batch, chunks, channels, state)
    total_delta: Any  # (batch, chunks, channels)


def forward_plan(inputs: ScanInputs) -> Plan:
    """Eight states in a thread: two threads for a channel of Mamba's 16, which exchange little."""
    return Plan.create(inputs, registers=8, block=32)


def backward_plan(inputs: ScanInputs) -> Plan:
    """Four states in a thread leave registers for those of a window; wide blocks keep the sums for B and C few."""
    return Plan.create(inputs, registers=4, block=64)


def forward(inputs: ScanInputs, options: ScanOptions, save_states: bool) -> dict[str, jax.Array]:
    """`y` and `last_state`, and the `states` before every `SAVED` steps if asked for; `inputs` are from `pad`."""
    batch, length, channels = inputs.u.shape
    plan = forward_plan(inputs)
    outputs = dict(y=_like(inputs.u), last_state=_float32(batch, channels, plan.state))
    if save_states:
        outputs["states"] = _float32(batch, pl.cdiv(length, SAVED), channels, plan.state)
    arguments = [inputs, plan.summarize(options, inputs)]
    in_specs = [jax.tree.map(_input_spec, inputs), jax.tree.map(_output_spec, arguments[1])]
    return plan.call(_forward_kernel, options, arguments, in_specs, outputs)


def backward(inputs: ScanInputs, states, dy, d_last_state, options: ScanOptions) -> ScanInputs:
    """The gradients of all inputs, which are from `pad`; those of B and C without what it has added."""
    batch, length, channels = inputs.u.shape
    plan = backward_plan(inputs)
    constant, vector = _float32(batch, plan.chunks, channels, plan.state), _float32(batch, plan.chunks, channels)
    varying = _float32(batch, plan.groups, plan.blocks, length, plan.state)
    partial = ScanInputs(
        u=_like(inputs.u),
        delta=_like(inputs.delta),
        A=constant,
        B=constant if plan.constant_B else varying,
        C=constant if plan.constant_C else varying,
        D=None if inputs.D is None else vector,
        z=None if inputs.z is None else _like(inputs.z),
        delta_bias=None if inputs.delta_bias is None else vector,
        initial_state=None if inputs.initial_state is None else _float32(batch, channels, plan.state),
    )
    arguments = [inputs, states, dy, d_last_state, plan.summarize(options, inputs, dy)]
    in_specs = [jax.tree.map(_input_spec, inputs), *jax.tree.map(_output_spec, arguments[1:])]
    partial = plan.call(_backward_kernel, options, arguments, in_specs, partial)

    def total(x):
        if x is None:
            return None
        return x.sum(2).swapaxes(1, 2) if x.ndim == 5 else x.sum((0, 1))

    return partial._replace(**{name: total(getattr(partial, name)) for name in ("A", "B", "C", "D", "delta_bias")})


def pad(inputs: ScanInputs, options: ScanOptions) -> ScanInputs:
    """With B and C, if they vary in time, as long as whole windows, so that no kernel asks whether a row exists."""
    missing = -inputs.length % WINDOW
    width = ((0, 0), (missing, 0) if options.reverse else (0, missing), (0, 0), (0, 0))
    return inputs._replace(**{n: jnp.pad(x, width) for n, x in (("B", inputs.B), ("C", inputs.C)) if x.ndim == 4})


def _spec(x, **axes: int) -> pl.BlockSpec:
    """What a program sees of an array: its own index along the axes of `batch`, `group`, `block`, all along others."""
    programs = {axis: ("block", "chunk", "group", "batch").index(name) for name, axis in axes.items()}
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


def _summary_kernel(plan: Plan, options: ScanOptions, inputs: ScanInputs, d_output, summary: Summary) -> None:
    """Starts each chunk from zero, in the direction of the recurrence or, with `d_output`, of its adjoint."""
    program, forward = Program(plan, options, inputs), d_output is None

    def window(index, whole, carry):
        h, total = carry
        tiles = program.tiles(program.load_window(index, whole), index, whole)
        for tile in tiles if forward else reversed(tiles):
            if forward:
                added, matrix, lanes = tile.delta * tile.u, program.B, range(program.steps)
            else:
                dy = program.load(d_output, tile.first, whole).astype(jnp.float32)
                added, matrix, lanes = program.gate(dy, tile), program.C, reversed(range(program.steps))
            delta, added = program.rows(tile.delta), program.rows(added)
            for lane in lanes:
                decay, x = program.decay(delta[lane]), added[lane] * matrix(tile.first + lane)
                h = decay * h + x if forward else decay * (h + x)
            total += tile.delta
        return h, total

    zeros = jnp.zeros(plan.axes, jnp.float32), program.zero_tile
    h, total = program.walk(window, zeros, backward=not forward)
    program.store_states(summary.end, h, program.chunk)
    program.store_channels(summary.total_delta, total, program.chunk)


def _forward_kernel(plan: Plan, options: ScanOptions, inputs: ScanInputs, summary: Summary | None, outputs) -> None:
    program = Program(plan, options, inputs)

    def window(index, whole, carry):
        if "states" in outputs:
            saved, rest = _divide(index, SAVED // WINDOW)
            program.store_states(outputs["states"], carry[0], saved, condition=rest == 0)
        following = jnp.minimum(index + 1, plan.windows - 1)
        loaded = program.load_window(following, whole)
        h, tiles, B, C = carry
        for number, tile in enumerate(tiles):
            delta, delta_u, y = program.rows(tile.delta), program.rows(tile.delta * tile.u), []
            for lane in range(program.steps):
                last = (number + 1) * program.steps == WINDOW and lane == program.steps - 1
                ahead = [matrix(tile.first + lane + 1, not last) for matrix in (program.B, program.C)]
                h = program.decay(delta[lane]) * h + delta_u[lane] * B
                y.append(_sum_registers(h * C))
                B, C = ahead
            y = program.gate(program.add_skip(program.sum_states(y), tile), tile)
            program.store(outputs["y"], y, tile.first, whole)
        return h, program.tiles(loaded, following, whole), B, C

    def start(h, index, whole):
        tiles = program.tiles(program.load_window(index, whole), index, whole)
        return h, tiles, program.B(index * WINDOW), program.C(index * WINDOW)

    h = program.load_states(inputs.initial_state)
    if summary is not None:
        h = lax.fori_loop(0, program.chunk, functools.partial(program.skip_chunk, summary), h)
    h = program.walk(window, h, start=start)
    program.store_states(outputs["last_state"], h, condition=program.is_chunk(plan.chunks - 1))


class Sums(NamedTuple):
    """What the backward kernel carries from a window to the one before it: the state's gradient and sums over time."""

    dh: jax.Array
    dA: jax.Array
    dB: jax.Array | None  # None where B varies in time
    dC: jax.Array | None
    dD: jax.Array
    d_bias: jax.Array


def _backward_kernel(
    plan: Plan, options: ScanOptions, inputs: ScanInputs, states, d_output, d_last_state, summary, gradients: ScanInputs
) -> None:
    program = Program(plan, options, inputs)

    def window(index, whole, sums):
        saved, rest = _divide(index, SAVED // WINDOW)
        h = program.load_states(states, saved)
        h = lax.fori_loop(index - rest, index, lambda i, h: _advance(program, i, True, h)[1][-1], h)
        tiles, history = _advance(program, index, whole, h)
        dB, dC = MatrixGradient(program, gradients.B, sums.dB), MatrixGradient(program, gradients.C, sums.dC)
        for tile in reversed(tiles):
            sums = _pull_back_tile(program, tile, whole, history, d_output, dB, dC, gradients, sums)
        return sums._replace(dB=dB.total, dC=dC.total)

    dh = program.load_states(d_last_state)
    if summary is not None:
        last, skip = plan.chunks - 1, functools.partial(program.skip_chunk, summary)
        dh = lax.fori_loop(0, last - program.chunk, lambda number, dh: skip(last - number, dh), dh)
    zeros = jnp.zeros(plan.axes, jnp.float32)
    constant = [zeros if constant else None for constant in (plan.constant_B, plan.constant_C)]
    sums = Sums(dh, zeros, *constant, program.zero_tile, program.zero_tile)
    sums = program.walk(window, sums, backward=True)
    program.store_states(gradients.initial_state, sums.dh, condition=program.is_chunk(0))
    program.store_states(gradients.A, sums.dA, program.chunk)
    if plan.constant_B:
        program.store_states(gradients.B, sums.dB, program.chunk)
    if plan.constant_C:
        program.store_states(gradients.C, sums.dC, program.chunk)
    program.store_channels(gradients.D, sums.dD, program.chunk)
    program.store_channels(gradients.delta_bias, sums.d_bias, program.chunk)


def _advance(program, index, whole: bool, h) -> tuple[list, list]:
    """The tiles of a window, and the states before its first step and after each."""
    tiles, history = program.tiles(program.load_window(index, whole), index, whole), [h]
    for tile in tiles:
        delta, delta_u = program.rows(tile.delta), program.rows(tile.delta * tile.u)
        for lane in range(program.steps):
            h = program.decay(delta[lane]) * h + delta_u[lane] * program.B(tile.first + lane)
            history.append(h)
    return tiles, history


def _pull_back_tile(program, tile, whole, history, d_output, dB, dC, gradients: ScanInputs, sums: Sums) -> Sums:
    """Goes back over one tile: stores the gradients of u, delta and z there and returns the new sums."""
    d_gated = program.load(d_output, tile.first, whole).astype(jnp.float32)
    dy = program.gate(d_gated, tile)
    y, d_input, d_rate, dh, dA = _pull_back_steps(program, tile, history, dy, dB, dC, sums.dh, sums.dA)
    if tile.z is not None:
        sigmoid = program.sigmoid(tile.z)
        d_silu = sigmoid * (1 + tile.z * (1 - sigmoid))
        program.store(gradients.z, d_gated * program.add_skip(program.sum_states(y), tile) * d_silu, tile.first, whole)
    d_input, d_rate = program.sum_states(d_input), program.sum_states(d_rate)
    du = d_input * tile.delta
    program.store(gradients.u, du if program.D is None else du + dy * program.D, tile.first, whole)
    d_delta = d_input * tile.u + d_rate * (1 / LOG2_E)
    if program.options.delta_softplus:
        d_delta *= program.sigmoid(tile.raw)
    d_delta = d_delta if whole else jnp.where(program.inside(tile.first), d_delta, 0.0)
    program.store(gradients.delta, d_delta, tile.first, whole)
    return sums._replace(dh=dh, dA=dA, dD=sums.dD + dy * tile.u, d_bias=sums.d_bias + d_delta)


def _pull_back_steps(program, tile, history, dy, dB, dC, dh, dA):
    """Runs the adjoint recurrence over the steps of one tile, whose states it takes off the history.

    With a_t = exp(Δ_t A) and g_t the gradient of h_t: g_t = dy_t C_t + a_{t+1} g_{t+1}, dC_t = Σ_c dy_t h_t,
    dB_t = Σ_c g_t Δ_t u_t, d(Δ_t u_t) = Σ_n g_t B_t and d(Δ_t A) = g_t a_t h_{t-1}. On entry `dh` is a_{t+1} g_{t+1}.

    Returns:
      A thread's part of Σ_n h_t C_t (for the gate), d(Δ_t u_t) and log2(e) Σ_n d(Δ_t A) A, each a list over the steps;
      `dh` before the tile; `dA`.
    """
    delta, delta_u, dy = (program.rows(x) for x in (tile.delta, tile.delta * tile.u, dy))
    y, d_input, d_rate = [], [], []
    for lane in reversed(range(program.steps)):
        step, h = tile.first + lane, history.pop()
        B, C = program.B(step), program.C(step)
        y.insert(0, _sum_registers(h * C))
        dC.add(step, dy[lane] * h)
        dh = dh + dy[lane] * C
        dB.add(step, dh * delta_u[lane])
        d_input.insert(0, _sum_registers(dh * B))
        dh = dh * program.decay(delta[lane])
        d_exponent = dh * history[-1]
        dA = dA + d_exponent * delta[lane]
        d_rate.insert(0, _sum_registers(d_exponent * program.log2_decay))
    return y, d_input, d_rate, dh, dA


class Tile(NamedTuple):
    """Consecutive steps of a program's channels, one on each state lane: (1, groups, state lanes, channel lanes)."""

    first: jax.Array  # number of the first step
    u: jax.Array
    raw: jax.Array  # the step sizes before softplus
    delta: jax.Array  # the step sizes; 0 after the end of the sequence, where the state must stay as it is
    z: jax.Array | None


class Program:
    """One program's part of the problem: its indices, what is constant in time, and its access to memory.

    Steps are counted in the direction of the recurrence. Memory with channels is read and written through arrays of one
    axis, the program's threads, because Triton then has no choice of layout, and layouts that differ cost exchanges
    between threads at every step. `whole` says that all steps of a window exist, so that nothing need be masked.
    """

    def __init__(self, plan: Plan, options: ScanOptions, inputs: ScanInputs):
        self.plan, self.options, self.inputs = plan, options, inputs
        registers, _, self.steps, channel_lanes = plan.shape
        self.register = self._iota(0)
        self.state_lane, self.channel_lane = (
            sum(
                (self._iota(plan.axis(i, 2**k)) * 2**k for k in range(plan.shape[i].bit_length() - 1)), 0 * self._iota()
            )
            for i in (2, 3)
        )
        self.state = self.state_lane * registers + self.register
        self.padded = registers * self.steps != plan.state
        rest, channel_lane = _divide(lax.iota(jnp.int32, plan.threads), channel_lanes)
        channel_group, self.thread_lane = _divide(rest, self.steps)
        channel = pl.program_id(0) * plan.block + channel_group * channel_lanes + channel_lane
        self.chunk = pl.program_id(1) if plan.chunks > 1 else 0
        self.thread_channel = pl.program_id(2) * plan.channels + channel
        self.thread_mask = channel < plan.channels if plan.channels % plan.block else None
        self.zero_tile = jnp.zeros((1, *plan.axes[1:]), jnp.float32)
        self.log2_decay = self._load_matrix(inputs.A) * LOG2_E  # exp(Δ A) = exp2(Δ A log2(e)), one instruction
        self.constant_B = self._load_matrix(inputs.B) if plan.constant_B else None
        self.constant_C = self._load_matrix(inputs.C) if plan.constant_C else None
        self.D, self.delta_bias = (self._load_channels(x) for x in (inputs.D, inputs.delta_bias))

    def _iota(self, axis: int | None = None) -> jax.Array:
        """Indices along one of `Plan.axes`, to broadcast; without an axis, a single 0."""
        shape = [n if i == axis else 1 for i, n in enumerate(self.plan.axes)]
        return lax.broadcasted_iota(jnp.int32, shape, axis or 0)

    def walk(self, window, carry, start=None, backward: bool = False) -> Any:
        """Runs `window(index, whole, carry)` over the windows of the program's chunk, in order or from the last on.

        With `start`, `window` carries more than is returned: `start(carry, index, whole)` makes it, `carry` first.
        """
        plan, first = self.plan, self.chunk * self.plan.chunk
        end = jnp.minimum(first + plan.chunk, plan.windows) if plan.chunks > 1 else plan.windows
        # One loop even if the last window is incomplete: the time to compile grows with the cube of the code.
        whole = plan.length % WINDOW == 0

        def body(number, carry):
            index = end - 1 - (number - first) if backward else number
            return window(jnp.asarray(index, jnp.int32), whole, carry)  # with jax_enable_x64 it is an int64

        if start is None:
            return lax.fori_loop(first, end, body, carry)
        return lax.fori_loop(first, end, body, start(carry, jnp.asarray(first, jnp.int32), whole))[0]

    def is_chunk(self, chunk: int) -> jax.Array | None:
        """Whether the program's chunk is this one; None if there is one chunk."""
        return self.chunk == chunk if self.plan.chunks > 1 else None

    def skip_chunk(self, summary: Summary, chunk, h) -> jax.Array:
        """The state behind a chunk from the state before it, or so for the state's gradient."""
        return self.decay(self._load_channels(summary.total_delta, chunk)) * h + self.load_states(summary.end, chunk)

    def load_window(self, window, whole: bool) -> list[tuple]:
        """u, delta and z of one window as they are in memory, for each of its tiles."""
        arrays = self.inputs.u, self.inputs.delta, self.inputs.z
        firsts = range(0, WINDOW, self.steps)
        return [tuple(self._load_last(x, window * WINDOW + first, whole) for x in arrays) for first in firsts]

    def tiles(self, loaded: list[tuple], window, whole: bool) -> list[Tile]:
        """The tiles of one window, in order, from what `load_window` returned."""
        return [self._tile(*x, window * WINDOW + i * self.steps, whole) for i, x in enumerate(loaded)]

    def _tile(self, u, raw, z, first, whole: bool) -> Tile:
        u, raw, z = (None if x is None else x.astype(jnp.float32) for x in (u, raw, z))
        if self.delta_bias is not None:
            raw += self.delta_bias
        delta = self.softplus(raw) if self.options.delta_softplus else raw
        return Tile(first, u, raw, delta if whole else jnp.where(self.inside(first), delta, 0.0), z)

    def softplus(self, x) -> jax.Array:
        """log(1 + exp(x)) without a branch; above 20 it is x in float32, as the contract says."""
        power = self.exp2(jnp.abs(x) * -LOG2_E)
        quotient = functools.reduce(lambda total, coefficient: total * power + coefficient, LOG1P[::-1])
        return jnp.maximum(x, 0.0) + power * quotient

    def sigmoid(self, x) -> jax.Array:
        """1 / (1 + exp(-x))."""
        return self._instruction("rcp", jnp.reciprocal, 1 + self.exp2(x * -LOG2_E))

    def exp2(self, x) -> jax.Array:
        """2ˣ by one instruction, where `jnp.exp2` would take four to keep results below 1e-38."""
        return self._instruction("ex2", jnp.exp2, x)

    def _instruction(self, name: str, function, x) -> jax.Array:
        if self.options.interpret:
            return function(x)
        asm, result = f"{name}.approx.ftz.f32 $0, $1;", jax.ShapeDtypeStruct(x.shape, x.dtype)
        return plgpu.elementwise_inline_asm(asm, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[result])[0]

    def decay(self, delta) -> jax.Array:
        """exp(Δ A)."""
        return self.exp2(delta * self.log2_decay)

    def add_skip(self, y, tile: Tile) -> jax.Array:
        """y + D u."""
        return y if self.D is None else y + self.D * tile.u

    def gate(self, y, tile: Tile) -> jax.Array:
        """y silu(z)."""
        return y if tile.z is None else y * (tile.z * self.sigmoid(tile.z))

    def B(self, step, exists: bool = True) -> jax.Array:
        """B_t, to broadcast over channels, or B where it is constant; `exists` says that the step is in some window."""
        return self._load_row(self.inputs.B, step, exists) if self.constant_B is None else self.constant_B

    def C(self, step, exists: bool = True) -> jax.Array:
        """C_t, to broadcast over channels, or C where it is constant; `exists` says that the step is in some window."""
        return self._load_row(self.inputs.C, step, exists) if self.constant_C is None else self.constant_C

    def rows(self, tile) -> list:
        """What a tile holds for each step, to broadcast over the state: lanes exchange what they have, then pairs."""
        rows = [tile]
        while (distance := len(rows)) < self.steps:
            upper, others = self._iota(self.plan.axis(2, distance)) == 1, [self.exchange(x, 2, distance) for x in rows]
            pairs = [(jnp.where(upper, y, x), jnp.where(upper, x, y)) for x, y in zip(rows, others)]
            rows = [x for x, _ in pairs] + [y for _, y in pairs]
        return rows

    def sum_states(self, rows: list) -> jax.Array:
        """The opposite of `rows`: the sum of each over the state lanes, as a tile."""
        while (distance := len(rows) // 2) > 0:
            rows = [self.add_halves(x, y, 2, distance) for x, y in zip(rows, rows[distance:])]
        return rows[0]

    def add_halves(self, lower, upper, lanes: int, distance: int) -> jax.Array:
        """Sums over the pairs of lanes that `exchange` joins: in lower lanes of one array, in upper of another."""
        is_upper = self._iota(self.plan.axis(lanes, distance)) == 1
        kept, sent = jnp.where(is_upper, upper, lower), jnp.where(is_upper, lower, upper)
        return kept + self.exchange(sent, lanes, distance)

    def exchange(self, x, lanes: int, distance: int) -> jax.Array:
        """What the state (2) or channel (3) lane has whose number differs in one bit, `distance`."""
        axis = self.plan.axis(lanes, distance)
        return jnp.flip(x, axis) if self.options.interpret else exchange(x, axis)

    def inside(self, first) -> jax.Array:
        """Which steps of the tile that begins at `first` exist."""
        return first + self.state_lane < self.plan.length

    def load(self, reference, first, whole: bool) -> jax.Array | None:
        """The tile of (length, channels) that begins at a step; 0 where nothing exists; None if there is no array."""
        return None if reference is None else self._load_threads(*self._tile_access(reference, first, whole))

    def store(self, reference, tile, first, whole: bool) -> None:
        """The opposite of `load`."""
        self._store_threads(*self._tile_access(reference, first, whole), tile)

    def load_states(self, reference, *index) -> jax.Array:
        """The states in (…, channels, state), zeros if there is no such array."""
        if reference is None:
            return jnp.zeros(self.plan.axes, jnp.float32)
        return self._load_matrix(reference, *index)

    def store_states(self, reference, states, *index, condition=None) -> None:
        """Stores in (…, channels, state), if there is such an array and the condition is met."""
        if reference is not None:
            for register, part in enumerate(_registers(states)):
                access, mask = self._matrix_access(reference, register, *index)
                self._store_threads(access, _both(mask, condition), part)

    def store_channels(self, reference, tile, *index) -> None:
        """Stores a tile's sum over steps in (…, channels), if there is such an array."""
        if reference is not None:
            for distance in (2**k for k in range(self.steps.bit_length() - 1)):
                tile = tile + self.exchange(tile, 2, distance)  # every state lane stores the same
            self._store_threads(reference.at[*index, self.thread_channel], self.thread_mask, tile)

    def store_rows(self, reference, first, rows, lanes: int) -> None:
        """Stores in (length, state) the steps from `first` on, one on so many channel lanes."""
        step = first + self.channel_lane // lanes
        mask = (step < self.plan.length) & (self.state < self.plan.state)
        plgpu.store(reference.at[self._position(step), self.state], rows, mask=mask)

    def _tile_access(self, reference, first, whole: bool):
        step = first + self.thread_lane
        mask = None if whole else step < self.plan.length
        return reference.at[self._position(step, whole), self.thread_channel], _both(self.thread_mask, mask)

    def _matrix_access(self, reference, register: int, *index):
        state = self.thread_lane * self.plan.shape[0] + register
        mask = state < self.plan.state if self.padded else None
        return reference.at[*index, self.thread_channel, state], _both(self.thread_mask, mask)

    def _load_matrix(self, reference, *index):
        matrix = jnp.zeros(self.plan.axes, jnp.float32)
        for register in range(self.plan.shape[0]):
            part = self._load_threads(*self._matrix_access(reference, register, *index))
            matrix = jnp.where(self.register == register, part, matrix)
        return matrix

    def _load_channels(self, reference, *index):
        if reference is None:
            return None
        return self._load_threads(reference.at[*index, self.thread_channel], self.thread_mask)

    def _load_last(self, reference, first, whole: bool):
        """Like `load`, but after the end of the sequence it is its last step."""
        if reference is None:
            return None
        step = first + self.thread_lane
        step = self._position(step if whole else jnp.minimum(step, self.plan.length - 1), True)
        return self._load_threads(reference.at[step, self.thread_channel], self.thread_mask)

    def _load_row(self, reference, step, exists: bool):
        last = self.plan.windows * WINDOW - 1  # to which `pad` has brought the matrices
        step = step if exists else jnp.minimum(step, last)
        mask = self.state < self.plan.state if self.padded else None
        return _load(reference.at[last - step if self.options.reverse else step, self.state], mask)

    def _load_threads(self, access, mask):
        return _load(access, mask).reshape(self.zero_tile.shape)

    def _store_threads(self, access, mask, tile) -> None:
        plgpu.store(access, tile.reshape(self.plan.threads).astype(access.dtype), mask=mask)

    def _position(self, step, exists: bool = False):
        """Index of a step; a step past the end stays past the end."""
        if not self.options.reverse:
            return step
        position = self.plan.length - 1 - step
        return position if exists else jnp.where(position < 0, step, position)


class MatrixGradient:
    """Gradient of B or C while the backward kernel goes through one window, step by step from the last to the first.

    Where the matrix varies in time, its gradient at a step is a sum over channels. In a warp, two steps that follow
    each other become one array, in which half of the lanes hold the one and half the other; two such pairs become the
    next, and so on until each lane holds one step (or there are no more lanes), so that a value takes one exchange,
    not one for each doubling of the lanes. Then the warps are summed.
    """

    def __init__(self, program: Program, reference, total):
        self.program, self.reference, self.total = program, reference, total
        self.steps, self.waiting = min(WINDOW, program.plan.shape[3]), []

    def add(self, step, rows) -> None:
        """Takes what one step contributes, for every channel and state."""
        if self.total is not None:
            self.total = self.total + rows
            return
        program, count, spare = self.program, 1, self.program.plan.shape[3] // self.steps
        while count < self.steps and self.waiting and self.waiting[-1][1] == count:
            later, _ = self.waiting.pop()
            rows, count = program.add_halves(rows, later, 3, count * spare), 2 * count
        if count < self.steps:
            self.waiting.append((rows, count))
            return
        for distance in (2**bit for bit in range(spare.bit_length() - 1)):
            rows += program.exchange(rows, 3, distance)
        program.store_rows(self.reference, step, _sum(rows, axis=1), spare)


def exchange(x, axis: int) -> jax.Array:
    """The array flipped along an axis of two lanes, by a sum over them, less the own value.

    In integers, where that is exact; the compiler leaves nothing but one exchange of registers.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(jnp.sum(bits, axis, keepdims=True, dtype=jnp.int32) - bits, jnp.float32)


def _registers(x) -> list:
    """The parts of an array along its first axis, which is in a thread's registers."""
    return lax.split(x, [1] * x.shape[0], axis=0) if x.shape[0] > 1 else [x]


def _sum_registers(x):
    """Sum over the first axis, one after the other, so that each product becomes part of a multiply-add."""
    return functools.reduce(lambda total, part: total + part, _registers(x))


def _load(access, mask):
    return plgpu.load(access) if mask is None else plgpu.load(access, mask=mask, other=0.0)


def _both(first, second):
    """Both conditions, of which one that always holds may be None."""
    return first if second is None else second if first is None else first & second


def _divide(x, divisor: int):
    """Quotient and remainder of 32-bit integers that are not negative."""
    return lax.div(x, np.int32(divisor)), lax.rem(x, np.int32(divisor))


def _sum(x, axis: int):
    return x if x.shape[axis] == 1 else jnp.sum(x, axis, keepdims=True)
