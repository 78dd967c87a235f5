"""Bounds the speed of the GPU kernels by what they execute, without a GPU.

    python scripts/gpu_static.py [--shape vim_tiny_stride8] [--batch 64 1] [--dtype bfloat16]
                                 [--architectures 80 90] [--implementations pallas triton]
                                 [--kernels forward backward]

Each kernel of a scan and its gradient is lowered for CUDA, compiled to PTX by Triton and executed on the CPU for one
sequence (`ptx/`); ptxas says how many registers it takes. This needs the package `triton`, whose wheel includes ptxas,
and nothing else of CUDA. XLA has its own copy of Triton, of another version, so a real run may differ slightly.

The table gives the cost of one state update: what all threads execute, divided by batch × length × channels × state.
Instructions are those of PTX but for moves and for constants in addresses, which ptxas makes part of others, and an
addition of 64 bits is two; "load/store" counts the cycles, times 32, for which a kernel holds the path to memory: one
for each line of 128 bytes of global memory, for each 128 bytes of shared memory or more if lanes meet in a bank, and
for each shuffle. Bounds are the minimal times that a GPU of the architecture needs to issue all instructions, to
compute all exponentials and reciprocals (MUFU), for the load/store path, and to move each array that a kernel reads or
writes once. They ignore latency and idle processors, so no kernel reaches its bounds.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import re
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ptx.compiler import Compiled, Kernel, compile_kernel, pallas_kernels, triton_kernel
from ptx.machine import Machine
from ptx.memory import Array, Report
from ptx.parser import fold_offsets, parse

from kernels.scan import pallas, triton
from kernels.scan.inputs import ScanInputs, ScanOptions
from kernels.scan.shapes import SHAPES, Shape

OPTIONS = ScanOptions(delta_softplus=True)
PER_UPDATE = ("instructions", "MUFU", "load/store", "shared memory", "bytes")
BOUNDS = ("issue µs", "MUFU µs", "load/store µs", "memory µs")
COLUMNS = ("blocks", "registers", "spilled bytes", "shared bytes", "blocks a multiprocessor", *PER_UPDATE, *BOUNDS)


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates and sizes from the vendor's data sheet."""

    name: str
    processors: int
    clock: float  # cycles per second
    bandwidth: float  # bytes per second
    shared: int  # bytes of shared memory in a multiprocessor

    # Each cycle, a streaming multiprocessor issues four instructions of 32 threads, computes 16 MUFU results and
    # serves 32 lanes of the load/store path.
    issue = property(lambda self: self.processors * self.clock * 4 * 32)
    special = property(lambda self: self.processors * self.clock * 16)
    load_store = property(lambda self: self.processors * self.clock * 32)

    def blocks(self, registers: int, threads: int, shared: int) -> int:
        """Blocks that a multiprocessor holds at once."""
        by_registers = 65536 // (-(-registers // 8) * 8 * threads)
        return min(by_registers, 2048 // threads, 32, self.shared // (shared + 1024))


DEVICES = {80: Device("A100", 108, 1.41e9, 2.04e12, 164 << 10), 90: Device("H200", 132, 1.98e9, 4.8e12, 228 << 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="vim_tiny_stride8", choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--architectures", nargs="+", type=int, default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--implementations", nargs="+", default=["pallas", "triton"], choices=["pallas", "triton"])
    parser.add_argument("--kernels", nargs="+", default=["forward", "backward"], choices=["forward", "backward"])
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.exit(1, "error: Triton's compiler is needed: pip install triton\n")
    shape, find = SHAPES[arguments.shape], {"pallas": of_pallas, "triton": of_triton}
    print(f"| kernel | batch | GPU | {' | '.join(COLUMNS)} |\n|---|---:|---|{'---:|' * len(COLUMNS)}")
    for batch in arguments.batch:
        inputs = specs(shape, batch, arguments.dtype)
        for implementation in arguments.implementations:
            for kernel in find[implementation](inputs, arguments.kernels):
                for architecture in arguments.architectures:
                    cells = measure(kernel, architecture, shape, batch)
                    row = (f"{implementation}: {kernel.name}", str(batch), DEVICES[architecture].name, *cells)
                    print(f"| {' | '.join(row)} |", flush=True)


def specs(shape: Shape, batch: int, dtype: str) -> ScanInputs:
    """The inputs of a Mamba layer's scan."""
    long, matrix = (batch, shape.length, shape.channels), (batch, shape.length, shape.groups, shape.state)
    arrays = {name: jax.ShapeDtypeStruct(long, jnp.dtype(dtype)) for name in ("u", "delta", "z")}
    parameters = dict(B=matrix, C=matrix, A=(shape.channels, shape.state), D=(shape.channels,))
    parameters |= dict(delta_bias=(shape.channels,))
    return ScanInputs(**arrays, **{name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in parameters.items()})


def of_pallas(inputs: ScanInputs, passes: list[str]) -> list[Kernel]:
    """The kernels as Pallas lowers them; with small batches, also those that summarise chunks of time."""
    inputs = jax.eval_shape(functools.partial(pallas.pad, options=OPTIONS), inputs)
    forward = functools.partial(pallas.forward, options=OPTIONS)
    results = jax.eval_shape(functools.partial(forward, save_states=True), inputs)
    found = {}
    if "forward" in passes:
        found["forward"] = pallas_kernels(functools.partial(forward, save_states=False), inputs)
        found["forward of training"] = pallas_kernels(functools.partial(forward, save_states=True), inputs)
    if "backward" in passes:
        cotangents = results["states"], results["y"], results["last_state"]
        found["backward"] = pallas_kernels(functools.partial(pallas.backward, options=OPTIONS), inputs, *cotangents)
    return [
        dataclasses.replace(kernel, name=f"{name}, chunks" if "summary" in kernel.name else name)
        for name, kernels in found.items()
        for kernel in kernels
    ]


def of_triton(inputs: ScanInputs, passes: list[str]) -> list[Kernel]:
    """The kernels of the implementation "triton"."""
    found = []

    def note(name, arguments, outputs, grid, warps, constants):
        found.append(triton_kernel(name, arguments, outputs, grid, warps, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in outputs]

    def both(inputs):
        y, last_state, states = triton.forward(inputs, OPTIONS, True, note)
        return triton.backward(inputs, states, y, last_state, OPTIONS, note)

    jax.eval_shape(both, inputs)
    return [kernel for kernel in found if kernel.name in passes]


def measure(kernel: Kernel, architecture: int, shape: Shape, batch: int) -> list[str]:
    """The cells of a kernel's row."""
    compiled, device, blocks = compile_kernel(kernel, architecture), DEVICES[architecture], math.prod(kernel.grid)
    registers, spilled = usage(compiled, architecture)
    arrays = [Array(np.zeros(x.shape, x.dtype)) for x in kernel.arguments]
    arrays += [Array(np.zeros(x.shape, x.dtype), output=True) for x in kernel.outputs]
    program, programs = fold_offsets(parse(compiled.ptx)), blocks // batch
    machine = Machine(program, kernel.grid, kernel.threads, compiled.shared, programs)
    counts = {name: 32 * batch * x for name, x in count(machine.run(arrays)).items()} | dict(bytes=kernel.bytes)
    rates = device.issue, device.special, device.load_store, device.bandwidth
    names = ("instructions", "MUFU", "load/store", "bytes")
    updates = batch * shape.length * shape.channels * shape.state
    resident = device.blocks(registers, kernel.threads, compiled.shared)
    return [
        *map(str, (blocks, registers, spilled, compiled.shared, resident)),
        *(f"{counts[name] / updates:.2f}" for name in PER_UPDATE),
        *(f"{1e6 * counts[name] / rate:.1f}" for name, rate in zip(names, rates)),
    ]


def usage(compiled: Compiled, architecture: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, by ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", compiled.ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.ptx)
        command = [get_ptxas(architecture).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={target}", path]
        told = subprocess.run([*command, "-o", f"{path}.cubin"], check=True, capture_output=True, text=True).stderr
    spilled = re.search(r"(\d+) bytes stack frame", told)
    return int(re.search(r"Used (\d+) registers", told)[1]), int(spilled[1] if spilled else 0)


def count(report: Report) -> dict[str, int]:
    """What warps execute, in instructions or cycles."""
    executed, memory = report.executed, report.memory
    moves = sum(n for name, n in executed.items() if name.startswith(("mov", "ld.param")))
    special = sum(n for name, n in executed.items() if name.startswith(("ex2", "rcp", "lg2")))
    shared = sum(n for (space, figure), n in memory.items() if space.startswith("shared") and figure == "cycles")
    cycles = sum(n for (_, figure), n in memory.items() if figure == "cycles")
    shuffles = sum(n for name, n in executed.items() if name.startswith("shfl"))
    wide = sum(n for name, n in executed.items() if name in ("add.s64", "sub.s64"))
    total = sum(executed.values()) - moves + wide
    return {"instructions": total, "MUFU": special, "load/store": cycles + shuffles, "shared memory": shared}


if __name__ == "__main__":
    main()
