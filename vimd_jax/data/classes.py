"""The values of label maps: classes, whose names a text file holds, and pixels without a label."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimd_jax.errors import DatasetError, printable

IGNORED = 255  # the value of pixels without a label, in the maps that sources yield
MOST_CLASSES = 255


class Classes(NamedTuple):
    """The classes of label maps: their names, and their colours (classes, 3) uint8, None where a file has none."""

    names: tuple[str, ...]
    colours: np.ndarray | None = None


def read_classes(path: Path) -> Classes:
    """Class names from a text file, one a line, each followed by its colour where the file has them: "sky #4682b4".

    Raises:
        DatasetError: no class, too many, one twice, or colours for some of them only.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as text: {printable(error)}") from None
    matches = [re.fullmatch(r"(.+?)(?:\s+#([0-9a-fA-F]{6}))?", line) for line in lines]
    names, colours = tuple(match[1] for match in matches), [match[2] for match in matches if match[2]]
    if not 0 < len(names) <= MOST_CLASSES:
        raise DatasetError(f"{path}: {len(names)} classes; there must be from 1 to {MOST_CLASSES}")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DatasetError(f"{path}: the class {printable(twice[0])!r} stands there twice")
    if len(colours) not in (0, len(names)):
        raise DatasetError(f"{path}: {len(colours)} of {len(names)} classes have a colour; give it to all or none")
    return Classes(names, np.array([list(bytes.fromhex(x)) for x in colours], np.uint8) if colours else None)
