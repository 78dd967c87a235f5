"""Reads from the machine code of the GPU kernels what they can reach at best, on a machine without a GPU.

    python scripts/gpu_static.py [--shape vim_tiny_stride8] [--batch 64 1] [--dtype bfloat16] [--architectures 80 90]
                                 [--implementations pallas triton]

Each kernel of a scan and its gradient is lowered for CUDA, compiled ahead of time by Triton's compiler and disassembled.
That takes the packages `triton` (its wheel brings ptxas, nvdisasm and cuobjdump) and nothing of CUDA; XLA has a copy of
Triton of its own, of another version, so the figures of a real run may differ a little.

The table counts what one state update costs: the instructions of the loop over time as often as it runs, and what is
outside it once, over all threads, divided by batch × length × channels × state. Both sides of a branch count as
executed. The bounds are the times that a GPU of the architecture needs at least to issue all instructions, to compute
all exponentials, logarithms and reciprocals (MUFU), and to move each array that a kernel reads or writes once. They
leave latency and unequal loads out: no kernel is as fast as its bound, and nothing here was run.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels.scan.inputs import ScanInputs, ScanOptions, canonical
from kernels.scan.shapes import SHAPES, Shape


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates by the vendor's data sheet."""

    name: str
    processors: int
    clock: float  # cycles a second
    bandwidth: float  # bytes a second

    # Each cycle, a streaming multiprocessor issues four instructions of 32 threads and computes 16 MUFU results.
    instructions = property(lambda self: self.processors * self.clock * 4 * 32)
    special = property(lambda self: self.processors * self.clock * 16)


