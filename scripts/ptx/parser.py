"""Reads PTX, NVIDIA's portable assembly, as Triton writes it."""

import re
from collections import Counter
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

TYPES = {
    **dict(b8=np.uint8, u8=np.uint8, s8=np.int8),
    **dict(b16=np.uint16, u16=np.uint16, s16=np.int16, f16=np.float16, bf16=ml_dtypes.bfloat16),
    **dict(b32=np.uint32, u32=np.uint32, s32=np.int32, f32=np.float32),
    **dict(b64=np.uint64, u64=np.uint64, s64=np.int64, f64=np.float64),
    "pred": np.bool_,
}
TYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}
DIRECTIVES = (".reqntid", ".maxntid", ".minnctapersm", ".maxnreg")  # of a kernel, without effect here
STATEMENT = re.compile(
    r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<brace>[{}])|\.(?:loc|file|pragma)\b[^\n]*|"
    r"(?P<statement>(?:[^;{}]|\{[^;{}]*\})+);)"
)
GUARDED = re.compile(r"(?:@(?P<negated>!?)(?P<predicate>[%\w]+)\s+)?(?P<name>[\w.:]+)\s*(?P<operands>.*)", re.S)


class Unknown(NotImplementedError):
    """PTX that is not understood."""


@dataclass(frozen=True)
class Address:
    """A register or symbol and bytes beyond what it points to."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    """An operand is a register or symbol (str), a number, an `Address`, or a vector of operands (tuple)."""

    name: str  # with all modifiers, as in "ld.global.v4.b32"
    operands: tuple
    predicate: str | None
    negated: bool
    text: str


@dataclass(frozen=True)
class Kernel:
    """A kernel, cut into blocks that are entered at their first instruction only."""

    parameters: list[str]
    registers: dict[str, np.dtype]  # by name, or by prefix for those that are declared in numbers
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # the blocks' numbers
    symbols: dict[str, int]  # offsets of variables in shared memory
    shared: int  # bytes that these variables take


def parse(text: str) -> Kernel:
    """Reads a module of one kernel.

    Raises:
      Unknown: The module has other kernels or functions, or a directive or operand that is not known.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    head, *kernels = text.split(".visible .entry")
    if len(kernels) != 1 or ".func" in text:
        raise Unknown("a module with other than one kernel")
    parameters, directives, body = re.match(r"[^(]*\((.*?)\)(.*?)\{(.*)", kernels[0], re.S).groups()
    if unknown := set(re.findall(r"\.\w+", directives)).difference(DIRECTIVES):
        raise Unknown(f"directive {unknown.pop()}")
    kernel = Kernel(re.findall(r"([\w$]+)\s*(?:,|$)", parameters), {}, [[]], {}, *_shared_variables(head + body))
    depth = 1
    for found in STATEMENT.finditer(body):
        if label := found["label"]:
            if kernel.blocks[-1]:
                kernel.blocks.append([])
            kernel.labels[label] = len(kernel.blocks) - 1
        elif brace := found["brace"]:
            depth += 1 if brace == "{" else -1
            if not depth:
                break
        elif statement := found["statement"]:
            _add(kernel, " ".join(statement.split()))
    return kernel


def fold_offsets(kernel: Kernel) -> Kernel:
    """Moves additions of constants into the addresses of loads and stores, as ptxas does."""
    reads = Counter(name for block in kernel.blocks for instruction in block for name in _reads(instruction))
    blocks = []
    for block in kernel.blocks:
        sums, folded, code = {}, Counter(), []
        for instruction in block:
            operands = [_fold(x, sums) if isinstance(x, Address) else x for x in instruction.operands]
            folded.update(x.base for x, new in zip(instruction.operands, operands) if x is not new)
            target = operands[0] if operands else None
            sums = {name: address for name, address in sums.items() if target not in (name, address.base)}
            if instruction.name == "add.s64" and isinstance(operands[2], int) and target != operands[1]:
                sums[target] = Address(*operands[1:])
            code.append(replace(instruction, operands=tuple(operands)))
        needless = {name for name in folded if folded[name] == reads[name]}
        blocks.append([x for x in code if x.name != "add.s64" or x.operands[0] not in needless])
    return replace(kernel, blocks=blocks)


def _fold(address: Address, sums: dict[str, Address]) -> Address:
    found = sums.get(address.base)
    return Address(found.base, found.offset + address.offset) if found else address


def _reads(instruction: Instruction) -> list[str]:
    """The registers that an instruction reads, but for its predicate."""
    first, *others = instruction.operands or (None,)
    read = []
    for operand in others if isinstance(first, str) else (first, *others):
        parts = operand if isinstance(operand, tuple) else (operand,)
        read += [x.base if isinstance(x, Address) else x for x in parts if isinstance(x, str | Address)]
    return read


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    """Offsets by name, and the size of all."""
    symbols, size = {}, 0
    for align, name, length in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
        symbols[name] = size = -(-size // int(align)) * int(align)
        size += int(length or 0)
    return symbols, size


def _add(kernel: Kernel, statement: str) -> None:
    """Notes a declaration of registers, or appends an instruction to the last block."""
    if declared := re.match(r"\.reg \.(\w+) (.*)", statement):
        names = [name.strip() for name in declared[2].split(",")]
        kernel.registers.update((re.sub(r"<\d+>", "", name), TYPES[declared[1]]) for name in names)
    elif not statement.startswith(".shared"):
        found = GUARDED.fullmatch(statement)
        if not found:
            raise Unknown(statement)
        operands = tuple(_operand(x) for x in _parts(found["operands"]))
        kernel.blocks[-1].append(
            Instruction(found["name"], operands, found["predicate"], bool(found["negated"]), statement)
        )
        if found["name"].split(".")[0] in ("bra", "ret"):
            kernel.blocks.append([])


def _parts(text: str) -> list[str]:
    """Splits at commas outside braces."""
    return [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]


def _operand(text: str):
    if text.startswith("{"):
        return tuple(_operand(x) for x in _parts(text[1:-1]))
    if found := re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text):
        return Address(found[1], int(found[2] or "0", 0))
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return float(np.array(int(text[2:], 16), np.uint32).view(np.float32))
    if re.fullmatch(r"-?(\d+|0[xX][0-9a-fA-F]+)", text):
        return int(text, 0)
    if re.fullmatch(r"%?[A-Za-z_$][\w$.]*", text):
        return text
    raise Unknown(f"operand {text}")
