"""Reading and writing files safely: nobody ever reads half of one, and nothing hangs on what is no file."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: a reader finds the old content or the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:  # that of a write names no file
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        scratch.unlink(missing_ok=True)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file for reading. A pipe, which may never have content, is refused instead of waited for.

    Raises:
      OSError: there is no such file, it is not a regular one, or it may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number, text = (errno.EISDIR, None) if stat.S_ISDIR(mode) else (errno.EINVAL, "not a regular file")
        raise OSError(number, text or os.strerror(number), os.fspath(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
      OSError: see `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes:,} bytes", os.fspath(path))
    return content
