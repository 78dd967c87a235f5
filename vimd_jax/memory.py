"""Keeps freed memory in the process, so that a training step does not ask the system for its arrays again."""

import contextlib
import ctypes

# Options of glibc's mallopt and their values: no block in a mapping of its own, nothing given back, one heap for all
# threads (others are limited to 64 MB, beyond which blocks are mapped all the same).
_OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed; call it before JAX computes. Only glibc can; elsewhere nothing changes.

    XLA allocates the temporary arrays of a program at every call. As mappings of their own the system would clear each
    of their pages anew in every step, which takes a fifth of the processor time of a Vim-tiny's training step.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _OPTIONS.values():
            mallopt(option, value)
