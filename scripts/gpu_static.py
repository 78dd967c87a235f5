"""Bounds the speed of the GPU kernels from their machine code, without a GPU.

    python scripts/gpu_static.py [--shape vim_tiny_stride8] [--batch 64 1] [--dtype bfloat16]
                                 [--architectures 80 90] [--implementations pallas triton]
                                 [--kernels forward backward]

Each kernel of a scan and its gradient is lowered for CUDA, compiled ahead of time by Triton's compiler and
disassembled. This needs the package `triton`, whose wheel includes ptxas, nvdisasm and cuobjdump, and nothing else of
CUDA. XLA has its own copy of Triton, of another version, so a real run may differ slightly.

The table gives the cost of one state update: the instructions of the loop over time as often as it runs and all others
once, over all threads, divided by batch × length × channels × state. Both sides of a branch count. The bounds are the
minimal times that a GPU of the architecture needs to issue all instructions, to compute all exponentials and
reciprocals (MUFU), and to move each array that a kernel reads or writes once. They ignore latency and idle processors,
so no kernel reaches its bounds. Nothing is run here.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import os
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels.scan import pallas, triton
from kernels.scan.inputs import ScanInputs, ScanOptions
from kernels.scan.shapes import SHAPES, Shape

OPTIONS = ScanOptions(delta_softplus=True)
COLUMNS = (
    "blocks",
    "registers",
    "spilled bytes",
    "shared bytes",
    "instructions",
    "MUFU",
    "shuffles",
    "shared memory",
    "bytes",
)
SHARED = ("LDS", "LDSM", "STS", "STSM")  # instructions that load from shared memory or store there


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates from the vendor's data sheet."""

    name: str
    processors: int
    clock: float  # cycles per second
    bandwidth: float  # bytes per second

    # Each cycle, a streaming multiprocessor issues four instructions of 32 threads and computes 16 MUFU results.
    instructions = property(lambda self: self.processors * self.clock * 4 * 32)
    special = property(lambda self: self.processors * self.clock * 16)


