"""The one format of a network on disk, which says what it holds. A run's best/, a conversion and an export write it.

    DIR/network.json                    architecture, options, class names, view, provenance, checksums
    DIR/variables-<checksum>.safetensors

network.json is replaced in one step and names its variables, so whoever reads finds the old network or the new one.
Its `checksum` is that of the variables and of the options, which together decide what the network computes; its
`description_checksum` is that of everything in it. To change class names, load the network with `class_names` and save
it.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save

from vimd_jax.checkpoints.description import check_size, covers_options, digest, read_description, sealed
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.errors import CheckpointError, printable
from vimd_jax.files import open_regular, replace_file
from vimd_jax.models import create_model, describe
from vimd_jax.models.network import square, variable_shapes

_MOST_HEADER_BYTES = 2 * 2**20  # of a .safetensors file


def save_model(folder: str | Path, trained: TrainedModel) -> str:
    """Writes a network into a folder, in place of the one that is there; returns its checksum.

    A failure leaves the folder as it was.

    Raises:
      CheckpointError: a value is not finite, or the network could not be read again.
      OSError: the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    leaves = {path: np.ascontiguousarray(leaf) for path, leaf in flatten_dict(trained.variables, sep="/").items()}
    check_finite(leaves, f"the network for {folder}")
    check_size(trained.model)
    network = describe(trained.model)
    checksum = checksum_of(trained.variables, network)
    content = {
        **network,
        "class_names": list(trained.class_names),
        "view": {"low_resolution": trained.low_resolution, "crop": trained.crop}
        | ({"value_range": trained.value_range} if trained.value_range else {}),
        "provenance": trained.provenance,
        "variables": f"variables-{checksum[:16]}.safetensors",
        "checksum": checksum,
    }
    text = sealed(content)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    variables, description = folder / content["variables"], folder / "network.json"
    try:
        replace_file(variables, save(leaves))
        replace_file(description, text)
    except BaseException:
        if not (description.exists() and variables.name in description.read_text()):
            variables.unlink(missing_ok=True)
            if is_new:
                folder.rmdir()
        raise
    for old in folder.glob("*variables-*"):  # the last network's, and what a killed process left
        if old.name != content["variables"]:
            old.unlink()
    return checksum


def read_model(path: Path) -> TrainedModel:
    """The network in a folder of this format, or in the best/ of a workdir.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it is damaged, or not what its description says.
    """
    folder = folder_of(path)
    content = read_description(folder)
    names, view = tuple(content["class_names"]), content["view"]
    try:
        model = create_model(content["architecture"], **content["options"])
        check_size(model)
        shapes = variable_shapes(model)
        leaves = _read_tensors(folder / content["variables"], {p: (x.shape, x.dtype) for p, x in shapes.items()})
    except Exception as error:  # an option that is not valid, a file that is not there or damaged
        cause = printable(" ".join(str(error).split()), None) or type(error).__name__
        raise CheckpointError(f"{folder} is damaged ({cause}): save the network again") from error
    variables = unflatten_dict(leaves, sep="/")
    network = (
        {"architecture": content["architecture"], "options": content["options"]} if covers_options(content) else None
    )
    if checksum_of(variables, network) != content["checksum"]:
        raise CheckpointError(
            f"{folder}/{content['variables']} is damaged, its checksum differs: save the network again"
        )
    if len(names) != model.num_classes:
        raise CheckpointError(
            f"{folder}: network.json names {len(names)} classes, but the network has {model.num_classes}"
        )
    low = view["low_resolution"]
    if low and model.image_size and np.any(np.array(low) > square(model.image_size)):
        raise CheckpointError(
            f"{folder}: network.json has a low resolution of {low}, but the network reads {model.image_size}"
        )
    low = tuple(low) if isinstance(low, list) else low
    value_range = tuple(view.get("value_range", ()))
    return TrainedModel(model, variables, names, low, view["crop"], content["provenance"], value_range)


def folder_of(path: Path) -> Path:
    """The folder of a network: the best/ of a workdir, or the folder itself."""
    return path / "best" if (path / "best").is_dir() else path


def _read_tensors(path: Path, expected: dict[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
    """The tensors of a file, which must be those expected, by path their shape and dtype."""
    with open_regular(path) as file:
        header = int.from_bytes(file.read(8), "little")
        if header > min(_MOST_HEADER_BYTES, os.fstat(file.fileno()).st_size):
            raise CheckpointError(f"{path.name} is truncated")
    with safe_open(path, framework="numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if found != {name: shape for name, (shape, _) in expected.items()}:
            raise CheckpointError("network.json describes a different network than its variables are of")
        leaves = {name: file.get_tensor(name) for name in found}
    if any(leaf.dtype != expected[name][1] for name, leaf in leaves.items()):
        raise CheckpointError("its variables have another dtype than the network's")
    return leaves


def check_finite(leaves: dict[str, np.ndarray], what: str) -> None:
    """Raises CheckpointError unless all numbers are finite: invalid values are never saved."""
    for path, leaf in leaves.items():
        if not np.all(np.isfinite(leaf)):
            raise CheckpointError(f"{path} of {what} is not finite everywhere, so nothing was saved.")


def checksum_of(variables: dict[str, Any], content: Any = None) -> str:
    """SHA-256 over path, shape, dtype and bytes of every leaf, in the order of the paths, and of JSON values beside."""
    sha256 = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(variables, sep="/").items()):
        leaf = np.ascontiguousarray(leaf)
        sha256.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        sha256.update(leaf)
    if content is not None:
        sha256.update(digest(content).encode())
    return sha256.hexdigest()
