"""The one format of a network on disk, which says what it holds. A run's best/, a conversion and an export write it.

    DIR/network.json                    architecture, options, class names, view, provenance, checksum
    DIR/variables-<checksum>.safetensors

network.json is replaced in one step and names its variables, so whoever reads finds the old network or the new one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save

from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.errors import CheckpointError
from vimd_jax.files import replace_file
from vimd_jax.models import create_model, describe
from vimd_jax.models.network import variable_shapes

FORMAT = "vimd_jax network 1"


def save_model(folder: Path, trained: TrainedModel) -> str:
    """Writes a network into a folder, in place of the one that is there; returns the checksum of its variables.

    A failure leaves the folder as it was.

    Raises:
      CheckpointError: a value is not finite.
      OSError: the folder cannot be written.
    """
    leaves = {path: np.ascontiguousarray(leaf) for path, leaf in flatten_dict(trained.variables, sep="/").items()}
    check_finite(leaves, f"the network for {folder}")
    checksum = checksum_of(trained.variables)
    content = {
        "format": FORMAT,
        **describe(trained.model),
        "class_names": list(trained.class_names),
        "view": {"low_resolution": trained.low_resolution, "crop": trained.crop},
        "provenance": trained.provenance,
        "variables": f"variables-{checksum[:16]}.safetensors",
        "checksum": checksum,
    }
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    variables, description = folder / content["variables"], folder / "network.json"
    try:
        replace_file(variables, save(leaves))
        replace_file(description, (json.dumps(content, indent=2) + "\n").encode())
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
    folder = path / "best" if (path / "best").is_dir() else path
    content = read_description(folder)
    try:
        model = create_model(content["architecture"], **content["options"])
        names, provenance = tuple(content["class_names"]), content["provenance"]
        low_resolution, crop = content["view"]["low_resolution"], content["view"]["crop"]
        checksum = content["checksum"]
        leaves = load_file(folder / content["variables"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/network.json is incomplete ({error}): write the checkpoint anew") from error
    except Exception as error:  # an option that is not valid, a file that is not there or damaged
        raise CheckpointError(f"{folder} is damaged ({' '.join(str(error).split())}): write it anew") from error
    variables = unflatten_dict(leaves, sep="/")
    if checksum_of(variables) != checksum:
        raise CheckpointError(f"{folder}/{content['variables']} is damaged, its checksum differs: write it anew")
    shapes = {path: leaf.shape for path, leaf in variable_shapes(model).items()}
    if shapes != {path: leaf.shape for path, leaf in leaves.items()}:
        raise CheckpointError(f"{folder}: network.json describes another network than its variables are of")
    if len(names) != model.num_classes:
        raise CheckpointError(
            f"{folder}: network.json names {len(names)} classes, but the network has {model.num_classes}"
        )
    return TrainedModel(model, variables, names, low_resolution, crop, provenance)


def read_description(folder: Path) -> dict[str, Any]:
    """The content of network.json.

    Raises:
      FileNotFoundError: the folder holds no network.
      CheckpointError: network.json is damaged, or was written by another version.
    """
    path = folder / "network.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such workdir or converted checkpoint")
    if not path.exists():
        old = (folder / "provenance.json").exists() or any(p.name.isdigit() for p in folder.iterdir())
        advice = "it is of an earlier version, train or convert again" if old else "train or convert one first"
        raise FileNotFoundError(f"{folder} holds no network (no network.json): {advice}")
    try:
        content = json.loads(path.read_text())
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: write the checkpoint anew") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has the format {found!r}, but this version reads {FORMAT!r}")
    return content


def check_finite(leaves: dict[str, np.ndarray], what: str) -> None:
    """Raises CheckpointError unless all numbers are finite: nothing that is ruined is saved."""
    for path, leaf in leaves.items():
        if not np.all(np.isfinite(leaf)):
            raise CheckpointError(f"{path} of {what} is not finite everywhere, so nothing was saved.")


def checksum_of(variables: dict[str, Any]) -> str:
    """SHA-256 over path, shape, dtype and bytes of every leaf, in the order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(variables, sep="/").items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(leaf)
    return digest.hexdigest()
