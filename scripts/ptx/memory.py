"""The two memories of a launch: each checks every access and counts what it costs the hardware."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

WARP = 32
SPACING = 1 << 36  # bytes from one array to the next, so that no wrong pointer reaches another array by accident
SECTOR, LINE = 32, 128  # bytes that global memory moves at least, and that a cycle serves
BANKS = 32  # of shared memory, each a word of 4 bytes wide
MANY = -2  # instead of the one warp or lane
MAX_FINDINGS = 3  # of a kind, at one instruction


class Fault(RuntimeError):
    """An error that ends a kernel at once."""


@dataclass
class Array:
    """An array in global memory; an output's `data`, which are contiguous, are what the kernel writes."""

    data: np.ndarray
    output: bool = False
    name: str = ""


@dataclass
class Finding:
    """An error after which a kernel can go on."""

    kind: str
    instruction: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail} [{self.instruction}] (×{self.count})"


@dataclass
class Report:
    """What a launch showed: the findings, instructions that warps issued by name, and costs of memory.

    `memory` has requests of warps, by space and by "load" or "store": for global memory "sectors" of 32 bytes, "cycles"
    (lines of 128 bytes) and "bytes"; for shared memory "cycles", and how few these could be without conflicts, "ideal".
    """

    findings: list[Finding] = field(default_factory=list)
    executed: Counter = field(default_factory=Counter)
    memory: Counter = field(default_factory=Counter)

    def find(self, kind: str, instruction, detail: str) -> None:
        """Notes a finding, or one more of those at the same instruction."""
        same = [x for x in self.findings if (x.kind, x.instruction) == (kind, instruction.text)]
        if len(same) < MAX_FINDINGS:
            self.findings.append(Finding(kind, instruction.text, detail))
        else:
            same[-1].count += 1

    def count(self, space: str, instruction, **figures: int) -> None:
        """Adds to the costs of a space."""
        kind = "store" if instruction.name.startswith("st") else "load"
        self.memory.update({(f"{space} {kind}", name): int(number) for name, number in figures.items()})


@dataclass(frozen=True)
class Access:
    """What one instruction of the threads that execute it touches."""

    instruction: object
    threads: np.ndarray  # numbers of these threads, in order
    addresses: np.ndarray  # of each
    size: int  # bytes, a power of two