DEVICES = {80: Device("A100", 108, 1.41e9, 2.04e12), 90: Device("H200", 132, 1.98e9, 4.8e12)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel before compilation to machine code."""

    name: str
    source: Any  # for `triton.compile`: a file of Triton's intermediate language, or a function with its arguments
    grid: tuple[int, ...]
    warps: int
    bytes: int  # of the arrays that it reads and writes
    trips: float  # of the loop over time, in each program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="vim_tiny_stride8", choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--architectures", nargs="+", type=int, default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--implementations", nargs="+", default=["pallas", "triton"], choices=["pallas", "triton"])
    parser.add_argument("--kernels", nargs="+", default=["forward", "backward"], choices=["forward", "backward"])
    arguments = parser.parse_args()
    if missing := why_unavailable():
        parser.exit(1, f"error: {missing}\n")
    shape, find = SHAPES[arguments.shape], {"pallas": pallas_kernels, "triton": triton_kernels}
    titles = ("kernel", "batch", "GPU", *COLUMNS, "issue µs", "MUFU µs", "memory µs")
    print(f"| {' | '.join(titles)} |\n|---|---:|---|{'---:|' * (len(titles) - 3)}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for batch in arguments.batch:
            inputs, updates = specs(shape, batch, arguments.dtype), batch * shape.length * shape.channels * shape.state
            for implementation in arguments.implementations:
                for kernel in find[implementation](inputs, arguments.kernels, Path(folder)):
                    for architecture in arguments.architectures:
                        cells = measure(kernel, architecture, updates, Path(folder))
                        row = (f"{implementation}: {kernel.name}", str(batch), DEVICES[architecture].name, *cells)
                        print(f"| {' | '.join(row)} |", flush=True)


def why_unavailable() -> str | None:
    """The reason, in one line, why this script cannot run here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton's compiler is needed: pip install triton"
    missing = [name for name in ("nvdisasm", "cuobjdump") if not tool(name).exists()]
    return f"this build of triton has no {' and no '.join(missing)}" if missing else None


def tool(name: str) -> Path:
    """The path of a program that comes with Triton."""
    return Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name


def specs(shape: Shape, batch: int, dtype: str) -> ScanInputs:
    """The inputs of a Mamba layer's scan."""
    long, matrix = (batch, shape.length, shape.channels), (batch, shape.length, shape.groups, shape.state)
    arrays = {name: jax.ShapeDtypeStruct(long, jnp.dtype(dtype)) for name in ("u", "delta", "z")}
    parameters = dict(B=matrix, C=matrix, A=(shape.channels, shape.state), D=(shape.channels,))
    parameters |= dict(delta_bias=(shape.channels,))
    return ScanInputs(**arrays, **{name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in parameters.items()})


def pallas_kernels(inputs: ScanInputs, passes: list[str], folder: Path) -> list[Kernel]:
    """The kernels as Pallas lowers them; with small batches, also those that summarise chunks of time."""
    inputs = jax.eval_shape(functools.partial(pallas.pad, options=OPTIONS), inputs)
    forward = functools.partial(pallas.forward, options=OPTIONS)
    results = jax.eval_shape(functools.partial(forward, save_states=True), inputs)
    found = []
    if "forward" in passes:
        plan = pallas.forward_plan(inputs)
        found += lowered("forward", plan, folder, functools.partial(forward, save_states=False), inputs)
        found += lowered("forward of training", plan, folder, functools.partial(forward, save_states=True), inputs)
    if "backward" in passes:
        backward = functools.partial(pallas.backward, options=OPTIONS)
        cotangents = results["y"], results["last_state"]
        found += lowered(
            "backward", pallas.backward_plan(inputs), folder, backward, inputs, results["states"], *cotangents
        )
    return found


def lowered(name: str, plan, folder: Path, function, *arguments) -> list[Kernel]:
    """The Triton kernels in a function's lowering for CUDA."""
    from jax._src.lib import triton as jaxlib_triton
    from jax._src.lib.mlir import ir

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with warnings.catch_warnings(), use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        module = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir()
    calls, kernels = [], []

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "xla.gpu.triton" in str(
            operation.attributes["call_target_name"]
        ):
            calls.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for call in calls:
        config = call.attributes["mhlo.backend_config"]
        with ir.Context() as context:
            jaxlib_triton.dialect.register_dialect(context)
            code = ir.Module.parse(config["ir"].value_bytes).operation.get_asm()
        path = folder / f"{len(list(folder.glob('*.ttir')))}.ttir"
        path.write_text(code)
        arrays = [ir.RankedTensorType(x.type) for x in (*call.operands, *call.results)]
        moved = sum(math.prod(x.shape) * x.element_type.width // 8 for x in arrays)
        grid = tuple(config[f"grid_{axis}"].value for axis in "xyz")
        label = f"{name}, chunks" if "summary" in config["name"].value else name
        kernels.append(Kernel(label, str(path), grid, config["num_warps"].value, moved, plan.windows / plan.chunks))
    return kernels


def triton_kernels(inputs: ScanInputs, passes: list[str], folder: Path) -> list[Kernel]:
    """The kernels of the implementation "triton"."""
    from triton.compiler import ASTSource

    from kernels.scan import triton_kernels

    found, kinds = [], {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}

    def note(name, arguments, outputs, grid, warps, constants):
        function = getattr(triton_kernels, name)
        arrays = [*arguments, *outputs]
        signature = dict(zip(function.arg_names, (kinds[str(x.dtype)] for x in arrays)))
        source = ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), constants)
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
        trips = inputs.length if name == "forward" else -(-inputs.length // triton.WINDOW)
        found.append(Kernel(name, source, grid, warps, moved, trips))
        return [jnp.zeros(x.shape, x.dtype) for x in outputs]

    def both(inputs):
        y, last_state, states = triton.forward(inputs, OPTIONS, True, note)
        return triton.backward(inputs, states, y, last_state, OPTIONS, note)

    jax.eval_shape(both, inputs)
    return [kernel for kernel in found if kernel.name in passes]


def measure(kernel: Kernel, architecture: int, updates: int, folder: Path) -> list[str]:
    """The cells of a kernel's row."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = dict(num_warps=kernel.warps, num_stages=1, enable_fp_fusion=True)  # multiply-adds, as XLA has them
    compiled = triton.compile(kernel.source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = folder / "cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def read(program: str, option: str) -> str:
        return subprocess.run([tool(program), option, cubin], check=True, capture_output=True, text=True).stdout

    usage = dict(re.findall(r"(\w+):(\d+)", read("cuobjdump", "-res-usage").split("Function")[1]))
    counts = count(read("nvdisasm", "-c"), kernel.trips)
    device, threads = DEVICES[architecture], math.prod(kernel.grid) * kernel.warps * 32
    seconds = counts["all"] * threads / device.instructions, counts["MUFU"] * threads / device.special
    return [
        str(math.prod(kernel.grid)),
        usage["REG"],
        str(int(usage["LOCAL"]) + int(usage["STACK"])),
        str(compiled.metadata.shared),
        *(f"{counts[name] * threads / updates:.2f}" for name in ("all", "MUFU", "SHFL", "shared")),
        f"{kernel.bytes / updates:.2f}",
        *(f"{1e6 * x:.1f}" for x in (*seconds, kernel.bytes / device.bandwidth)),
    ]


def count(assembly: str, trips: float) -> Counter:
    """Counts a thread's executed instructions, by the first part of the name, and in total ("all") and for `SHARED`.

    The loop over time is the longest loop; no kernel has a loop inside it.
    """
    instructions, labels, loops = [], {}, []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*);", line):
            instructions.append(found.groups())
    for number, (name, rest) in enumerate(instructions):
        target = labels.get((re.search(r"\.L_\w+", rest) or [""])[0], number) if name == "BRA" else number
        if target < number:
            loops.append(range(target, number + 1))
    time, counts = max(loops, key=len, default=range(0)), Counter()
    for number, (name, _) in enumerate(instructions):
        if name != "NOP":
            often = trips if number in time else 1
            counts.update(dict.fromkeys((name, "all", *(["shared"] if name in SHARED else [])), often))
    return counts


if __name__ == "__main__":
    main()
