"""The description of a network on disk, network.json: what its fields are, and the limits of a network that is built.

A description may come from a stranger, so everything about it is checked before anything is made of it.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vimd_jax.errors import CheckpointError, printable
from vimd_jax.files import read_regular
from vimd_jax.models.network import Network
from vimd_jax.models.scan_order import DIRECTIONS

FORMAT = "vimd_jax network 2"
_UNSEALED = "vimd_jax network 1"  # without a checksum of the description; that of the variables covers nothing else

_MOST_BYTES = 4 * 2**20
_MOST_NUMBER = 2**20  # of an option
_MOST_ITEMS = 128  # of a list in an option: layers, or directions of a layer
_MOST_STAGES = 8
_MOST_PIXELS = 2**22  # of an image
_MOST_PATCHES = 2**15
_MOST_STEPS = 2**22  # places that a network scans of one image, over all layers and directions

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_option(value: Any, nesting: int = 2) -> bool:
    if isinstance(value, list):
        return nesting > 0 and len(value) <= _MOST_ITEMS and all(_is_option(item, nesting - 1) for item in value)
    if isinstance(value, int | float):
        return abs(value) <= _MOST_NUMBER
    return value is None or _is_text(value)


def _is_low_resolution(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return value == 0 or all(_is_whole(side, 1, 2**12) for side in sides)


def _is_range(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value)
    return numbers and -_MOST_NUMBER <= value[0] < value[1] <= _MOST_NUMBER


# Every field: whether a value is valid, and in words what is. Fields of fields are joined by dots.
_FIELDS: dict[str, tuple[Check, str]] = {
    "architecture": (_is_text, "a name"),
    "options": (lambda x: isinstance(x, dict), "options of a network by name"),
    "class_names": (
        lambda x: isinstance(x, list) and all(map(_is_text, x)) and len(set(x)) == len(x),
        "a list of names, each once",
    ),
    "view": (lambda x: isinstance(x, dict), "low_resolution and crop"),
    "view.low_resolution": (_is_low_resolution, "0, or the side or [height, width] in pixels"),
    "view.crop": (lambda x: type(x) in (int, float) and 0 < x <= 1, "a number above 0 and up to 1"),
    "view.value_range": (_is_range, "two numbers, the smaller first"),
    "provenance": (lambda x: isinstance(x, dict), "values by name"),
    "variables": (lambda x: _matches(r"variables-[0-9a-f]{16}\.safetensors", x), "the name of a file beside this one"),
    "checksum": (lambda x: _matches(r"[0-9a-f]{64}", x), "a SHA-256"),
}
_OPTIONAL = ("view.value_range",)
_OPTION = f"a number up to {_MOST_NUMBER:,}, a text or a short list of them"
_SEAL = "description_checksum"


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def sealed(content: dict[str, Any]) -> bytes:
    """A description as it is written: with its format and its own checksum.

    Raises:
      CheckpointError: it could not be read again.
    """
    content = json.loads(json.dumps({"format": FORMAT} | content))
    text = (json.dumps(content | {_SEAL: digest(content)}, indent=2) + "\n").encode()
    problem = _problem(content) or (len(text) > _MOST_BYTES and f"it has more than {_MOST_BYTES:,} bytes")
    if problem:
        raise CheckpointError(f"the network cannot be saved with this description: {problem}")
    return text


def read_description(folder: Path) -> dict[str, Any]:
    """The content of network.json.

    Raises:
      FileNotFoundError: the folder holds no network.
      CheckpointError: network.json is damaged, was changed since it was written, or was written by another version.
    """
    path = folder / "network.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such workdir or converted checkpoint")
    if not path.exists():
        old = (folder / "provenance.json").exists() or any(p.name.isdigit() for p in folder.iterdir())
        advice = "it is of an earlier version, train or convert again" if old else "train or convert one first"
        raise FileNotFoundError(f"{folder} holds no network (no network.json): {advice}")
    try:
        content = json.loads(read_regular(path, _MOST_BYTES))
        found, seal = content["format"], content.pop(_SEAL, None)
        actual = digest(content)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: save the network again") from error
    if found not in (FORMAT, _UNSEALED):
        raise CheckpointError(f"{path} has the format {printable(repr(found))}, but this version reads {FORMAT!r}")
    if problem := _problem(content):
        raise CheckpointError(f"{path} {problem}: save the network again")
    if seal != actual and (found, seal) != (_UNSEALED, None):
        raise CheckpointError(
            f"{path} was changed since it was written, its checksum differs: undo the change or save the network again "
            "(to rename classes: save_model(NEW, load_model(OLD, class_names=[...])))"
        )
    return content


def covers_options(content: dict[str, Any]) -> bool:
    """Whether the checksum of a network covers its options beside its variables."""
    return content["format"] == FORMAT


def _problem(content: dict[str, Any]) -> str | None:
    """The first field that is not valid, in words."""
    present = content | {f"view.{name}": value for name, value in _as_dict(content.get("view")).items()}
    if missing := [name for name in _FIELDS if name not in (*present, *_OPTIONAL)]:
        return f"is incomplete (no {missing[0]})"
    if unknown := [name for name in present if name not in (*_FIELDS, "format")]:
        return f"has an unknown field {printable(repr(unknown[0]))}"
    for name, (is_valid, expected) in _FIELDS.items():
        if name in present and not is_valid(present[name]):
            return f"has {name} {printable(repr(present[name]), 100)}, expected {expected}"
    for name, value in content["options"].items():
        if not _is_option(value):
            return f"has options.{printable(name)} {printable(repr(value), 100)}, expected {_OPTION}"
    return None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def digest(content: Any) -> str:
    """SHA-256 of JSON values, in whatever order dictionaries are and whatever space is between."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_size(model: Network) -> None:
    """Raises ValueError for a network whose building alone would need seconds or much memory."""
    pixels, depths = math.prod(model.input_size), getattr(model, "depths", ())
    patches = math.prod(model.grid) if model.grid else pixels // 256  # of stages the third has most blocks
    directions = getattr(model, "directions", (("forward", "backward"),)) or (DIRECTIONS,)
    steps = patches * len(directions[0]) * (getattr(model, "depth", 1) + sum(depths))
    for what, value, most in (
        ("pixels in an image", pixels, _MOST_PIXELS),
        ("patches in an image", patches, _MOST_PATCHES),
        ("stages", len(depths), _MOST_STAGES),
        ("steps in its scans of an image", steps, _MOST_STEPS),
    ):
        if value > most:
            raise ValueError(f"a network with {value:,} {what}, more than {most:,}: check its sizes")
    for part in model.parts.values():
        check_size(part)
