"""C++ kernels, compiled for this machine when they are first needed and made known to XLA.

The compiler is `$CXX` (with `$CXXFLAGS`), or else the first of c++, g++ and clang++. Libraries are kept in
`$XDG_CACHE_HOME/vimd_jax` (usually ~/.cache/vimd_jax), each under a name derived from everything that goes into it.
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
import jaxlib.version

# Explicit flags instead of -ffast-math, which would let the compiler assume that NaN and infinity do not happen.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared"]

_lock = threading.Lock()


def register(source: Path, handlers: tuple[str, ...], **macros: int) -> str | None:
    """Makes the handlers in a C++ file, compiled with the given macros, available to `jax.ffi` on CPUs.

    The first call may compile, which takes some seconds. Returns None, or one line that says why it cannot be done.
    """
    with _lock:
        return _register(source, handlers, tuple(f"-D{name}={value}" for name, value in macros.items()))


def compiler() -> str | None:
    """The command that compiles here, if there is one."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@functools.cache
def _register(source: Path, handlers: tuple[str, ...], macros: tuple[str, ...] = ()) -> str | None:
    try:
        library = _load(source, macros)
        for handler in handlers:
            jax.ffi.register_ffi_target(handler, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
    except Exception as error:  # there are many ways to lack a working compiler
        return " ".join(str(error).split())
    return None


def _load(source: Path, macros: tuple[str, ...] = ()) -> ctypes.CDLL:
    library = _build(source, macros)
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # damaged in the cache
        library.unlink(missing_ok=True)
        return ctypes.CDLL(str(_build(source, macros)))


def _build(source: Path, macros: tuple[str, ...] = ()) -> Path:
    """Path of the compiled library, from the cache if it is there."""
    if not (command := compiler()):
        raise RuntimeError("no C++ compiler: install g++ or clang++, or set CXX")
    command = shlex.split(command)
    tune = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    flags = [*FLAGS, tune, *macros, f"-I{jax.ffi.include_dir()}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    version = _run([*command, "--version"])
    parts = [source.read_text(), jaxlib.version.__version__, *command, *flags, version, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    name = f"{source.parent.name}-{key[:16]}.so"
    cached = _cache_folder() / name
    if cached.exists():
        return cached
    library = _writable(cached.parent) / name
    if not library.exists():
        logging.getLogger(__name__).info("compiling %s into %s (once)", source.name, library)
        # Renaming is atomic: even with several builds at the same time, nobody ever loads half a file.
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            _run([*command, *flags, str(source), "-o", f"{work}/{library.name}"])
            os.replace(f"{work}/{library.name}", library)
    return library


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
        raise RuntimeError(f"{command[0]} failed: {reason}")
    return result.stdout


def _processor() -> str:
    """What `native` means here, since unlike machines may share a cache."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in info.read_text().splitlines() if line.startswith(names)}))


def _cache_folder() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _private_folder() if folder.startswith("~") else Path(folder) / "vimd_jax"  # "~" stays if there is no home


def _writable(folder: Path) -> Path:
    """The folder, or one for this process alone if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return _private_folder()
    return folder


@functools.cache
def _private_folder() -> Path:
    """A folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="vimd_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
