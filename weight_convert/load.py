"""Loads PyTorch files as networks of this library, or as variables of one."""

import hashlib
import json
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import safe_open

from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model, describe
from vimd_jax.models.network import Network, options_of, square, variable_shapes
from weight_convert.mapping import fill, tensors_for
from weight_convert.torch_file import load_torch_checkpoint

log = logging.getLogger(__name__)

_CLASSES = (".head.weight", ".conv_seg.weight")  # ends of the names of tensors with a row for each class
_MOST_NUMBERS = 2**31  # of parameters, 20 times those of Vim-base


def load_torch_model(path: Path, architecture: str, options: dict[str, Any], key: str | None = None) -> TrainedModel:
    """Loads a PyTorch file; the network has as many classes as the file's head, unless `options` set num_classes.

    Raises:
      ValueError: the file cannot be read (`CheckpointError`) or does not fit the network.
    """
    state_dict = load_torch_checkpoint(path, key=key)
    model = model_for(state_dict, architecture, options)
    variables = unflatten_dict(fill(state_dict, model, source=str(path)), sep="/")
    assumed = assumptions(model, options)
    for note in assumed:
        log.info("%s: assumed (not recorded in the file): %s", path, note)
    provenance = provenance_of([path], key) | {"assumed": assumed}
    return as_trained_model(model, options, variables, provenance, recorded_class_names(path))


def as_trained_model(
    model: Network,
    options: dict[str, Any],
    variables: dict[str, Any],
    provenance: dict[str, Any],
    recorded: tuple[str, ...] = (),
) -> TrainedModel:
    """Adds class names, numbered unless those recorded fit, and for a student the resolution of its images."""
    names = tuple(f"class {i}" for i in range(model.num_classes))
    names = recorded if len(recorded) == len(names) else names
    low_resolution = 0
    if model.image_size and "scale" in model.option_types({}):
        height, width = (side // options.get("scale", 4) for side in square(model.image_size))
        low_resolution = height if height == width else (height, width)
    return TrainedModel(model, variables, names, low_resolution, provenance=provenance)


def recorded_class_names(path: Path) -> tuple[str, ...]:
    """The class names in the metadata of a .safetensors file, as `weight_convert.export` writes it; or none."""
    if path.suffix != ".safetensors":
        return ()
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get("class_names", "")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def provenance_of(files: list[Path], key: str | None) -> dict[str, Any]:
    """Provenance of a converted network: version of this library, names and checksums of the files, key."""
    return {
        "library": f"vimd_jax {version('vimd-jax')}",
        "sources": [{"file": file.name, "sha256": file_sha256(file)} for file in files],
        "key": key,
    }


def torch_variables(
    path: Path, model: Network, flexible: bool = False, *, key: str | None = None
) -> dict[str, np.ndarray]:
    """Path → array for every variable of `model`, from a PyTorch file of it or of a composite with such a part.

    If `flexible`, the head and the positions keep the shapes of the file, see `fill`.
    """
    return fill(tensors_for(load_torch_checkpoint(path, key=key), model, str(path)), model, flexible, str(path))


def model_for(state_dict: dict[str, Any], architecture: str, options: dict[str, Any]) -> Network:
    """The network of this name and options, with as many classes as the file's head where num_classes is not given.

    Raises:
      ValueError: no such network, option or value, or a network too large for any memory.
    """
    model = create_model(architecture, **options)
    head = next((x for name, x in state_dict.items() if f".{name}".endswith(_CLASSES) and x.ndim), None)
    if head is not None and model.num_classes and "num_classes" not in options:
        if not head.shape[0]:
            raise ValueError(f"the head of the file has no classes: its shape is {head.shape}")
        model = create_model(architecture, **options | {"num_classes": head.shape[0]})
    try:
        numbers = sum(math.prod(leaf.shape) for leaf in variable_shapes(model).values())
    except OverflowError:
        numbers = math.inf
    if numbers > _MOST_NUMBERS:
        raise ValueError(
            f"a network of more than {_MOST_NUMBERS:,} numbers: check image_size, num_classes and other sizes"
        )
    return model


# Options that change what a network computes, but not its tensors.
_UNRECORDED = ("class_token", "directions", "input_normalization", "merge", "pool", "routing", "vertical_reverse")


def assumptions(model: Network, options: dict[str, Any]) -> list[str]:
    """Notes on options that PyTorch files of such a network do not record and that `options` do not set."""
    if model.parts:
        return [note for inner in model.parts.values() for note in assumptions(inner, options)]
    values = {
        name: getattr(model, name) for name in _UNRECORDED if name in options_of(type(model)).keys() - options.keys()
    }
    recorded = {
        "class_token": model.class_token in ("double", None),  # these have their own tensors
        "directions": values.get("directions") is None,  # all directions, each with a weight
        "pool": model.class_token is not None,  # with a class token, it is not used
    }
    notes = {name: f"is {value!r}" for name, value in values.items() if not recorded.get(name)}
    if "directions" in notes:
        notes["directions"] = f"are those of {describe(model)['architecture']}"
    return [f"{name} {note} (--option {name}=...)" for name, note in notes.items()]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
