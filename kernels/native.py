"""Selective scan in C++ (native.cc) through `jax.ffi`: CPU.

The library is compiled for this machine on first use, with `$CXX` (and `$CXXFLAGS`) or else the first of c++, g++ and
clang++, and kept in `$XDG_CACHE_HOME/vimd_jax` (usually ~/.cache/vimd_jax) under a name made of all that goes into it.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version

SOURCE = Path(__file__).with_name("native.cc")
# Explicit flags instead of -ffast-math, which would let the compiler assume that NaN and infinity do not happen.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared"]
FORWARD, BACKWARD = "vimd_selective_scan_forward", "vimd_selective_scan_backward"
CHUNK = 16  # kChunk in native.cc: steps between two kept states
# A group's channels are cut into ranges of at least and at most so many, for about this many tasks in all: long rows
# are read faster, but every core shall have work. Each range makes its part of the gradients of B and C.
RANGE_CHANNELS = 64, 512
TASKS = 16

_lock = threading.Lock()


def why_unavailable() -> str | None:
    """One line that says why it cannot run here, None if it can. The first call may compile, for some seconds."""
    if jax.default_backend() != "cpu":
        return f"it is for CPUs, the default backend is {jax.default_backend()}"
    with _lock:
        return _register()


@functools.cache
def _register() -> str | None:
    try:
        library = _load()
        for target in (FORWARD, BACKWARD):
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except Exception as error:  # there are many ways to be without a compiler that works
        return " ".join(str(error).split())
    return None


def _load() -> ctypes.CDLL:
    library = _build()
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # damaged in the cache
        library.unlink(missing_ok=True)
        return ctypes.CDLL(str(_build()))


def _build() -> Path:
    """Path of the compiled library, from the cache if it is there."""
    if not compilers():
        raise RuntimeError("no C++ compiler: install g++ or clang++, or set CXX")
    compiler = shlex.split(compilers()[0])
    tune = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    flags = [*FLAGS, tune, f"-I{jax.ffi.include_dir()}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    version = _run([*compiler, "--version"])
    parts = [SOURCE.read_text(), jaxlib.version.__version__, *compiler, *flags, version, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    name = f"selective_scan-{key[:16]}.so"
    cached = _cache_folder() / name
    if cached.exists():
        return cached
    library = _writable(cached.parent) / name
    if not library.exists():
        logging.getLogger(__name__).info("compiling %s into %s (once)", SOURCE.name, library)
        # Renaming is atomic: whoever builds at the same time, nobody ever loads half a file.
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            _run([*compiler, *flags, str(SOURCE), "-o", f"{work}/{library.name}"])
            os.replace(f"{work}/{library.name}", library)
    return library


def compilers() -> list[str]:
    """The commands that could compile the kernel here, preferred first."""
    if named := os.environ.get("CXX"):
        return [named]
    return [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
        raise RuntimeError(f"{command[0]} failed: {reason}")
    return result.stdout


def _processor() -> str:
    """What `native` means here: a cache may be shared between unlike machines."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _cache_folder() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _private_folder() if folder.startswith("~") else Path(folder) / "vimd_jax"  # "~" is who has no home


def _writable(folder: Path) -> Path:
    """The folder, or where it cannot be written one for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return _private_folder()
    return folder


@functools.cache
def _private_folder() -> Path:
    """Is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="vimd_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def scan(u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse) -> tuple[jax.Array, jax.Array]:
    """See `kernels.selective_scan` for the contract."""
    B, C = B.astype(jnp.float32), C.astype(jnp.float32)
    return _scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def _scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(_forward(inputs, delta_softplus, reverse, chunks=0)[:2])


def _scan_and_keep(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, last_state, starts = _forward(inputs, delta_softplus, reverse, chunks=-(-u.shape[1] // CHUNK))
    return (y, last_state), (inputs, starts)


def _gradients(delta_softplus, reverse, residuals, cotangents):
    inputs, starts = residuals
    dy, d_last_state = cotangents
    return _backward(inputs, dy, d_last_state, starts, delta_softplus, reverse)


_scan.defvjp(_scan_and_keep, _gradients)


def _forward(inputs, delta_softplus, reverse, chunks):
    u, _, A, *_ = inputs
    batch, _, channels = u.shape
    state = A.shape[1]
    results = (
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct((batch, channels, state), jnp.float32),
        jax.ShapeDtypeStruct((batch, chunks, state, channels), jnp.float32),  # the state before every CHUNK steps
    )
    return _call(FORWARD, results, inputs, ranges=_ranges(inputs), delta_softplus=delta_softplus, reverse=reverse)


def _backward(inputs, dy, d_last_state, starts, delta_softplus, reverse):
    """Gradients of the inputs. The kernel leaves the sums over the batch and over a group's ranges to us."""
    u, _, A, B, C, D, z, delta_bias, initial_state = inputs
    ranges = _ranges(inputs)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    long, nothing = jax.ShapeDtypeStruct(u.shape, u.dtype), float32((0,))

    def each_sequence(x):
        return nothing if x is None else float32((len(u), *x.shape))

    def each_range(x):
        return each_sequence(x) if x.ndim == 2 else float32((len(u), ranges, *x.shape[1:]))

    results = (
        *(long, long, each_sequence(A), each_range(B), each_range(C)),
        *(each_sequence(D), nothing if z is None else long, each_sequence(delta_bias), each_sequence(A)),
    )
    arrays = (*inputs[:-1], dy, d_last_state, starts)
    du, d_delta, dA, dB, dC, dD, dz, d_bias, d_initial = _call(
        BACKWARD, results, arrays, ranges=ranges, delta_softplus=delta_softplus, reverse=reverse
    )
    return (
        du,
        d_delta,
        dA.sum(0),
        dB.sum(0 if B.ndim == 2 else 1),
        dC.sum(0 if C.ndim == 2 else 1),
        None if D is None else dD.sum(0),
        None if z is None else dz,
        None if delta_bias is None else d_bias.sum(0),
        None if initial_state is None else d_initial,
    )


def _ranges(inputs) -> int:
    u, _, _, B, C, *_ = inputs
    groups = max(x.shape[2] if x.ndim == 4 else 1 for x in (B, C))
    most, least = (-(-u.shape[2] // groups // channels) for channels in RANGE_CHANNELS)
    return max(least, min(most, -(-TASKS // (len(u) * groups))))


def _call(target, results, arrays, **attributes):
    """Absent arrays are passed as empty ones; vmapped axes come first, as native.cc expects them."""
    arrays = [jnp.zeros((0,), jnp.float32) if x is None else x for x in arrays]
    return jax.ffi.ffi_call(target, results, vmap_method="broadcast_all")(*arrays, **attributes)
