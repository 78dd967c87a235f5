"""Keeps what JAX compiles on disk, so that a network starts in half the time from the second process on.

Programs are kept beside the C++ kernels, usually in ~/.cache/vimd_jax (see `kernels.build`), in a folder for each kind
of processor, since a program may use instructions that another one lacks. JAX removes those used longest ago.

Settings of JAX come first: `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=0` keeps
nothing.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import filelock
import jax

from kernels import build

# JAX's settings: by default, and here. Most networks are one program of 0.1 to 2 MB that compiles in seconds.
_SETTINGS = {
    "jax_compilation_cache_max_size": (-1, 512 * 2**20),  # bytes
    "jax_persistent_cache_min_compile_time_secs": (1.0, 0.1),
}


def keep_programs() -> None:
    """Makes JAX keep compiled programs, unless the user has decided about that, or no folder can be written."""
    chosen = jax.config.values
    if chosen["jax_compilation_cache_dir"] is not None or not chosen["jax_enable_compilation_cache"]:
        return
    with contextlib.suppress(OSError, NotImplementedError):  # a file system that is full, or has no locks
        if not (shared := build.shared_folder()):
            return
        folder = shared / f"programs-{hashlib.sha256(build.processor().encode()).hexdigest()[:16]}"
        folder.mkdir(mode=0o700, exist_ok=True)
        _remove_unfinished(folder)
        for name, (default, ours) in _SETTINGS.items():
            if chosen[name] == default and name.upper() not in os.environ:
                jax.config.update(name, ours)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _remove_unfinished(folder: Path) -> None:
    """Removes what a process that was killed has written of a program: JAX would never replace it.

    JAX writes a program, then the time of its last use, both under this lock.
    """
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=0):
        names = {path.name for path in folder.iterdir()}
        for name in names:
            if name.endswith("-cache") and f"{name.removesuffix('-cache')}-atime" not in names:
                (folder / name).unlink()
