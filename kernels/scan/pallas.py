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

Threads exchange values through arrays that are split along an axis of lanes: the compiler brings that axis into
registers, if there are more than two lanes through shared memory, where one instruction stores or loads up to four
values. An exchange between lanes takes one for each value, and two to choose what to keep and what to send.

The forward pass saves the state between windows. The backward pass visits windows of half that size, the last first: it
recomputes the states of one into registers, from the saved state before it, and runs the adjoint recurrence over it.
Sums over channels (gradients of B and C) and over the batch (A, D, delta_bias) leave the kernel as partial sums, one
for each program, and XLA adds them up: there are no atomics, and the same input gives the same bits.

Where batch and channels are too few to keep a GPU busy, time is also cut into chunks, which run at the same time. The
recurrence is linear, so a first kernel finds what each chunk adds to a state, and multiplies it by exp(A Σ Δ); from
these each program computes the state at which its own chunk starts. The adjoint recurrence is cut in the same way.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.scan.differentiation import differentiable
from kernels.scan.inputs import ScanInputs, ScanOptions
from kernels.scan.order import gathered

WINDOW = 12  # steps between saved states, even; the backward kernel holds the states of half of them in registers
ROWS = 2  # steps whose contributions to the gradients of B and C it holds there; a power of two
CHUNK = 24  # steps of the shortest chunks; a multiple of WINDOW
THREADS = 128  # of a program at most; a multiprocessor has registers for two such programs, 255 for each thread
PROCESSORS = 132  # of an H100 or H200; fewer programs than two for each are cut into chunks of time
VECTOR = 4  # numbers of 32 bits that one instruction moves
LOG2_E = math.log2(math.e)
LARGEST = 62.0  # exponent of 2 in a gate's denominator: the product of two, and its reciprocal, are normal numbers
# log(1 + x) / x on [0, 1] at Chebyshev nodes; with the rounding of float32 the relative error is 2e-7.
LOG1P = (
    *(0.9999999403953552, -0.4999944567680359, 0.3331812024116516, -0.2483539879322052, 0.19076880812644958),
    *(-0.13602247834205627, 0.0775160863995552, -0.029074065387248993, 0.0051261018961668015),
)


