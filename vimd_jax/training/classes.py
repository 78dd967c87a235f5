"""The classes of a checkpoint and those of the data: compared by name, in whatever order they are."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.checkpoints.adapt import HEAD
from vimd_jax.checkpoints.description import read_description
from vimd_jax.checkpoints.format import folder_of
from vimd_jax.data.source import composed
from vimd_jax.errors import printable

log = logging.getLogger(__name__)

Variables = dict[str, Any]


def in_order(variables: Variables, path: Path, names: Sequence[str]) -> Variables:
    """The variables of a checkpoint with the outputs of its heads in the order of the data.

    Args:
      variables: of a network with an output for each class.
      path: the checkpoint.
      names: of the classes of the data.

    Raises:
      ValueError: the checkpoint is for other classes; the message names the first one.
    """
    known, names = _class_names(path), [composed(name) for name in names]
    if known == names or not names:
        return variables
    if known is None:
        log.info("%s does not name its classes: they are taken to be those of the data, in the same order.", path)
        return variables
    numbers = [str(i) for i in range(len(known))]
    if sorted(names) == sorted(numbers):
        log.info("%s: the data number their classes, which are taken for its classes in their order.", path)
        known = numbers
    if sorted(known) != sorted(names):
        raise ValueError(f"{path} is for other classes than the data: {_difference(known, names)}.")
    if known == names:
        return variables
    log.info("%s: its classes have another order than the data's; they are matched by name.", path)
    index = {name: i for i, name in enumerate(known)}
    return _with_heads(variables, lambda _, leaf: np.take(leaf, [index[name] for name in names], axis=-1))


def in_order_or_anew(
    variables: Variables, path: Path, names: Sequence[str], fresh: Callable[[], Variables]
) -> Variables:
    """The same for the start of a training; for other classes than the data's, the heads are those of `fresh()`."""
    known = _class_names(path)
    if known is None or len(known) != len(names):
        return variables  # nothing is known, or it is adapted already
    try:
        return in_order(variables, path, names)
    except ValueError as error:
        log.info("%s The head is initialised anew and needs training.", error)
    leaves = flatten_dict(fresh(), sep="/")
    return _with_heads(variables, lambda name, _: leaves[name])


def description(path: Path) -> dict[str, Any] | None:
    """The description of a checkpoint, see `read_description`; None for a PyTorch file."""
    if path.is_file():
        return None
    return read_description(folder_of(path))


def _class_names(path: Path) -> list[str] | None:
    """The class names of a checkpoint; None for a PyTorch file, and where conversion has numbered them."""
    known = description(path)
    names = known["class_names"] if known else []
    return None if names == [f"class {i}" for i in range(len(names))] else [composed(name) for name in names]


def _difference(known: list[str], names: list[str]) -> str:
    if gone := sorted(set(known) - set(names)):
        return f"{printable(repr(gone[0]))} is not among them"
    return f"it does not know {printable(repr(sorted(set(names) - set(known))[0]))}"


def _with_heads(variables: Variables, change: Callable[[str, Any], Any]) -> Variables:
    leaves = flatten_dict(variables, sep="/")
    return unflatten_dict({p: change(p, x) if p.endswith(HEAD) else x for p, x in leaves.items()}, sep="/")
