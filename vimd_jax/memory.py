"""The memory of a program: large pages for its arrays, and nothing kept that only compilation needed."""

import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path

_SETTING = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_large_pages() -> None:
    """Starts this program again with large pages, if it has none and can have them; call it before JAX computes.

    XLA allocates the temporary arrays of a step anew every time, and the system clears each of their pages: in pages of
    4 kB, up to a third of the time of a training step on a CPU. Many systems give large pages only to those that ask;
    glibc asks from version 2.35 on, by a setting that it reads when a process starts.
    """
    with contextlib.suppress(OSError):  # there is no such file, or the program cannot be found again
        given, debugged = _SETTING.keys() & os.environ.keys(), sys.gettrace() is not None
        if "[madvise]" in _KERNEL.read_text() and _glibc() >= (2, 35) and not given and not debugged:
            os.execve(sys.executable, sys.orig_argv, os.environ | _SETTING)


def give_back() -> None:
    """Returns to the system what has been freed, of which compiling a large step leaves a gigabyte. For glibc alone."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _glibc() -> tuple[int, ...]:
    """The version of glibc, (0,) for another C library."""
    name = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    return tuple(map(int, re.findall(r"\d+", name or "0")))