class Global:
    """Global memory: arrays far from each other."""

    def __init__(self, arrays: list[Array], report: Report, where):
        self.arrays, self.report, self.where = arrays, report, where
        self.bytes = [np.ascontiguousarray(x.data).reshape(-1).view(np.uint8) for x in arrays]
        # The thread that wrote last, counted from 1; 0 where nobody has.
        self.writers = [np.zeros(x.size // 2, np.int32) if a.output else None for x, a in zip(self.bytes, arrays)]

    def find_unwritten(self) -> None:
        """Notes outputs that were written in part only; one that is not written at all stands for an absent one."""
        for array, writers in zip(self.arrays, self.writers):
            if array.output and 0 < (missing := int((writers == 0).sum())) < len(writers):
                detail = f"{2 * missing} of {array.data.nbytes} bytes of {array.name}"
                self.report.findings.append(Finding("never written", "end", detail))

    def load(self, access: Access, kind: np.dtype) -> np.ndarray:
        """Values of shape (threads, vector)."""
        number, offsets = self._locate(access)
        writers = self.writers[number]
        if writers is not None and (fresh := writers[offsets >> 1] == 0).any():
            self._find("uninitialised", access, fresh, f"reads {self.arrays[number].name}, not written")
        return self._rows(number, kind, access.size)[offsets // access.size]

    def store(self, access: Access, values: np.ndarray) -> None:
        """Stores values of shape (threads, vector); threads may write to one place only the same."""
        number, offsets = self._locate(access)
        name, writers = self.arrays[number].name, self.writers[number]
        if writers is None:
            raise Fault(f"a store to the input {name}")
        rows, index = self._rows(number, values.dtype, access.size), offsets // access.size
        halves, writer = (offsets >> 1)[:, None] + np.arange(access.size // 2), access.threads[:, None] + 1
        others = (writers[halves] != 0) & (writers[halves] != writer)
        wrong = others.any(1) & (rows[index] != values).any(1)
        rows[index] = values
        wrong |= (rows[index] != values).any(1)  # two threads at once, of which one lost
        writers[halves] = writer
        if wrong.any():
            self._find("race, global", access, wrong, f"and another thread write different values to {name}")

    def _rows(self, number: int, kind: np.dtype, size: int) -> np.ndarray:
        """An array's memory as rows as long as an access."""
        memory = self.bytes[number]
        return memory[: len(memory) // size * size].view(kind).reshape(-1, size // kind.itemsize)

    def _locate(self, access: Access) -> tuple[int, np.ndarray]:
        """The array that an instruction accesses, and offsets in it."""
        number = int(access.addresses[0] // SPACING) - 1
        if not 0 <= number < len(self.arrays):
            raise Fault(f"out of bounds: a global access to no array: {access.addresses[0]:#x}")
        offsets, nbytes = access.addresses - SPACING * (number + 1), self.arrays[number].data.nbytes
        outside = (offsets < 0) | (offsets + access.size > nbytes)
        if outside.any():
            detail = f"at byte {offsets[outside][0]} of {nbytes} of {self.arrays[number].name}"
            self._find("out of bounds", access, outside, detail)
            offsets = np.where(outside, 0, offsets)
        if (offsets % access.size).any():
            raise Fault(f"misaligned: a global access of {access.size} bytes")
        warps = access.threads // WARP
        sectors, lines = (len(np.unique(warps << 40 | offsets // size)) for size in (SECTOR, LINE))
        costs = dict(sectors=sectors, cycles=lines, bytes=access.size * len(offsets))
        self.report.count("global", access.instruction, requests=len(np.unique(warps)), **costs)
        return number, offsets

    def _find(self, kind: str, access: Access, wrong: np.ndarray, detail: str) -> None:
        first = self.where(access.threads[int(np.argmax(wrong))])
        self.report.find(kind, access.instruction, f"{int(wrong.sum())} threads, {first} {detail}")


class Shared:
    """Shared memory of all programs, `size` bytes for each."""

    def __init__(self, programs: int, threads: int, size: int, report: Report, where):
        self.size, self.threads, self.report, self.where = -(-size // 16) * 16, threads, report, where
        self.bytes = np.zeros(programs * self.size, np.uint8)
        self.written = np.zeros(len(self.bytes) // 2, bool)
        self.epoch = np.ones(programs, np.int32)  # barriers of the program so far
        self.warp_epoch = np.ones(programs * threads // WARP, np.int32)  # barriers of the warp so far
        self.writes, self.reads = _Touched(len(self.written)), _Touched(len(self.written))

    def barrier(self, programs: np.ndarray) -> None:
        """All threads of these programs have waited for each other."""
        self.epoch[programs] += 1

    def warp_barrier(self, warps: np.ndarray) -> None:
        """All threads of these warps have waited for each other."""
        self.warp_epoch[warps] += 1

    def load(self, access: Access, kind: np.dtype) -> np.ndarray:
        """Values of shape (threads, vector)."""
        offsets = self._locate(access, write=False)
        halves = (offsets >> 1)[:, None] + np.arange(max(access.size // 2, 1))
        if (fresh := ~self.written[halves].all(1)).any():
            self._find("uninitialised", access, fresh)
        return self.bytes.view(kind).reshape(-1, access.size // kind.itemsize)[offsets // access.size]

    def store(self, access: Access, values: np.ndarray) -> None:
        """Stores values of shape (threads, vector)."""
        offsets = self._locate(access, write=True)
        rows = self.bytes.view(values.dtype).reshape(-1, access.size // values.dtype.itemsize)
        index = offsets // access.size
        rows[index] = values
        if (lost := (rows[index] != values).any(1)).any():
            self._find("race, shared", access, lost)
        self.written[(offsets >> 1)[:, None] + np.arange(max(access.size // 2, 1))] = True

    def _locate(self, access: Access, write: bool) -> np.ndarray:
        """Offsets in the memory of all programs."""
        low, high = int(access.addresses.min()), int(access.addresses.max()) + access.size
        if low < 0 or high > self.size:
            raise Fault(f"out of bounds: bytes {low} to {high} of {self.size} of shared memory")
        if (access.addresses % access.size).any():
            raise Fault(f"misaligned: an access of {access.size} bytes to shared memory")
        self._count(access)
        offsets = access.threads // self.threads * self.size + access.addresses
        self._check_races(access, offsets, write)
        return offsets

    def _count(self, access: Access) -> None:
        """A cycle serves as many lanes as 32 words hold, again and again until the busiest bank is done."""
        words = max(access.size // 4, 1)
        groups, number = np.unique(access.threads // (WARP // words), return_inverse=True)
        touched = (access.addresses >> 2)[:, None] + np.arange(words)
        keys = np.unique(number[:, None] << 40 | touched)
        banks = np.bincount((keys >> 40) * BANKS + keys % BANKS, minlength=BANKS * len(groups)).reshape(-1, BANKS)
        requests = len(np.unique(access.threads // WARP))
        self.report.count("shared", access.instruction, requests=requests, cycles=banks.max(1).sum(), ideal=len(groups))

    def _check_races(self, access: Access, offsets: np.ndarray, write: bool) -> None:
        """Two threads at one address, one of them writing, without a barrier between them."""
        warp = access.threads // WARP
        who = self.epoch[access.threads // self.threads], warp, self.warp_epoch[warp], access.threads % WARP
        halves = [(offsets >> 1) + i for i in range(max(access.size // 2, 1))]
        conflict = np.zeros(len(offsets), bool)
        for at in halves:
            conflict |= self.writes.by_others(at, *who)
            if write:
                conflict |= self.reads.by_others(at, *who)
            (self.writes if write else self.reads).note(at, *who)
        if conflict.any():
            self._find("race, shared", access, conflict)

    def _find(self, kind: str, access: Access, wrong: np.ndarray) -> None:
        first = int(np.argmax(wrong))
        detail = f"{self.where(access.threads[first])} at byte {int(access.addresses[first])}"
        self.report.find(kind, access.instruction, f"{int(wrong.sum())} threads, {detail}")


class _Touched:
    """For every two bytes of shared memory, which thread last read or wrote them and when."""

    def __init__(self, size: int):
        self.epoch, self.warp, self.warp_epoch, self.lane = (np.zeros(size, np.int32) for _ in range(4))

    def by_others(self, at, epoch, warp, warp_epoch, lane) -> np.ndarray:
        """Tells where a thread other than this one came without a barrier since."""
        other_lane = (self.warp_epoch[at] == warp_epoch) & (self.lane[at] != lane)
        return (self.epoch[at] == epoch) & ((self.warp[at] != warp) | other_lane)

    def note(self, at, epoch, warp, warp_epoch, lane) -> None:
        """Adds threads, several of which may be at one place."""
        recent = self.epoch[at] == epoch
        other_warp = recent & (self.warp[at] != warp)
        other_lane = recent & (self.warp_epoch[at] == warp_epoch) & (self.lane[at] != lane)
        self.epoch[at], self.warp_epoch[at] = epoch, warp_epoch
        for cells, values in (
            (self.warp, np.where(other_warp, MANY, warp)),
            (self.lane, np.where(other_lane, MANY, lane)),
        ):
            cells[at] = values
            lost = cells[at] != values
            cells[at[lost]] = MANY
