"""The experiments of the folder configs/ by name: `--config student_cub`, `from vimd_jax.configs import recipes`.

The folder stands beside the packages in a checkout; where the library is installed, it is a folder of this package.
"""

import difflib
import runpy
from pathlib import Path

from ml_collections import ConfigDict

_HERE = Path(__file__).parent
FOLDER = next(folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir())

# A module that has a path is a package: its modules are the files of that folder.
__path__ = [str(FOLDER)]


def find_config(text: str) -> str:
    """Finds a config file.

    Args:
      text: PATH or PATH:ARGUMENT; instead of a path also the name of a file in the folder, without its suffix.

    Returns:
      PATH or PATH:ARGUMENT of a file that is there.

    Raises:
      ValueError: neither such a file nor such a name.
    """
    path, colon, argument = text.partition(":")
    if Path(path).is_file():
        return text
    named = FOLDER / f"{path}.py"
    if not named.is_file():
        close = difflib.get_close_matches(Path(path).stem, [file.stem for file in FOLDER.glob("*.py")], n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{path} is neither a file nor the name of a config in {FOLDER}{guess}")
    return f"{named}{colon}{argument}"


def load_config(text: str) -> ConfigDict:
    """The config that `--config TEXT` would use, without other flags: see `find_config`."""
    path, _, argument = find_config(text).partition(":")
    return runpy.run_path(path)["get_config"](*([argument] if argument else []))
