"""The selective scan in Triton's own language; `kernels.scan.triton` runs it from JAX. Importing this needs `triton`.

A program owns a block of channels of one sequence. Arrays are (state, channels) with the channels spread over threads,
so that a thread holds all states of its channels: the sum over the state takes no exchange between threads, and what
belongs to a step and a channel is computed once. The formulas are those of `kernels.scan.pallas`.

Arguments in capitals are known when a kernel is compiled. An array that is absent is stood in for by another and its
flag is False. All states and parameters are float32 and end in (state, channels), the states that are saved in (batch,
windows, state, channels): memory in which a thread's states lie together would make Triton spread them over threads.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with the polynomial of `kernels.scan.pallas`: no branch, relative error 2e-7."""
    power = tl.exp2(tl.abs(x) * -LOG2_E)
    quotient = power * 0.0051261018961668015 - 0.029074065387248993
    quotient = quotient * power + 0.0775160863995552
    quotient = quotient * power - 0.13602247834205627
    quotient = quotient * power + 0.19076880812644958
    quotient = quotient * power - 0.2483539879322052
    quotient = quotient * power + 0.3331812024116516
    quotient = quotient * power - 0.4999944567680359
    quotient = quotient * power + 0.9999999403953552
    return tl.maximum(x, 0.0) + power * quotient


