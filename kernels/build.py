"""C++ kernels, compiled for this machine when they are first needed and made known to XLA.

The compiler is `$CXX` (with `$CXXFLAGS`), or else the first of c++, g++ and clang++. Libraries are kept in
`$XDG_CACHE_HOME/vimd_jax` (usually ~/.cache/vimd_jax), each under a name derived from everything that goes into it.
One that another user could have written is not loaded; a folder that others can write is not used.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jaxlib.version

# Explicit flags instead of -ffast-math, which would let the compiler assume that NaN and infinity do not happen.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared"]

COMPILE_SECONDS = 300  # a compiler that takes longer is stopped
KEPT = 8  # libraries of a source file, the last ones used

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
    except OSError:  # damaged, or where nothing may be executed
        with contextlib.suppress(OSError):
            library.unlink()
        return ctypes.CDLL(str(_compile(source, macros, _private_folder() / library.name)))


def _build(source: Path, macros: tuple[str, ...] = ()) -> Path:
    """Path of the compiled library, from the cache if it is there."""
    key = hashlib.sha256("\0".join(_ingredients(source, macros)).encode()).hexdigest()
    cached = _cache_folder() / f"{source.parent.name}-{key[:16]}.so"
    if _trusted(cached.parent) and _trusted(cached):
        with contextlib.suppress(OSError):
            os.utime(cached)  # the last one used
        return cached
    library = _writable(cached.parent) / cached.name
    if not _trusted(library):
        _compile(source, macros, library)
        _prune(library)
    return library


def _compile(source: Path, macros: tuple[str, ...], library: Path) -> Path:
    logging.getLogger(__name__).info("compiling %s into %s (once)", source.name, library)
    # Renaming is atomic: even with several builds at the same time, nobody ever loads half a file.
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        built = Path(work, library.name)
        _run([*_command(macros), str(source), "-o", str(built)])
        built.chmod(0o755)
        built.replace(library)
    return library


def _prune(library: Path) -> None:
    """Removes the libraries of the same source that were used longest ago."""
    with contextlib.suppress(OSError):  # others may do the same
        names = library.parent.glob(library.name.rsplit("-", 1)[0] + "-*.so")
        for old in sorted(names, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
            old.unlink()


def _command(macros: tuple[str, ...]) -> list[str]:
    if not (command := compiler()):
        raise RuntimeError("no C++ compiler: install g++ or clang++, or set CXX")
    tune = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    include = f"-I{jax.ffi.include_dir()}"
    return [*shlex.split(command), *FLAGS, tune, *macros, include, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _ingredients(source: Path, macros: tuple[str, ...]) -> list[str]:
    """All that a library depends on."""
    command = _command(macros)
    version = _run([*shlex.split(compiler()), "--version"])
    system = [*platform.libc_ver(), platform.system(), _processor()]
    return [source.read_text(), jaxlib.version.__version__, *command, version, *system]


def _run(command: list[str]) -> str:
    # A session of its own, so that what the compiler starts ends with it.
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise RuntimeError(f"{command[0]} took over {COMPILE_SECONDS} seconds and was stopped") from None
    if process.returncode:
        reason = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
        raise RuntimeError(f"{command[0]} failed: {reason}")
    return output


def _processor() -> str:
    """What `native` means here, since unlike machines may share a cache."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return _run(["sysctl", "machdep.cpu", "hw.optional"]) if platform.system() == "Darwin" else platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in info.read_text().splitlines() if line.startswith(names)}))


def _cache_folder() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _private_folder() if folder.startswith("~") else Path(folder) / "vimd_jax"  # "~" stays if there is no home


def _trusted(path: Path) -> bool:
    """Whether a file or folder exists that nobody but this user and root can have written."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid in (0, os.getuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _writable(folder: Path) -> Path:
    """The folder, or one for this process alone if it cannot be written, or others can write it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(folder.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))  # whatever the umask
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return _private_folder()
    return folder if _trusted(folder) else _private_folder()


@functools.cache
def _private_folder() -> Path:
    """A folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="vimd_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