DEVICES = {80: Device("A100", 108, 1.41e9, 2.04e12), 90: Device("H200", 132, 1.98e9, 4.8e12)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel before its machine code: Triton's intermediate language, and how it is started."""

    name: str
    code: str
    grid: tuple[int, int, int]
    warps: int
    bytes: int  # of the arrays it reads and writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="vim_tiny_stride8", choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--architectures", nargs="+", type=int, default=list(DEVICES), choices=list(DEVICES))
    arguments = parser.parse_args()
    if missing := why_unavailable():
        parser.exit(1, f"error: {missing}\n")
    print("| kernel | batch | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for batch in arguments.batch:
            shape = SHAPES[arguments.shape]
            for kernel in pallas_kernels(shape, batch, arguments.dtype):
                if os.environ.get("GS_ONLY","") not in kernel.name: continue
                for architecture in arguments.architectures:
                    row = measure(kernel, architecture, batch, shape, Path(folder))
                    print(f"| {kernel.name} | {batch} | " + " | ".join(row[c] for c in COLUMNS) + " |", flush=True)


def why_unavailable() -> str | None:
    """What is missing, in one line."""
    if importlib.util.find_spec("triton") is None:
        return 'Triton\'s compiler is needed: pip install -e ".[triton]", or only the package triton'
    missing = [name for name in ("nvdisasm", "cuobjdump") if not tool(name).exists()]
    return f"this build of triton has no {' and no '.join(missing)}" if missing else None


def tool(name: str) -> Path:
    """A program that comes with Triton."""
    return Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name


def pallas_kernels(shape: Shape, batch: int, dtype: str) -> list[Kernel]:
    """The kernels of a scan and its gradient as Pallas lowers them for CUDA."""
    from jax._src.lib import triton as jax_triton_dialect
    from jax._src.lib.mlir import ir

    inputs, dy = specs(shape, batch, dtype)
    found = []
    lowered = lower(inputs, dy)
    for call in custom_calls(lowered.compiler_ir(), ir):
        config = call.attributes["mhlo.backend_config"]
        with ir.Context() as context:
            jax_triton_dialect.dialect.register_dialect(context)
            code = ir.Module.parse(config["ir"].value_bytes).operation.get_asm()
        grid = tuple(config[f"grid_{axis}"].value for axis in "xyz")
        arrays = [ir.RankedTensorType(x.type) for x in (*call.operands, *call.results)]
        moved = sum(math.prod(x.shape) * x.element_type.width // 8 for x in arrays)
        found.append(Kernel(config["name"].value.strip("_"), code, grid, config["num_warps"].value, moved))
    return found


def specs(shape, batch, dtype):
    long, matrix = (batch, shape.length, shape.channels), (batch, shape.length, shape.groups, shape.state)
    shapes = dict(u=long, delta=long, z=long, B=matrix, C=matrix)
    inputs = {name: jax.ShapeDtypeStruct(x, dtype) for name, x in shapes.items()}
    parameters = dict(A=(shape.channels, shape.state), D=(shape.channels,), delta_bias=(shape.channels,))
    inputs |= {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in parameters.items()}
    return inputs, inputs["u"]


def lower(inputs, dy):
    from kernels import selective_scan
    def run(inputs, dy):
        options = dict(delta_softplus=True, implementation="pallas")
        only = selective_scan(**inputs, **options)
        y, pullback = jax.vjp(lambda inputs: selective_scan(**inputs, **options), inputs)
        return only, y, pullback(dy)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with warnings.catch_warnings(), use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return jax.jit(run).trace(inputs, dy).lower(lowering_platforms=("cuda",))


def custom_calls(module, ir):
    found = []
    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "xla.gpu.triton" in str(operation.attributes["call_target_name"]):
            found.append(operation)
        return ir.WalkResult.ADVANCE
    module.operation.walk(visit)
    return found


COLUMNS = ("GPU", "blocks", "registers", "spills", "shared", "instructions", "exponentials", "MUFU", "shuffles", "loads", "bytes", "issue", "mufu", "memory")


def measure(kernel, architecture, batch, shape, folder):
    import triton
    from triton.backends.compiler import GPUTarget
    path = folder / f"{kernel.name}.ttir"
    path.write_text(kernel.code)
    options = dict(num_warps=kernel.warps, num_stages=1, enable_fp_fusion=True)
    if os.environ.get("NOFTZ"): options["enable_reflect_ftz"] = False
    compiled = triton.compile(str(path), target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = folder / "cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    if d := os.environ.get("GS_DUMP"):
        for k in ("ttgir", "ptx", "llir"): Path(d, f"{kernel.name}_{batch}_{architecture}.{k}").write_text(compiled.asm[k])
    def run(*c): return subprocess.run([tool(c[0]), *c[1:]], check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(\w+):(\d+)", run("cuobjdump", "-res-usage", str(cubin)).split("Function")[1]))
    sass = run("nvdisasm", "-c", str(cubin))
    if d: Path(d, f"{kernel.name}_{batch}_{architecture}.sass").write_text(sass)
    counts = count(sass, WALK[0], WALK[1])
    device = DEVICES[architecture]
    updates = batch*shape.length*shape.channels*shape.state
    threads = math.prod(kernel.grid)*kernel.warps*32
    per = {k: v*threads/updates for k,v in counts.items()}
    total = counts["all"]*threads
    us = lambda x: f"{1e6*x:.0f} µs"
    return {"GPU": device.name, "blocks": str(math.prod(kernel.grid)), "registers": usage["REG"], "spills": usage["LOCAL"]+"/"+usage["STACK"], "shared": str(compiled.metadata.shared),
     "instructions": f"{per['all']:.1f}", "exponentials": f"{per['EX2']:.2f}", "MUFU": f"{per['MUFU']:.2f}", "shuffles": f"{per['SHFL']:.2f}", "loads": f"{per['LDG']:.2f}", "bytes": f"{kernel.bytes/updates:.2f}",
     "issue": us(total/device.instructions), "mufu": us(counts['MUFU']*threads/device.special), "memory": us(kernel.bytes/device.bandwidth)}

WALK = (92, 4)

def count(sass, trips, inner):
    ins=[]; labels={}
    for line in sass.splitlines():
        if m:=re.match(r"(\.L_\w+):", line): labels[m[1]]=len(ins)
        elif m:=re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", line): ins.append((m[2],m[3]))
    loops=[]
    for i,(op,rest) in enumerate(ins):
        if op.startswith("BRA") and (m:=re.search(r"\((\.L_\w+)\)|(\.L_\w+)", rest)):
            t=labels[m[1] or m[2]]
            if t<i: loops.append((t,i))
            elif False: pass
    loops=[l for l in loops if l[1]-l[0]>0]
    if loops: print("loops", loops, len(ins), file=sys.stderr)
    main=max(loops, key=lambda l:l[1]-l[0], default=None)
    c=Counter()
    for i,(op,rest) in enumerate(ins):
        w=1
        if main and main[0]<=i<=main[1]:
            w=trips
            if any(l!=main and l[0]<=i<=l[1] and main[0]<=l[0] for l in loops): w*=inner
        if op.startswith("NOP"): continue
        c["all"]+=w
        p=op.split(".")
        if p[0]=="MUFU": c[p[1]]+=w
        c[p[0]]+=w
    if os.environ.get("GS_TOP"): print({k:round(v/trips,1) for k,v in c.most_common(40)}, file=sys.stderr)
    return c

if __name__ == "__main__":
    main()
