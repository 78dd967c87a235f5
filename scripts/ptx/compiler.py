"""From the scan's kernels to PTX, without a GPU; needs the package `triton`.

Compiling takes up to minutes, nearly all in one of Triton's passes, so PTX is kept in `$PTX_CACHE`, by default
~/.cache/vimd_jax/ptx, under a hash of what it is compiled from.
"""

import hashlib
import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

KINDS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class Kernel:
    """A kernel before compilation."""

    name: str
    source: Any  # Triton's intermediate language, or a function in Triton's language with its arguments
    grid: tuple[int, int, int]
    warps: int
    arguments: list[jax.ShapeDtypeStruct]
    outputs: list[jax.ShapeDtypeStruct]

    @property
    def threads(self) -> int:
        """Threads in a program."""
        return 32 * self.warps

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in (*self.arguments, *self.outputs))


@dataclass(frozen=True)
class Compiled:
    """A kernel in PTX."""

    ptx: str
    shared: int  # bytes of shared memory that a program needs beside the kernel's own variables


def pallas_kernels(function, *arguments) -> list[Kernel]:
    """The Triton kernels in a function's lowering for CUDA, in order; the arguments may be shapes."""
    from jax._src.lib import triton as jaxlib_triton
    from jax._src.lib.mlir import ir

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with warnings.catch_warnings(), use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        module = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir()
    kernels = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "xla.gpu.triton" in str(
            operation.attributes["call_target_name"]
        ):
            config = operation.attributes["mhlo.backend_config"]
            with ir.Context() as context:
                jaxlib_triton.dialect.register_dialect(context)
                code = ir.Module.parse(config["ir"].value_bytes).operation.get_asm()
            arrays = (list(map(_shape, values)) for values in (operation.operands, operation.results))
            grid = tuple(config[f"grid_{axis}"].value for axis in "xyz")
            kernels.append(Kernel(config["name"].value, code, grid, config["num_warps"].value, *arrays))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return kernels


def _shape(value) -> jax.ShapeDtypeStruct:
    from jax._src.lib.mlir import ir

    kind = ir.RankedTensorType(value.type)
    dtype = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[str(kind.element_type)]
    return jax.ShapeDtypeStruct(kind.shape, dtype)


def triton_kernel(name: str, arguments: list, outputs: list, grid: tuple, warps: int, constants: dict) -> Kernel:
    """A kernel of `kernels.scan.triton_kernels`, from what `kernels.scan.triton.run` is called with."""
    from triton.compiler import ASTSource

    from kernels.scan import triton_kernels

    function, arrays = getattr(triton_kernels, name), [*arguments, *outputs]
    signature = dict(zip(function.arg_names, (KINDS[str(x.dtype)] for x in arrays)))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    source = ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    return Kernel(name, source, grid, warps, arguments, outputs)


def compile_kernel(kernel: Kernel, architecture: int) -> Compiled:
    """Compiles for a compute capability: 80 for an A100, 90 for an H100 or H200."""
    import triton

    code = re.sub(r"loc\(.*?\)", "", kernel.source) if isinstance(kernel.source, str) else kernel.source.hash()
    key = hashlib.sha256(f"{triton.__version__} {architecture} {kernel.warps} {code}".encode()).hexdigest()[:24]
    folder = Path(os.environ.get("PTX_CACHE") or Path.home() / ".cache" / "vimd_jax" / "ptx")
    path = folder / f"{key}.ptx"
    if not path.exists():
        compiled = _compile(kernel, architecture)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"// {compiled.shared}\n{compiled.ptx}")
        temporary.rename(path)
    head, _, ptx = path.read_text().partition("\n")
    return Compiled(ptx, int(head.split()[1]))


def _compile(kernel: Kernel, architecture: int) -> Compiled:
    """As `triton.compile` does, but no further than PTX."""
    from tempfile import TemporaryDirectory

    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import IRSource, make_backend

    target = GPUTarget("cuda", architecture, 32)
    backend, context, stages = make_backend(target), ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    with TemporaryDirectory() as folder:
        source, names = kernel.source, ["ttir", "ttgir", "llir", "ptx"]
        if isinstance(source, str):
            path = Path(folder) / "kernel.ttir"
            path.write_text(source)
            source, names = IRSource(str(path), context, backend), names[1:]
        options = dict(num_warps=kernel.warps, num_stages=1, enable_fp_fusion=True)  # multiply-adds, as XLA has them
        options = backend.parse_options(options | source.parse_options())
        functions = backend.get_codegen_implementation(options), backend.get_module_map()
        module, metadata = source.make_ir(target, options, *functions, context), {"target": target, **vars(options)}
    backend.add_stages(stages, options, source.language)
    for name in names:
        module = stages[name](module, metadata)
    if metadata["global_scratch_size"]:
        raise NotImplementedError(f"{kernel.name}: it needs scratch in global memory")
    return Compiled(str(module), metadata["shared"])
