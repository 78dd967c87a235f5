"""Writing files so that nobody ever reads half of one."""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: a reader finds the old content or the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