@triton.jit
def load_row(array, start, channel, mask):
    """One step of (length, channels), in float32."""
    return tl.load(array + start + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_size(raw, bias, inside, SOFTPLUS: tl.constexpr):
    """Δ; 0 after the end of the sequence, where the state must stay as it is."""
    delta = raw + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(inside, delta, 0.0)


@triton.jit
def matrix_row(array, constant, start, n, STATE: tl.constexpr, CONSTANT: tl.constexpr):
    """B_t or C_t, to broadcast over channels, or all of a matrix that is constant in time."""
    return constant if CONSTANT else tl.load(array + start + n, mask=n < STATE, other=0.0)[:, None]


@triton.jit
def sum_channels(products, exists):
    """Sums over channels, the same in every thread to the last bit: threads store it at one address.

    The selection keeps a product from becoming part of a multiply-add, which would round it in one thread of a pair.
    """
    return tl.sum(tl.where(exists[None, :], products, 0.0), axis=1)


@triton.jit
def forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    y,
    last_state,
    states,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SAVE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Grid (blocks of a group's channels, groups, batch); CHANNELS is of a group, N and BLOCK are powers of two."""
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, in_group = tl.arange(0, N), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, exists = group * CHANNELS + in_group, in_group < CHANNELS
    matrix, matrix_mask = n[:, None] * (CHANNELS * GROUPS) + channel[None, :], exists[None, :] & (n < STATE)[:, None]
    decay = tl.load(A + matrix, mask=matrix_mask, other=0.0) * LOG2_E
    B_all = tl.load(B + matrix, mask=matrix_mask, other=0.0) if CONSTANT_B else decay
    C_all = tl.load(C + matrix, mask=matrix_mask, other=0.0) if CONSTANT_C else decay
    skip = tl.load(D + channel, mask=exists, other=0.0) if HAS_D else 0.0
    bias = tl.load(delta_bias + channel, mask=exists, other=0.0) if HAS_BIAS else 0.0
    sequence, state = batch * LENGTH, batch * CHANNELS * GROUPS * STATE
    h = tl.zeros((N, BLOCK), tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial_state + state + matrix, mask=matrix_mask, other=0.0)

    position = LENGTH - 1 if REVERSE else 0
    start = (sequence + position) * (CHANNELS * GROUPS)
    u_t, raw = load_row(u, start, channel, exists), load_row(delta, start, channel, exists)
    z_t = load_row(z, start, channel, exists) if HAS_Z else u_t
    for t in range(LENGTH):
        if SAVE and t % WINDOW == 0:
            saved = (batch * tl.cdiv(LENGTH, WINDOW) + t // WINDOW) * STATE
            saved = (saved + n[:, None]) * (CHANNELS * GROUPS) + channel[None, :]
            tl.store(states + saved, h, mask=matrix_mask)
        following = tl.minimum(t + 1, LENGTH - 1)  # loads run a step ahead
        next_start = (sequence + (LENGTH - 1 - following if REVERSE else following)) * (CHANNELS * GROUPS)
        next_u, next_raw = load_row(u, next_start, channel, exists), load_row(delta, next_start, channel, exists)
        next_z = load_row(z, next_start, channel, exists) if HAS_Z else next_u
        row = ((sequence + (LENGTH - 1 - t if REVERSE else t)) * GROUPS + group) * STATE
        B_t = matrix_row(B, B_all, row, n, STATE, CONSTANT_B)
        C_t = matrix_row(C, C_all, row, n, STATE, CONSTANT_C)
        delta_t = step_size(raw, bias, exists, SOFTPLUS)
        h = tl.exp2(delta_t[None, :] * decay) * h + (delta_t * u_t)[None, :] * B_t
        y_t = tl.sum(h * C_t, axis=0)
        if HAS_D:
            y_t += skip * u_t
        if HAS_Z:
            y_t *= z_t * sigmoid(z_t)
        tl.store(y + start + channel, y_t.to(y.dtype.element_ty), mask=exists)
        start, u_t, raw, z_t = next_start, next_u, next_raw, next_z
    tl.store(last_state + state + matrix, h, mask=matrix_mask)


@triton.jit
def backward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    states,
    d_output,
    d_last_state,
    du,
    d_delta,
    dA,
    dB,
    dC,
    dD,
    dz,
    d_bias,
    d_initial_state,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Goes back window by window: computes the states of a window again, then the adjoint recurrence over its steps.

    Gradients of A, D, delta_bias and constant matrices are written for each sequence, of B and C that vary for each
    block of channels, (batch, groups, blocks, length, state); their sums are left to XLA.
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, in_group = tl.arange(0, N), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, exists = group * CHANNELS + in_group, in_group < CHANNELS
    matrix, matrix_mask = n[:, None] * (CHANNELS * GROUPS) + channel[None, :], exists[None, :] & (n < STATE)[:, None]
    decay = tl.load(A + matrix, mask=matrix_mask, other=0.0) * LOG2_E
    B_all = tl.load(B + matrix, mask=matrix_mask, other=0.0) if CONSTANT_B else decay
    C_all = tl.load(C + matrix, mask=matrix_mask, other=0.0) if CONSTANT_C else decay
    skip = tl.load(D + channel, mask=exists, other=0.0) if HAS_D else 0.0
    bias = tl.load(delta_bias + channel, mask=exists, other=0.0) if HAS_BIAS else 0.0
    sequence, state = batch * LENGTH, batch * CHANNELS * GROUPS * STATE
    WINDOWS: tl.constexpr = (LENGTH + WINDOW - 1) // WINDOW
    part = ((batch * GROUPS + group) * tl.num_programs(0) + tl.program_id(0)) * LENGTH

    dh = tl.load(d_last_state + state + matrix, mask=matrix_mask, other=0.0)
    sum_A, sum_B, sum_C = dh * 0.0, dh * 0.0, dh * 0.0
    sum_D = tl.zeros((BLOCK,), tl.float32)
    sum_bias = sum_D
    for number in range(WINDOWS):
        window = WINDOWS - 1 - number
        saved = ((batch * WINDOWS + window) * STATE + n[:, None]) * (CHANNELS * GROUPS) + channel[None, :]
        h = tl.load(states + saved, mask=matrix_mask, other=0.0)
        history = (h,)
        for k in tl.static_range(WINDOW):
            t = window * WINDOW + k
            inside = exists & (0 * channel + t < LENGTH)
            t = tl.minimum(t, LENGTH - 1)
            position = LENGTH - 1 - t if REVERSE else t
            start, row = (sequence + position) * (CHANNELS * GROUPS), ((sequence + position) * GROUPS + group) * STATE
            delta_t = step_size(load_row(delta, start, channel, inside), bias, inside, SOFTPLUS)
            delta_u = delta_t * load_row(u, start, channel, inside)
            B_t = matrix_row(B, B_all, row, n, STATE, CONSTANT_B)
            h = tl.exp2(delta_t[None, :] * decay) * h + delta_u[None, :] * B_t
            history = history + (h,)
        for k in tl.static_range(WINDOW):
            t = window * WINDOW + (WINDOW - 1 - k)
            inside, row_inside = exists & (0 * channel + t < LENGTH), (n < STATE) & (0 * n + t < LENGTH)
            t = tl.minimum(t, LENGTH - 1)
            position = LENGTH - 1 - t if REVERSE else t
            start, row = (sequence + position) * (CHANNELS * GROUPS), ((sequence + position) * GROUPS + group) * STATE
            u_t, raw = load_row(u, start, channel, inside), load_row(delta, start, channel, inside)
            delta_t = step_size(raw, bias, inside, SOFTPLUS)
            B_t = matrix_row(B, B_all, row, n, STATE, CONSTANT_B)
            C_t = matrix_row(C, C_all, row, n, STATE, CONSTANT_C)
            h, before = history[WINDOW - k], history[WINDOW - 1 - k]
            d_gated = load_row(d_output, start, channel, inside)
            dy = d_gated
            if HAS_Z:
                z_t = load_row(z, start, channel, inside)
                gate = sigmoid(z_t)
                dy = d_gated * z_t * gate
                y_t = tl.sum(h * C_t, axis=0)
                if HAS_D:
                    y_t += skip * u_t
                dz_t = d_gated * y_t * gate * (1.0 + z_t * (1.0 - gate))
                tl.store(dz + start + channel, dz_t.to(dz.dtype.element_ty), mask=inside)
            for_C = h * dy[None, :]
            dh += C_t * dy[None, :]
            for_B = dh * (delta_t * u_t)[None, :]
            d_input = tl.sum(dh * B_t, axis=0)
            dh = dh * tl.exp2(delta_t[None, :] * decay)
            d_exponent = dh * before
            sum_A += d_exponent * delta_t[None, :]
            d_rate = tl.sum(d_exponent * decay, axis=0) / LOG2_E
            if CONSTANT_B:
                sum_B += for_B
            else:
                target = dB + (part + position) * STATE + n
                tl.store(target, sum_channels(for_B, exists), mask=row_inside)
            if CONSTANT_C:
                sum_C += for_C
            else:
                target = dC + (part + position) * STATE + n
                tl.store(target, sum_channels(for_C, exists), mask=row_inside)
            du_t = d_input * delta_t
            if HAS_D:
                du_t += dy * skip
                sum_D += dy * u_t
            tl.store(du + start + channel, du_t.to(du.dtype.element_ty), mask=inside)
            d_delta_t = d_input * u_t + d_rate
            if SOFTPLUS:
                d_delta_t *= sigmoid(raw + bias)
            d_delta_t = tl.where(inside, d_delta_t, 0.0)
            sum_bias += d_delta_t
            tl.store(d_delta + start + channel, d_delta_t.to(d_delta.dtype.element_ty), mask=inside)
    tl.store(dA + state + matrix, sum_A, mask=matrix_mask)
    if CONSTANT_B:
        tl.store(dB + state + matrix, sum_B, mask=matrix_mask)
    if CONSTANT_C:
        tl.store(dC + state + matrix, sum_C, mask=matrix_mask)
    if HAS_D:
        tl.store(dD + batch * CHANNELS * GROUPS + channel, sum_D, mask=exists)
    if HAS_BIAS:
        tl.store(d_bias + batch * CHANNELS * GROUPS + channel, sum_bias, mask=exists)
    if HAS_INITIAL:
        tl.store(d_initial_state + state + matrix, dh, mask=matrix_mask)
