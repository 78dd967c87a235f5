"""Compiles C++ kernels for this machine when they are first needed, and registers them with XLA.

`python -m kernels.build` compiles them ahead of time, for machines without a compiler: one is needed only for a library
that is not in the cache. It is `$CXX` (with `$CXXFLAGS`), or else the first of c++, g++ and clang++.

Libraries are kept in `$XDG_CACHE_HOME/vimd_jax` (usually ~/.cache/vimd_jax), or in a folder of this user among the
temporary files where that cannot be written. Their names are derived from what decides the result: the source, the
headers, the flags, the processor, the C library and the version of XLA's foreign function interface. With `-march` or
`-mcpu` in `$CXXFLAGS` the library is for that processor instead of this one, and loads wherever `$CXXFLAGS` is the
same.

A library that another user could have written is not loaded, and a folder that others can write is not used.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax

# Explicit flags instead of -ffast-math, which would let the compiler assume that NaN and infinity do not happen.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared"]

HEADERS = sorted(Path(__file__).parent.glob("*.h"))  # that sources may include

COMPILE_SECONDS = 300  # a compiler that takes longer is stopped
KEPT = 8  # libraries of a source file, the last ones used

loaded: list[Path] = []  # the libraries that this process has registered

_lock = threading.Lock()


def register(source: Path, handlers: tuple[str, ...], **macros: int) -> str | None:
    """Makes the handlers in a C++ file, compiled with the given macros, available to `jax.ffi` on CPUs.

    The first call may compile, which takes some seconds. Returns None, or one line that explains why it failed.
    """
    with _lock:
        return _register(source, handlers, tuple(f"-D{name}={value}" for name, value in macros.items()))


def compiler() -> str | None:
    """Returns the command that compiles here, if there is one."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def shared_folder() -> Path | None:
    """Returns the folder where the processes of this user keep what they compile; None if there is nowhere to write."""
    return next(filter(_writable, _cache_folders()), None)


def processor() -> str:
    """Describes this machine's processor, since unlike machines may share a cache."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return _run(["sysctl", "machdep.cpu", "hw.optional"]) if platform.system() == "Darwin" else platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in info.read_text().splitlines() if line.startswith(names)}))


def main() -> int:
    """Compiles every operation's C++ into the cache and prints the paths of the libraries."""
    from kernels.build import loaded
    from kernels.choice import OPERATIONS

    for operation in OPERATIONS.values():
        if "native" in operation.names and (reason := operation.why_unavailable("native", None, "cpu")):
            print(f"{operation.title}: {reason}", file=sys.stderr)
            return 1
    print(*loaded, sep="\n")
    return 0


@functools.cache
def _register(source: Path, handlers: tuple[str, ...], macros: tuple[str, ...] = ()) -> str | None:
    try:
        path, library = _load(source, macros)
        for handler in handlers:
            jax.ffi.register_ffi_target(handler, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
    except Exception as error:  # a missing or broken compiler shows in many ways
        return " ".join(str(error).split())
    loaded.append(path)
    return None


def _load(source: Path, macros: tuple[str, ...] = ()) -> tuple[Path, ctypes.CDLL]:
    path = _build(source, macros)
    try:
        return path, ctypes.CDLL(str(path))
    except OSError:  # damaged, or where nothing may be executed
        with contextlib.suppress(OSError):
            path.unlink()
        path = _compile(source, macros, _private_folder() / path.name)
        return path, ctypes.CDLL(str(path))


def _build(source: Path, macros: tuple[str, ...] = ()) -> Path:
    """Returns the path of the compiled library, from a cache if it is there."""
    key = hashlib.sha256("\0".join(_ingredients(source, macros)).encode()).hexdigest()
    name = f"{source.parent.name}-{key[:16]}.so"
    for folder in _cache_folders():
        if _trusted(folder) and _trusted(folder / name):
            with contextlib.suppress(OSError):
                os.utime(folder / name)  # the last one used
            return folder / name
    library = (shared_folder() or _private_folder()) / name
    _compile(source, macros, library)
    _prune(library)
    return library


def _compile(source: Path, macros: tuple[str, ...], library: Path) -> Path:
    if not (command := compiler()):
        raise RuntimeError("no C++ compiler: install g++ or clang++, or set CXX")
    logging.getLogger(__name__).info("compiling %s into %s (once)", source.name, library)
    include = f"-I{jax.ffi.include_dir()}"
    # Compiled outside the cache, so that a build that is killed leaves nothing there. Renaming is atomic: even with
    # several builds at the same time, nobody ever loads half a file.
    with tempfile.TemporaryDirectory(prefix="vimd_jax-build-") as work:
        built = Path(work, library.name)
        _run([*shlex.split(command), *_flags(macros), include, str(source), "-o", str(built)])
        built.chmod(0o755)
        with tempfile.TemporaryDirectory(dir=library.parent) as beside:
            Path(shutil.copy(built, beside)).replace(library)
    return library


def _prune(library: Path) -> None:
    """Removes the libraries of the same source that were used longest ago."""
    with contextlib.suppress(OSError):  # others may do the same
        names = library.parent.glob(library.name.rsplit("-", 1)[0] + "-*.so")
        for old in sorted(names, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
            old.unlink()


def _flags(macros: tuple[str, ...]) -> list[str]:
    flags = [*FLAGS, *macros, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    if _for_this_processor():
        flags.append("-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native")
    return flags


def _for_this_processor() -> bool:
    return not re.search("-m(arch|cpu)=", os.environ.get("CXXFLAGS", ""))


def _ingredients(source: Path, macros: tuple[str, ...]) -> list[str]:
    """Lists all that decides what a library does."""
    interface = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    versions = re.findall(r"#define (XLA_FFI_API_(?:MAJOR|MINOR) \d+)", interface)
    system = [*platform.libc_ver(), platform.system(), platform.machine()]
    target = [processor()] if _for_this_processor() else []
    return [*(file.read_text() for file in [source, *HEADERS]), *_flags(macros), *versions, *system, *target]


def _run(command: list[str]) -> str:
    # In a new session, so that the processes the compiler starts can be stopped with it.
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


def _cache_folders() -> list[Path]:
    """Lists the folders that processes share, the preferred one first."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folders = [] if cache.startswith("~") else [Path(cache) / "vimd_jax"]  # "~" stays if there is no home
    return [*folders, Path(tempfile.gettempdir()) / f"vimd_jax-{os.getuid()}"]


def _trusted(path: Path) -> bool:
    """Tells whether a file or folder exists that nobody but this user and root can have written."""
    try:
        status, link = path.stat(), path.lstat()
    except OSError:
        return False
    ours = {status.st_uid, link.st_uid} <= {0, os.getuid()}
    return ours and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _writable(folder: Path) -> bool:
    """Creates a folder; tells whether it can be written here and by nobody else."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.lstat().st_uid == os.getuid():  # not through somebody else's link
            folder.chmod(folder.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))  # whatever the umask was
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return _trusted(folder)


@functools.cache
def _private_folder() -> Path:
    """Creates a folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="vimd_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


if __name__ == "__main__":
    sys.exit(main())