def why_unavailable(platform: str, inputs: ScanInputs) -> str | None:
    """Returns one line that explains why the kernels cannot run, None if they can."""
    if platform != "gpu":
        return f"it needs a GPU, and JAX runs on {platform} here"
    # Pallas computes 64-bit offsets into arrays that need them, but counts along an axis in 32 bits.
    if max(*inputs.u.shape, inputs.state) >= 2**31:
        return f"u has shape {inputs.u.shape}, but no axis may be longer than 2³¹ - 1: cut it into parts"
    return None


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
    window: int  # steps, a multiple of the state lanes
    parts: int  # windows from one saved state to the next
    shape: tuple[int, int, int, int]  # of a program's arrays: state registers, channel groups, state and channel lanes

    @classmethod
    def create(cls, inputs: ScanInputs, registers: int, block: int, parts: int) -> "Plan":
        """Aims at `registers` states in a thread, `block` channels in a program and `WINDOW / parts` steps a window."""
        (batch, length, channels), state, groups = inputs.u.shape, inputs.state, inputs.groups
        padded_state = pl.next_power_of_2(state)
        window = WINDOW if padded_state <= 16 else min(WINDOW, 8)  # long states take 8 lanes, which do not divide 12
        window //= parts
        state_lanes = min(max(padded_state // registers, 1), window & -window)  # at most the window's power of two
        block = min(block, THREADS // state_lanes, pl.next_power_of_2(channels // groups))
        channel_lanes = min(32 // state_lanes, block)
        shape = padded_state // state_lanes, block // channel_lanes, state_lanes, channel_lanes
        constant = inputs.B.ndim == 2, inputs.C.ndim == 2
        return cls(batch, length, channels // groups, groups, state, *constant, window, parts, shape)

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
        """Windows in a sequence; of the last `parts`, some may be incomplete or empty."""
        return pl.cdiv(self.length, self.window * self.parts) * self.parts

    @property
    def padded_length(self) -> int:
        """Steps in all windows."""
        return self.windows * self.window

    @property
    def chunk(self) -> int:
        """Windows in a chunk: all of them if there are programs enough."""
        programs = self.blocks * self.groups * self.batch
        if programs >= 2 * PROCESSORS:
            return self.windows
        wanted = pl.cdiv(self.windows * programs, 4 * PROCESSORS)
        return min(max(wanted, CHUNK // self.window), self.windows)

    @property
    def chunks(self) -> int:
        """Chunks in a sequence."""
        return pl.cdiv(self.windows, self.chunk)

    def call(self, kernel, options: ScanOptions, arguments: list, in_specs: list, outputs) -> Any:
        """Runs `kernel(plan, options, *arguments, outputs)` in every program; `outputs` is a tree of shapes."""
        varying = jax.typeof(arguments[0].u).manual_axis_type  # over axes of `jax.shard_map`, as all arguments do
        outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying), outputs)
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
        """Finds what each chunk does to the state, or with `d_output` to its gradient; None if there is one chunk."""
        if self.chunks == 1:
            return None
        chunks, channels = (self.batch, self.chunks), self.channels * self.groups
        summary = Summary(_float32(*chunks, channels, self.state), _float32(*chunks, channels))
        in_specs = [jax.tree.map(_input_spec, inputs), None if d_output is None else _spec(d_output, batch=0)]
        return self.call(_summary_kernel, options, [inputs, d_output], in_specs, summary)


class Summary(NamedTuple):
    """The effect of chunks on the state before them, or on its gradient after them: h ← exp(A total_delta) h + end."""

    end: Any  # (batch, chunks, channels, state)
    total_delta: Any  # (batch, chunks, channels)


def forward_plan(inputs: ScanInputs) -> Plan:
    """Eight states in a thread: two threads for a channel of Mamba's 16, which exchange little."""
    return Plan.create(inputs, registers=8, block=32, parts=1)


def backward_plan(inputs: ScanInputs) -> Plan:
    """As in the forward pass, but short windows, to hold their states; wide blocks keep the sums for B and C few."""
    return Plan.create(inputs, registers=8, block=64, parts=2)


def forward(inputs: ScanInputs, options: ScanOptions, save_states: bool) -> dict[str, jax.Array]:
    """`y` and `last_state`, and if asked for the `states` after every window but the last; `inputs` are from `pad`."""
    batch, length, channels = inputs.u.shape
    plan = forward_plan(inputs)
    outputs = dict(y=_like(inputs.u), last_state=_float32(batch, channels, plan.state))
    if save_states:
        outputs["states"] = _float32(batch, max(plan.windows - 1, 1), channels, plan.state)
    arguments = [inputs, plan.summarize(options, inputs)]
    in_specs = [jax.tree.map(_input_spec, inputs), jax.tree.map(_output_spec, arguments[1])]
    return plan.call(_forward_kernel, options, arguments, in_specs, outputs)


def backward(inputs: ScanInputs, states, dy, d_last_state, options: ScanOptions) -> ScanInputs:
    """The gradients of all inputs, which are from `pad`; those of B and C without what it has added."""
    batch, length, channels = inputs.u.shape
    plan = backward_plan(inputs)
    constant, vector = _float32(batch, plan.chunks, channels, plan.state), _float32(batch, plan.chunks, channels)
    varying = [name for name in "BC" if getattr(inputs, name).ndim == 4]
    rows = _float32(batch, plan.groups, plan.blocks, len(varying), plan.padded_length, plan.state) if varying else None
    partial = ScanInputs(
        u=_like(inputs.u),
        delta=_like(inputs.delta),
        A=constant,
        B=constant if plan.constant_B else None,
        C=constant if plan.constant_C else None,
        D=None if inputs.D is None else vector,
        z=None if inputs.z is None else _like(inputs.z),
        delta_bias=None if inputs.delta_bias is None else vector,
        initial_state=None if inputs.initial_state is None else _float32(batch, channels, plan.state),
    )
    arguments = [inputs, states, dy, d_last_state, plan.summarize(options, inputs, dy)]
    in_specs = [jax.tree.map(_input_spec, inputs), *jax.tree.map(_output_spec, arguments[1:])]
    partial, rows = plan.call(_backward_kernel, options, arguments, in_specs, (partial, rows))
    totals = {name: getattr(partial, name) for name in ("A", "B", "C", "D", "delta_bias")}
    totals = {name: None if x is None else x.sum((0, 1)) for name, x in totals.items()}
    if varying:
        first = plan.padded_length - length if options.reverse else 0
        rows = jnp.moveaxis(rows.sum(2)[..., first : first + length, :], 2, 0).swapaxes(2, 3)
        totals |= zip(varying, rows)
    return partial._replace(**totals)


def _pad_and_run_forward(inputs: ScanInputs, options: ScanOptions, save: bool) -> tuple:
    outputs = forward(pad(inputs, options), options, save_states=save)
    return outputs["y"], outputs["last_state"], outputs.get("states")


def _pad_and_run_backward(inputs: ScanInputs, states, dy, d_last_state, options: ScanOptions) -> ScanInputs:
    return backward(pad(inputs, options), states, dy, d_last_state, options)


scan = gathered(differentiable(_pad_and_run_forward, _pad_and_run_backward, saved="b.c."))


def pad(inputs: ScanInputs, options: ScanOptions) -> ScanInputs:
    """With B and C, if they vary in time, as long as whole windows, so that no kernel asks whether a row exists."""
    missing = forward_plan(inputs).padded_length - inputs.length
    width = ((0, 0), (missing, 0) if options.reverse else (0, missing), (0, 0), (0, 0))
    return inputs._replace(**{n: jnp.pad(x, width) for n, x in (("B", inputs.B), ("C", inputs.C)) if x.ndim == 4})


def _spec(x, **axes: int) -> pl.BlockSpec:
    """Gives a program its own index along the axes of `batch`, `group` and `block`, and all of the others."""
    programs = {axis: ("block", "chunk", "group", "batch").index(name) for name, axis in axes.items()}
    shape = [None if axis in programs else size for axis, size in enumerate(x.shape)]

    def index(*ids):  # the minimum changes nothing, but tells the compiler that offsets fit into 32 bits
        return tuple(jnp.minimum(ids[programs[i]], n - 1) if i in programs else 0 for i, n in enumerate(x.shape))

    return pl.BlockSpec(shape, index)


def _input_spec(x) -> pl.BlockSpec:
    """Of the parameters, of (batch, length or channels, …) or of (batch, length, groups, state)."""
    return _spec(x) if x.ndim < 3 else _spec(x, batch=0) if x.ndim == 3 else _spec(x, batch=0, group=2)


def _output_spec(x) -> pl.BlockSpec:
    """Of (batch, …) or of (batch, groups, blocks, matrices, length, state)."""
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
        tiles = [*zip(tiles, program.steps(index))]
        for tile, steps in tiles if forward else reversed(tiles):
            if forward:
                added, matrix = tile.delta * tile.u, program.B
            else:
                dy = program.load(d_output, steps.own, whole).astype(jnp.float32)
                added, matrix = program.gate(dy, tile), program.C
            rows = [*enumerate(program.rows(added, tile.delta))]
            for lane, (row, delta) in rows if forward else reversed(rows):
                decay, x = program.decay(delta), row * matrix(steps.first + lane)
                h = decay * h + x if forward else decay * (h + x)
            total += tile.delta
        return h, total

    zeros = jnp.zeros(plan.shape, jnp.float32), program.zero_tile
    h, total = program.walk(window, zeros, backward=not forward)
    program.store_states(summary.end, h, program.chunk)
    program.store_channels(summary.total_delta, total, program.chunk)


def _forward_kernel(plan: Plan, options: ScanOptions, inputs: ScanInputs, summary: Summary | None, outputs) -> None:
    program = Program(plan, options, inputs)

    def window(index, whole, carry):
        if "states" in outputs:
            program.store_states(outputs["states"], carry[0], index - 1, condition=index > 0)
        following = jnp.minimum(index + 1, plan.windows - 1)
        loaded = program.load_window(following, whole)
        h, tiles, B, C = carry
        for tile, gate, steps in zip(tiles, program.gates(tiles), program.steps(index)):
            y = []
            for lane, (delta, delta_u) in enumerate(program.rows(tile.delta, tile.delta * tile.u)):
                last = tile is tiles[-1] and lane == program.lanes - 1
                step = following * plan.window if last else steps.first + lane + 1
                ahead = program.B(step), program.C(step)
                h = program.decay(delta) * h + delta_u * B
                y.append(_sum(_split(h * C, 0)))
                B, C = ahead
            (y,) = program.sum_states(y)
            program.store(outputs["y"], program.add_skip(y, tile) * gate, steps.own, whole)
        return h, program.tiles(loaded, following, whole), B, C

    def start(h, index, whole):
        tiles = program.tiles(program.load_window(index, whole), index, whole)
        return h, tiles, program.B(index * plan.window), program.C(index * plan.window)

    h = program.load_states(inputs.initial_state)
    if summary is not None:
        h = lax.fori_loop(0, program.chunk, functools.partial(program.skip_chunk, summary), h)
    h = program.walk(window, h, start=start)
    program.store_states(outputs["last_state"], h, condition=program.is_chunk(plan.chunks - 1))


class Sums(NamedTuple):
    """Carried by the backward kernel from a window to the one before it: the state's gradient and sums over time."""

    dh: jax.Array
    dA: jax.Array
    dB: jax.Array | None  # None where B varies in time
    dC: jax.Array | None
    dD: jax.Array
    d_bias: jax.Array


def _backward_kernel(
    plan: Plan, options: ScanOptions, inputs: ScanInputs, states, d_output, d_last_state, summary, outputs
) -> None:
    program, (gradients, rows) = Program(plan, options, inputs), outputs

    def window(index, whole, sums):
        saved, passed = _divide(index, plan.parts)
        h = program.load_states(states, jnp.maximum(saved - 1, 0), condition=saved > 0)
        if inputs.initial_state is not None:
            h = jnp.where(saved > 0, h, program.load_states(inputs.initial_state))
        h = lax.fori_loop(index - passed, index, lambda before, h: _advance(program, before, whole, h)[1][-1].after, h)
        tiles, history = _advance(program, index, whole, h)
        dB, dC = [], []
        for tile, steps in reversed([*zip(tiles, program.steps(index))]):
            sums = _pull_back_tile(program, tile, steps, whole, history, d_output, dB, dC, gradients, sums)
            if len(dB) >= ROWS or not history:
                sums = _add_rows(program, rows, steps.first, dB, dC, sums)
                dB, dC = [], []
        return sums

    dh = program.load_states(d_last_state)
    if summary is not None:
        last, skip = plan.chunks - 1, functools.partial(program.skip_chunk, summary)
        dh = lax.fori_loop(0, last - program.chunk, lambda number, dh: skip(last - number, dh), dh)
    zeros = jnp.zeros(plan.shape, jnp.float32)
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


def _add_rows(program, reference, first, dB: list, dC: list, sums: Sums) -> Sums:
    """Stores what the steps from `first` on contribute to the gradients of B and C, or adds it if they are constant."""
    both = (sums.dB, dB), (sums.dC, dC)
    program.store_rows(reference, first, [row for total, rows in both if total is None for row in rows])
    dB, dC = (None if total is None else total + _sum(rows) for total, rows in both)
    return sums._replace(dB=dB, dC=dC)


class Step(NamedTuple):
    """One step of the recurrence, after = decay before + Δ u B, and what of it to keep rather than to compute again."""

    before: jax.Array  # the state
    after: jax.Array
    decay: jax.Array  # exp(Δ A)
    delta: jax.Array


def _advance(program, index, whole: bool, h) -> tuple[list, list[Step]]:
    """The tiles and the steps of a window, from the state `h` before it."""
    tiles, history = program.tiles(program.load_window(index, whole), index, whole), []
    for tile, steps in zip(tiles, program.steps(index)):
        for lane, (delta, delta_u) in enumerate(program.rows(tile.delta, tile.delta * tile.u)):
            decay, B = program.decay(delta), program.B(steps.first + lane)
            before, h = h, decay * h + delta_u * B
            history.append(Step(before, h, decay, delta))
    return tiles, history


def _pull_back_tile(program, tile, steps, whole, history, d_output, dB, dC, gradients: ScanInputs, sums: Sums) -> Sums:
    """Goes back over one tile: stores the gradients of u, delta and z there and returns the new sums."""
    d_gated = program.load(d_output, steps.own, whole).astype(jnp.float32)
    dy = program.gate(d_gated, tile)
    y, d_input, d_rate, dh, dA = _pull_back_steps(program, tile, steps.first, history, dy, dB, dC, sums.dh, sums.dA)
    if tile.z is not None:
        sigmoid = program.sigmoid(tile.z)
        d_silu = sigmoid + tile.z * sigmoid * (1 - sigmoid)
        (y,) = program.sum_states(y)
        program.store(gradients.z, d_gated * program.add_skip(y, tile) * d_silu, steps.own, whole)
    d_input, d_rate = program.sum_states(d_input, d_rate)
    du = d_input * tile.delta
    program.store(gradients.u, du if program.D is None else du + dy * program.D, steps.own, whole)
    d_delta = d_input * tile.u + d_rate * (1 / LOG2_E)
    if program.options.delta_softplus:
        d_delta *= program.sigmoid(tile.raw)
    d_delta = d_delta if whole else jnp.where(program.inside(steps.first), d_delta, 0.0)
    program.store(gradients.delta, d_delta, steps.own, whole)
    return sums._replace(dh=dh, dA=dA, dD=sums.dD + dy * tile.u, d_bias=sums.d_bias + d_delta)


def _pull_back_steps(program, tile, first, history, dy, dB, dC, dh, dA):
    """Runs the adjoint recurrence over the steps of one tile, which it takes off the history.

    With a_t = exp(Δ_t A) and g_t the gradient of h_t: g_t = dy_t C_t + a_{t+1} g_{t+1}, dC_t = Σ_c dy_t h_t,
    dB_t = Σ_c g_t Δ_t u_t, d(Δ_t u_t) = Σ_n g_t B_t and d(Δ_t A) = g_t a_t h_{t-1}. On entry `dh` is a_{t+1} g_{t+1}.
    What each channel contributes to dB and dC goes to the lists of these names.

    Returns:
      A thread's part of Σ_n h_t C_t (for the gate), d(Δ_t u_t) and log2(e) Σ_n d(Δ_t A) A, each a list over the steps;
      `dh` before the tile; `dA`.
    """
    rows, y, d_input, d_rate = program.rows(dy, tile.delta * tile.u), [], [], []
    for lane in reversed(range(program.lanes)):
        (dy, delta_u), step = rows[lane], history.pop()
        B, C = program.B(first + lane), program.C(first + lane)
        y.insert(0, _sum(_split(step.after * C, 0)))
        dC.insert(0, dy * step.after)
        dh = dh + dy * C
        dB.insert(0, dh * delta_u)
        d_input.insert(0, _sum(_split(dh * B, 0)))
        dh = dh * step.decay
        d_exponent = dh * step.before
        dA = dA + d_exponent * step.delta
        d_rate.insert(0, _sum(_split(d_exponent * program.log2_decay, 0)))
    return y, d_input, d_rate, dh, dA


class Tile(NamedTuple):
    """Consecutive steps of a program's channels, one on each state lane: (1, groups, state lanes, channel lanes)."""

    u: jax.Array
    raw: jax.Array  # the step sizes before softplus
    delta: jax.Array  # the step sizes; 0 after the end of the sequence, where the state must stay as it is
    z: jax.Array | None


class Steps(NamedTuple):
    """Numbers of the steps of a tile."""

    first: jax.Array
    own: jax.Array  # of each thread


class Elements(NamedTuple):
    """Indices of an array's elements in memory's order: one or more, as many as a thread has registers, of each."""

    register: jax.Array
    state_lane: jax.Array
    channel: jax.Array
    mask: jax.Array | None  # which channels exist; None if all do


class Program:
    """One program's part of the problem: its indices, what is constant in time, and its access to memory.

    Steps are counted in the direction of the recurrence. Memory with channels is read and written through arrays of one
    axis, the program's threads, each with as many neighbours in memory as one instruction moves: Triton then has no
    choice of layout, and layouts that differ cost exchanges between threads at every step. `whole` says that all steps
    of a window exist, so that nothing need be masked.
    """

    def __init__(self, plan: Plan, options: ScanOptions, inputs: ScanInputs):
        self.plan, self.options, self.inputs = plan, options, inputs
        registers, _, self.lanes, _ = plan.shape
        self.of_tile, self.of_matrix = self._elements(1), self._elements(registers)
        self.state_lane = self._iota(2)
        self.state = self.state_lane * registers + self._iota(0)
        self.padded = registers * self.lanes != plan.state
        self.chunk = pl.program_id(1) if plan.chunks > 1 else 0
        self.zero_tile = jnp.zeros((1, *plan.shape[1:]), jnp.float32)
        self.log2_decay = self._load_matrix(inputs.A) * LOG2_E  # exp(Δ A) = exp2(Δ A log2(e)), one instruction
        self.constant_B = self._load_matrix(inputs.B) if plan.constant_B else None
        self.constant_C = self._load_matrix(inputs.C) if plan.constant_C else None
        self.D, self.delta_bias = (self._load_channels(x) for x in (inputs.D, inputs.delta_bias))

    def _elements(self, registers: int) -> Elements:
        plan, vector = self.plan, min(registers, VECTOR)
        rest, part = _divide(lax.iota(jnp.int32, registers * plan.threads), vector)
        number, thread = _divide(rest, plan.threads)
        rest, channel_lane = _divide(thread, plan.shape[3])
        group, state_lane = _divide(rest, self.lanes)
        channel = pl.program_id(0) * plan.block + group * plan.shape[3] + channel_lane
        mask = channel < plan.channels if plan.channels % plan.block else None
        return Elements(number * vector + part, state_lane, pl.program_id(2) * plan.channels + channel, mask)

    def _iota(self, axis: int) -> jax.Array:
        """Indices along one of the axes of `Plan.shape`, to broadcast."""
        shape = [n if i == axis else 1 for i, n in enumerate(self.plan.shape)]
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def walk(self, window, carry, start=None, backward: bool = False) -> Any:
        """Runs `window(index, whole, carry)` over the windows of the program's chunk, in order or from the last on.

        With `start`, `window` carries more than is returned: `start(carry, index, whole)` makes it, `carry` first.
        """
        plan, first = self.plan, self.chunk * self.plan.chunk
        end = jnp.minimum(first + plan.chunk, plan.windows) if plan.chunks > 1 else plan.windows
        # One loop even if the last window is incomplete: the time to compile grows with the cube of the code.
        whole = plan.length == plan.padded_length

        def body(number, carry):
            index = end - 1 - (number - first) if backward else number
            return window(jnp.asarray(index, jnp.int32), whole, carry)  # with jax_enable_x64 it is an int64

        if start is None:
            return lax.fori_loop(first, end, body, carry)
        return lax.fori_loop(first, end, body, start(carry, jnp.asarray(first, jnp.int32), whole))[0]

    def is_chunk(self, chunk: int) -> jax.Array | None:
        """Tells whether the program's chunk is this one; None if there is one chunk."""
        return self.chunk == chunk if self.plan.chunks > 1 else None

    def skip_chunk(self, summary: Summary, chunk, h) -> jax.Array:
        """The state behind a chunk from the state before it, or so for the state's gradient."""
        return self.decay(self._load_channels(summary.total_delta, chunk)) * h + self.load_states(summary.end, chunk)

    def load_window(self, window, whole: bool) -> list[tuple]:
        """u, delta and z of one window as they are in memory, for each of its tiles."""
        arrays = self.inputs.u, self.inputs.delta, self.inputs.z
        return [tuple(self._load_last(x, steps.own, whole) for x in arrays) for steps in self.steps(window)]

    def tiles(self, loaded: list[tuple], window, whole: bool) -> list[Tile]:
        """The tiles of one window, in order, from what `load_window` returned."""
        return [self._tile(*x, steps.first, whole) for x, steps in zip(loaded, self.steps(window))]

    def steps(self, window) -> list[Steps]:
        """The steps of each tile of a window; constants are added last, to become part of loads and stores."""
        first, tiles = window * self.plan.window, range(0, self.plan.window, self.lanes)
        own = first + self.of_tile.state_lane
        return [Steps(first + i, own + i) for i in tiles]

    def _tile(self, u, raw, z, first, whole: bool) -> Tile:
        u, raw, z = (None if x is None else x.astype(jnp.float32) for x in (u, raw, z))
        if self.delta_bias is not None:
            raw += self.delta_bias
        delta = self.softplus(raw) if self.options.delta_softplus else raw
        return Tile(u, raw, delta if whole else jnp.where(self.inside(first), delta, 0.0), z)

    def softplus(self, x) -> jax.Array:
        """log(1 + exp(x)) without a branch; above 20 it is x in float32, as the contract says."""
        power = self.exp2(jnp.abs(x) * -LOG2_E)
        quotient = functools.reduce(lambda total, coefficient: total * power + coefficient, LOG1P[::-1])
        return jnp.maximum(x, 0.0) + power * quotient

    def sigmoid(self, x) -> jax.Array:
        """1 / (1 + exp(-x))."""
        return self._reciprocal(1 + self.exp2(x * -LOG2_E))

    def _reciprocal(self, x) -> jax.Array:
        return self._instruction("rcp", jnp.reciprocal, x)

    def gates(self, tiles: list[Tile]) -> list:
        """silu(z) of each tile; two tiles share a reciprocal, of which a GPU computes few: 1 / a = b / (a b)."""
        if tiles[0].z is None:
            return [1.0] * len(tiles)
        parts = [1 + self.exp2(jnp.minimum(tile.z * -LOG2_E, LARGEST)) for tile in tiles]
        sigmoids = []
        for first, second in itertools.zip_longest(parts[::2], parts[1::2]):
            inverse = self._reciprocal(first if second is None else first * second)
            sigmoids += [inverse] if second is None else [inverse * second, inverse * first]
        return [tile.z * x for tile, x in zip(tiles, sigmoids)]

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

    def B(self, step) -> jax.Array:
        """B_t, to broadcast over channels, or B where it is constant."""
        return self._load_row(self.inputs.B, step) if self.constant_B is None else self.constant_B

    def C(self, step) -> jax.Array:
        """C_t, to broadcast over channels, or C where it is constant."""
        return self._load_row(self.inputs.C, step) if self.constant_C is None else self.constant_C

    def rows(self, *tiles) -> list[list]:
        """Splits tiles, as many as a power of two, into rows for each step, to broadcast over the state."""
        return [_unstack(x) for x in _split(_stack(tiles), 2)]

    def sum_states(self, *rows: list) -> list:
        """Inverts `rows`: from lists over the steps, the sums over the state lanes, each list's as a tile."""
        total = _sum(_split(_stack([x for steps in zip(*rows) for x in steps]), 2))
        total = jnp.moveaxis(total.reshape(*total.shape[:-1], self.lanes, len(rows)), 4, 2)
        return _unstack(total.reshape(*self.zero_tile.shape, len(rows)))

    def inside(self, first) -> jax.Array:
        """Tells which steps of the tile that begins at `first` exist."""
        return self.state_lane < self.plan.length - first

    def load(self, reference, step, whole: bool) -> jax.Array | None:
        """The tile of (length, channels) at these steps; 0 where nothing exists; None if there is no array."""
        return None if reference is None else self._load_elements(*self._tile_access(reference, step, whole))

    def store(self, reference, tile, step, whole: bool) -> None:
        """Stores the tile of (length, channels) at these steps, where it exists."""
        self._store_elements(*self._tile_access(reference, step, whole), tile)

    def load_states(self, reference, *index, condition=None) -> jax.Array:
        """The states in (…, channels, state), zeros if there is no such array or the condition is not met."""
        if reference is None:
            return jnp.zeros(self.plan.shape, jnp.float32)
        return self._load_matrix(reference, *index, condition=condition)

    def store_states(self, reference, states, *index, condition=None) -> None:
        """Stores in (…, channels, state), if there is such an array and the condition is met."""
        if reference is not None:
            access, mask = self._matrix_access(reference, *index)
            self._store_elements(access, _both(mask, condition), states)

    def store_channels(self, reference, tile, *index) -> None:
        """Stores a tile's sum over steps in (…, channels), if there is such an array."""
        if reference is not None:
            total = jnp.broadcast_to(jnp.sum(tile, 2, keepdims=True), tile.shape)  # every state lane stores the same
            self._store_elements(reference.at[*index, self.of_tile.channel], self.of_tile.mask, total)

    def store_rows(self, reference, first, rows: list) -> None:
        """Stores sums over the program's channels in (matrices, padded length, state), if there is such an array.

        The rows to be summed are those of the steps from `first` on, of one matrix after the other.
        """
        if reference is None:
            return
        total = jnp.sum(_sum(_split(_stack(rows), 3)), 1, keepdims=True)
        number = lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, len(rows)), 4)
        matrix, step = _divide(number, len(rows) // reference.shape[0])
        mask = self.state[..., None] < self.plan.state if self.padded else None
        plgpu.store(reference.at[matrix, self._row(first + step), self.state[..., None]], total, mask=mask)

    def _row(self, step):
        """Index of a step in the matrices, which `pad` has brought to whole windows."""
        return self.plan.padded_length - 1 - step if self.options.reverse else step

    def _tile_access(self, reference, step, whole: bool):
        mask = None if whole else step < self.plan.length
        return reference.at[self._position(step, whole), self.of_tile.channel], _both(self.of_tile.mask, mask)

    def _matrix_access(self, reference, *index):
        state = self.of_matrix.state_lane * self.plan.shape[0] + self.of_matrix.register
        mask = state < self.plan.state if self.padded else None
        return reference.at[*index, self.of_matrix.channel, state], _both(self.of_matrix.mask, mask)

    def _load_matrix(self, reference, *index, condition=None):
        access, mask = self._matrix_access(reference, *index)
        return self._load_elements(access, _both(mask, condition)).astype(jnp.float32)

    def _load_channels(self, reference, *index):
        if reference is None:
            return None
        return self._load_elements(reference.at[*index, self.of_tile.channel], self.of_tile.mask)

    def _load_last(self, reference, step, whole: bool):
        """Like `load`, but after the end of the sequence it is its last step."""
        if reference is None:
            return None
        step = self._position(step if whole else jnp.minimum(step, self.plan.length - 1), True)
        return self._load_elements(reference.at[step, self.of_tile.channel], self.of_tile.mask)

    def _load_row(self, reference, step):
        mask = self.state < self.plan.state if self.padded else None
        return _load(reference.at[self._row(step), self.state], mask)

    def _load_elements(self, access, mask):
        x = _load(access, mask)
        vector = min(x.size // self.plan.threads, VECTOR)
        if vector > 1:
            x = jnp.moveaxis(x.reshape(-1, self.plan.threads, vector), 2, 1)
        return x.reshape(-1, *self.plan.shape[1:])

    def _store_elements(self, access, mask, x) -> None:
        vector = min(x.shape[0], VECTOR)
        if vector > 1:
            x = jnp.moveaxis(x.reshape(-1, vector, self.plan.threads), 1, 2)
        plgpu.store(access, x.reshape(-1).astype(access.dtype), mask=mask)

    def _position(self, step, exists: bool = False):
        """Index of a step; a step past the end stays past the end."""
        if not self.options.reverse:
            return step
        position = self.plan.length - 1 - step
        return position if exists else jnp.where(position < 0, step, position)


def _split(x, axis: int) -> list[jax.Array]:
    """The parts of an array along an axis, in registers or in lanes."""
    return lax.split(x, [1] * x.shape[axis], axis=axis) if x.shape[axis] > 1 else [x]


def _stack(arrays) -> jax.Array:
    """Arrays, as many as a power of two, along a new last axis in registers."""
    shape = *arrays[0].shape, len(arrays)
    while len(arrays) > 1:
        half = len(arrays) // 2
        arrays = [jnp.stack(pair, -1) for pair in zip(arrays[:half], arrays[half:])]
    return arrays[0].reshape(shape)


def _unstack(x) -> list[jax.Array]:
    """Inverts `_stack`."""
    return [part.reshape(x.shape[:-1]) for part in _split(x, x.ndim - 1)]


def _sum(parts: list) -> jax.Array:
    """Adds one after the other, so that each product becomes part of a multiply-add."""
    return functools.reduce(lambda total, part: total + part, parts)


def _load(access, mask):
    return plgpu.load(access) if mask is None else plgpu.load(access, mask=mask, other=0.0)


def _both(first, second):
    """Combines two conditions; None is one that always holds."""
    return first if second is None else second if first is None else first & second


def _divide(x, divisor: int):
    """Quotient and remainder of 32-bit integers that are not negative."""
    return lax.div(x, np.int32(divisor)), lax.rem(x, np.int32(divisor))
