"""Runs PTX on a CPU: every thread of every program at once, in NumPy.

    arrays = [Array(np.zeros(64, np.float32)), Array(np.zeros(64, np.float32), output=True)]
    report = Machine(parse(text), grid=(2, 1, 1), threads=64).run(arrays)

Threads go in step; where they part, those with the lowest program counter go first. The machine finds accesses out of
bounds, misaligned vectors, memory that is read before it is written, outputs that are written in part, races (two
threads of a program at one address of shared memory, one of them writing, without a barrier between them; different
values written to one address of global memory) and barriers or shuffles that not all their threads reach.

It refuses what it does not know (`Unknown`): atomics, asynchronous copies, matrix products, named barriers and packed
arithmetic, among others. It shows nothing of timing, nor of what ptxas, the driver or another Triton do differently.

Registers are bits without a type, memory is little endian. Arithmetic is NumPy's, but for `fma`, which is rounded once
from float64 (twice in one case of 2²⁹). With `noise`, a seed, results of approximate instructions are moved by random
errors as large as the PTX manual allows.
"""

import math
from functools import partial

import numpy as np

from ptx.memory import SPACING, WARP, Access, Array, Fault, Global, Report, Shared
from ptx.parser import TYPES, Address, Instruction, Kernel, Unknown

BITS = {size: TYPES[f"b{8 * size}"] for size in (1, 2, 4, 8)}
WIDE = {TYPES[name]: TYPES[wide] for name, wide in dict(s16="s32", u16="u32", s32="s64", u32="u64").items()}
ALL = 0xFFFFFFFF  # the lanes of a warp
INVISIBLE = {"L1::evict_last", "L1::evict_first", "nc", "uni", "aligned", "cta"}  # modifiers that change no result


class Machine:
    """One launch of a kernel, or of its first `programs` programs."""

    def __init__(self, kernel: Kernel, grid, threads: int, shared: int = 0, programs: int | None = None, noise=None):
        if threads % WARP:
            raise Fault(f"{threads} threads are no whole warps")
        self.kernel, self.threads = kernel, threads
        self.all_programs = math.prod(grid)
        programs = programs or self.all_programs
        self.total = programs * threads
        self.random = None if noise is None else np.random.default_rng(noise)
        self.report, self.values = Report(), {}
        program, thread = np.divmod(np.arange(self.total), threads)
        self.ids = np.stack(np.unravel_index(program, grid[::-1])[::-1], 1)
        special = {f"%ctaid.{axis}": self.ids[:, i] for i, axis in enumerate("xyz")}
        special |= {f"%nctaid.{axis}": np.full(self.total, n) for axis, n in zip("xyz", grid)}
        special |= {"%tid.x": thread, "%ntid.x": np.full(self.total, threads), "%laneid": thread % WARP}
        self.special = {name: value.astype(np.uint32) for name, value in special.items()}
        self.shared = Shared(programs, threads, max(shared, kernel.shared), self.report, self._where)
        self.code = [[(i, self._translate(i)) for i in block] for block in kernel.blocks]

    def run(self, arrays: list[Array]) -> Report:
        """Runs the kernel with pointers to these arrays, and null for parameters beyond them."""
        self.global_ = Global(arrays, self.report, self._where)
        pointers = [SPACING * (1 + i) for i in range(len(arrays))] + [0] * len(self.kernel.parameters)
        self.parameters = dict(zip(self.kernel.parameters, pointers))
        counter, live = np.zeros(self.total, np.int32), np.ones(self.total, bool)
        with np.errstate(all="ignore"):
            while live.any():
                number = counter[live].min()
                mask = live & (counter == number)
                self._run_block(number, mask, counter, live)
        if self.total == self.threads * self.all_programs:
            self.global_.find_unwritten()
        return self.report

    def _run_block(self, number: int, mask, counter, live) -> None:
        warps = int(mask.reshape(-1, WARP).any(1).sum())
        counter[mask] = number + 1
        for instruction, action in self.code[number]:
            self.report.executed[instruction.name] += warps
            active = mask
            if instruction.predicate is not None:
                active = mask & (self._value(instruction.predicate, TYPES["pred"]) ^ instruction.negated)
            try:
                if instruction.name.startswith("bra"):
                    counter[active] = self.kernel.labels[instruction.operands[0]]
                elif instruction.name == "ret":
                    live[active] = False
                elif active.any():
                    action(None if active.all() else active)
                elif isinstance(target := instruction.operands[0], (str, tuple)):  # its registers are defined even so
                    for name in target if isinstance(target, tuple) else (target,):
                        self._set(name, np.zeros(self.total, self._kind(name)), active)
            except Fault as fault:
                raise Fault(f"{fault}, at {instruction.text}") from None

    def _where(self, thread: int) -> str:
        """Names a thread."""
        return f"program {tuple(map(int, self.ids[thread]))} thread {thread % self.threads}"

    # Registers.

    def _kind(self, name: str) -> np.dtype:
        registers = self.kernel.registers
        return registers[name] if name in registers else registers[name.rstrip("0123456789")]

    def _value(self, operand, kind: np.dtype):
        """The bits of an operand as this type; an array of all threads, or a scalar if it is constant."""
        if isinstance(operand, float):
            return kind.type(operand) if kind.kind == "f" else np.float32(operand).view(kind)
        if operand in self.kernel.symbols:
            operand = self.kernel.symbols[operand]
        if isinstance(operand, int):
            if kind == TYPES["pred"]:
                return np.bool_(operand)
            return np.array(operand & (1 << 8 * kind.itemsize) - 1, BITS[kind.itemsize]).view(kind)[()]
        value = self.special.get(operand)
        if value is None:
            value = self.values.get(operand)
        if value is None:
            raise Fault(f"{operand} is read before it is written")
        if value.dtype.itemsize > kind.itemsize and kind.kind in "ui":  # the lower bits, as for `st` and `cvt`
            value = value.astype(BITS[kind.itemsize])
        return value.view(kind)

    def _set(self, name: str, value, mask) -> None:
        kind = self._kind(name)
        value = np.broadcast_to(value, self.total)
        if value.dtype.itemsize < kind.itemsize:
            value = value.astype(kind)  # `ld` extends
        value = value.view(kind)
        if mask is not None:
            value = np.where(mask, value, self.values.get(name, np.zeros((), kind)))
        self.values[name] = value

    # Translation: a function of the mask of active threads (None for all) for each instruction.

    def _translate(self, instruction: Instruction):
        base, *parts = instruction.name.split(".")
        if base in ("bra", "ret"):
            return None
        kinds = [TYPES[part] for part in parts if part in TYPES]
        modifiers = [part for part in parts if part not in TYPES and part not in INVISIBLE]
        if method := getattr(self, f"_op_{base}", None):
            return method(instruction, kinds, modifiers)
        return self._elementwise(instruction, kinds, modifiers, base)

    def _elementwise(self, instruction, kinds, modifiers, base: str):
        """A result that depends on the thread's own sources alone."""
        flush = _flush if "ftz" in modifiers else lambda x: x
        key = ".".join([base, *(x for x in modifiers if x not in ("rn", "ftz"))])
        functions = FUNCTIONS.get(kinds[0].kind, {}) if len(kinds) == 1 else {}
        target, *sources = instruction.operands
        if key in APPROXIMATE and kinds == [TYPES["f32"]]:
            function = partial(self._approximate, *APPROXIMATE[key])
        elif key in functions:
            function = functions[key]
        else:
            raise Unknown(instruction.text)
        types = SOURCES.get(key, lambda kind: [kind] * len(sources))(kinds[0])

        def action(mask):
            result = function(*(flush(self._value(x, kind)) for x, kind in zip(sources, types)))
            if result.dtype == np.float64:
                result = result.astype(kinds[0])
            self._set(target, flush(result), mask)

        return action

    def _approximate(self, function, bound: float, *sources):
        value = function(*(np.asarray(x, np.float64) for x in sources))
        return value if self.random is None else value * (1 + bound * self.random.uniform(-1, 1, value.shape))

    def _op_mov(self, instruction, kinds, modifiers):
        (target, source), (kind,) = instruction.operands, kinds
        if isinstance(source, tuple):  # the first becomes the lowest bits
            bits = 8 * kind.itemsize // len(source)

            def pack(mask):
                parts = (self._value(x, BITS[bits // 8]).astype(kind) for x in source)
                self._set(target, sum(part << kind.type(bits * i) for i, part in enumerate(parts)), mask)

            return pack
        if isinstance(target, tuple):
            bits = 8 * kind.itemsize // len(target)

            def unpack(mask):
                value = self._value(source, kind)
                for i, part in enumerate(target):
                    self._set(part, (value >> kind.type(bits * i)).astype(BITS[bits // 8]), mask)

            return unpack
        return lambda mask: self._set(target, self._value(source, kind), mask)

    def _op_cvt(self, instruction, kinds, modifiers):
        if len(kinds) != 2 or set(modifiers) - {"rn"} or _is_real(kinds[1]) and not _is_real(kinds[0]):
            raise Unknown(instruction.text)
        (target, source), (result, kind) = instruction.operands, kinds
        return lambda mask: self._set(target, self._value(source, kind).astype(result), mask)

    # Memory.

    def _op_ld(self, instruction, kinds, modifiers):
        (target, address), (kind,), (space, *vector) = instruction.operands, kinds, modifiers
        if space == "param":
            return lambda mask: self._set(target, kind.type(self.parameters[address.base]), mask)
        targets = self._vector(instruction, space, vector, target)

        def action(mask):
            access = self._access(instruction, space, address, kind.itemsize * len(targets), mask)
            values = self._memory(space).load(access, kind)
            for i, name in enumerate(targets):
                self._set(name, self._scatter(values[:, i], access.threads), mask)

        return action

    def _op_st(self, instruction, kinds, modifiers):
        (address, source), (space, *vector), kind = instruction.operands, modifiers, BITS[kinds[0].itemsize]
        sources = self._vector(instruction, space, vector, source)

        def action(mask):
            access = self._access(instruction, space, address, kind.itemsize * len(sources), mask)
            values = [np.broadcast_to(self._value(x, kind), self.total)[access.threads] for x in sources]
            self._memory(space).store(access, np.stack(values, 1))

        return action

    def _vector(self, instruction, space: str, modifiers: list, operand) -> tuple:
        """The registers of a load or store."""
        parts = operand if isinstance(operand, tuple) else (operand,)
        if space not in ("global", "shared") or modifiers != ([f"v{len(parts)}"] if len(parts) > 1 else []):
            raise Unknown(instruction.text)
        return parts

    def _memory(self, space: str):
        return self.global_ if space == "global" else self.shared

    def _access(self, instruction, space: str, address: Address, size: int, mask) -> Access:
        threads = np.arange(self.total) if mask is None else np.flatnonzero(mask)
        base = self._value(address.base, TYPES["u64" if space == "global" else "u32"])
        addresses = np.broadcast_to(base, self.total)[threads].astype(np.int64) + address.offset
        return Access(instruction, threads, addresses, size)

    def _scatter(self, values, threads):
        full = np.zeros(self.total, values.dtype)
        full[threads] = values
        return full

    # Threads that wait for each other or tell each other something.

    def _op_bar(self, instruction, kinds, modifiers):
        warp = modifiers == ["warp", "sync"]
        if not warp and modifiers != ["sync"] or instruction.operands not in ((0,), (-1,), (ALL,)):
            raise Unknown(instruction.text)
        barrier = self.shared.warp_barrier if warp else self.shared.barrier
        return lambda mask: barrier(self._together(mask, WARP if warp else self.threads))

    def _together(self, mask, threads: int) -> np.ndarray:
        """Which warps, or programs, of so many threads are here; a Fault if only part of one is."""
        if mask is None:
            return np.arange(self.total // threads)
        some, every = (f(mask.reshape(-1, threads), 1) for f in (np.any, np.all))
        if (some != every).any():
            raise Fault("divergence: part of the threads that wait for each other")
        return np.flatnonzero(some)

    def _op_shfl(self, instruction, kinds, modifiers):
        target, source, amount, clamp, members = instruction.operands
        if modifiers not in (["sync", "bfly"], ["sync", "idx"]) or clamp != 31 or members not in (-1, ALL):
            raise Unknown(instruction.text)
        lane = np.arange(self.total) % WARP

        def action(mask):
            self._together(mask, WARP)
            number = self._value(amount, TYPES["u32"]) % WARP
            other = lane ^ number if "bfly" in modifiers else number
            value = np.broadcast_to(self._value(source, kinds[0]), self.total)
            self._set(target, value[np.arange(self.total) - lane + other], mask)

        return action

    def _op_ldmatrix(self, instruction, kinds, modifiers):
        """Lane 8 i + r has the address of row r of matrix i, lane 4 r + c receives two elements of row r."""
        registers, address = instruction.operands
        transposed = self._check_matrix(instruction, modifiers, registers)

        def action(mask):
            access, warps = self._rows(instruction, address, len(registers), mask)
            matrices = self.shared.load(access, TYPES["u16"]).reshape(len(warps), len(registers), 8, 8)
            matrices = matrices.swapaxes(2, 3) if transposed else matrices
            parts = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), len(registers), WARP)
            for i, name in enumerate(registers):
                full = np.zeros((self.total // WARP, WARP), np.uint32)
                full[warps] = parts[:, i]
                self._set(name, full.reshape(-1), mask)

        return action

    def _op_stmatrix(self, instruction, kinds, modifiers):
        """The opposite of `ldmatrix`."""
        address, registers = instruction.operands
        transposed = self._check_matrix(instruction, modifiers, registers)

        def action(mask):
            access, warps = self._rows(instruction, address, len(registers), mask)
            parts = [np.broadcast_to(self._value(x, TYPES["u32"]), self.total) for x in registers]
            parts = np.stack([part.reshape(-1, WARP)[warps] for part in parts], 1)
            matrices = parts.view(np.uint16).reshape(len(warps), len(registers), 8, 8)
            matrices = matrices.swapaxes(2, 3) if transposed else matrices
            self.shared.store(access, np.ascontiguousarray(matrices).reshape(-1, 8))

        return action

    def _check_matrix(self, instruction, modifiers: list, registers: tuple) -> bool:
        """Tells whether the matrices are transposed."""
        transposed = "trans" in modifiers
        if modifiers != ["sync", "m8n8", f"x{len(registers)}", *["trans"] * transposed, "shared"]:
            raise Unknown(instruction.text)
        return transposed

    def _rows(self, instruction, address: Address, count: int, mask) -> tuple[Access, np.ndarray]:
        """The access to all rows of `count` matrices, and the warps."""
        warps = self._together(mask, WARP)
        lanes = np.arange(self.total) % WARP < 8 * count
        return self._access(instruction, "shared", address, 16, lanes if mask is None else lanes & mask), warps


def _is_real(kind: np.dtype) -> bool:
    return kind.kind in "fV"  # bfloat16 is V


def _flush(x):
    """Subnormal float32 numbers as zero, with their sign; anything else as it is."""
    if x.dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _fma(a, b, c):
    return np.multiply(a, b, dtype=np.float64) + c


def _multiply_wide(a, b, c=0):
    wide = WIDE[a.dtype]
    return a.astype(wide) * b.astype(wide) + wide.type(0) + c


def _multiply_high(a, b):
    return (_multiply_wide(a, b) >> WIDE[a.dtype].type(8 * a.itemsize)).astype(a.dtype)


def _shift_left(x, by):
    bits = 8 * x.itemsize
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def _shift_right(x, by):
    """Shifts in the sign of signed numbers, else zeros."""
    bits = 8 * x.itemsize
    shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by < bits, shifted, x.dtype.type(0))


def _field(x, start, length):
    """`length` bits from bit `start` on, the last of them the sign of a signed number."""
    one = x.dtype.type(1)
    limit = _shift_left(one, length)
    field = _shift_right(x, start) & limit - one
    sign = limit >> one if x.dtype.kind == "i" else x.dtype.type(0)
    return (field ^ sign) - sign


def _permute(a, b, selector):
    """Each of four bytes is one of the eight of a and b, or its sign eight times."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.uint64(0)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)).astype(np.uint64) & np.uint64(15)
        byte = both >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


COMPARISONS = dict(eq=np.equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal)
INTEGER = {
    **{"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "mad.lo": lambda a, b, c: a * b + c},
    **{"mul.wide": _multiply_wide, "mad.wide": _multiply_wide, "mul.hi": _multiply_high},
    **{"min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert},
    **{"shl": _shift_left, "shr": _shift_right, "setp.ne": np.not_equal},
    **{f"setp.{name}": function for name, function in COMPARISONS.items()},
    **{"bfe": _field, "prmt": _permute, "selp": lambda a, b, condition: np.where(condition, a, b)},
}
REAL = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma, "neg": np.negative, "abs": np.abs},
    **{"min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum, "selp": INTEGER["selp"]},
    **{f"setp.{name}": function for name, function in COMPARISONS.items()},  # false if one is not a number
    **{"setp.neu": np.not_equal, "div": np.divide},
}
FUNCTIONS = {"u": INTEGER, "i": INTEGER, "b": INTEGER, "f": REAL}  # by NumPy's kind of the type
APPROXIMATE = {  # the largest relative error by the PTX manual
    "ex2.approx": (np.exp2, 2.0**-22),
    "rcp.approx": (np.reciprocal, 2.0**-23),
    **dict.fromkeys(("div.full", "div.approx"), (np.divide, 2.0**-22)),
}
SOURCES = {  # types of the sources, where they differ from the instruction's
    **dict.fromkeys(("shl", "shr"), lambda kind: (kind, TYPES["u32"])),
    "bfe": lambda kind: (kind, TYPES["u32"], TYPES["u32"]),
    "selp": lambda kind: (kind, kind, TYPES["pred"]),
    "mad.wide": lambda kind: (kind, kind, WIDE[kind]),
}
