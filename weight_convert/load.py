"""A PyTorch file as a network of this library, or as the variables of one."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from vimd_jax.checkpoints.network import TrainedModel
from vimd_jax.models import create_model
from vimd_jax.models.network import square
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.srvm import SRVM
from weight_convert.mapping import fill
from weight_convert.torch_file import load_torch_checkpoint


def load_torch_model(path: Path, architecture: str, options: dict[str, Any], key: str | None = None) -> TrainedModel:
    """A PyTorch file as it is: the network has as many classes as the file's head, unless `options` say otherwise.

    Raises:
      ValueError: the file cannot be read (`CheckpointError`) or does not fit the network.
    """
    state_dict = load_torch_checkpoint(path, key=key)
    model = model_for(state_dict, architecture, options)
    variables = unflatten_dict(fill(state_dict, model, source=str(path)), sep="/")
    return as_trained_model(model, options, variables, provenance_of([path], key))


def as_trained_model(
    model: nn.Module, options: dict[str, Any], variables: dict[str, Any], provenance: dict[str, Any]
) -> TrainedModel:
    """With numbered classes, and for a student the low resolution of the images that it enlarges, by `scale`."""
    low = square(model.classifier.image_size)[0] // options.get("scale", 4) if isinstance(model, SRVM) else 0
    count = getattr(getattr(model, "classifier", model), "num_classes", 0)
    return TrainedModel(model, variables, tuple(f"class {i}" for i in range(count)), low, provenance=provenance)


def provenance_of(files: list[Path], key: str | None) -> dict[str, Any]:
    """Where a converted network comes from."""
    return {
        "library": f"vimd_jax {version('vimd-jax')}",
        "sources": [{"file": file.name, "sha256": file_sha256(file)} for file in files],
        "key": key,
    }


def torch_variables(
    path: Path, model: nn.Module, flexible: tuple[str, ...] = (), *, key: str | None = None
) -> dict[str, np.ndarray]:
    """Path → array of every variable of `model` from a PyTorch file, or from its part of an SRVM-Net's file.

    Leaves whose path ends with one of `flexible` keep the shape they come with.
    """
    state_dict = load_torch_checkpoint(path, key=key)
    prefix = "sr." if isinstance(model, SRResNet) else "classifier."
    # VMamba calls its head a classifier: all names must say that they belong to a half.
    if not isinstance(model, SRVM) and all(name.startswith(("sr.", "classifier.")) for name in state_dict):
        state_dict = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
    return fill(state_dict, model, flexible, str(path))


def model_for(state_dict: dict[str, Any], architecture: str, options: dict[str, Any]) -> nn.Module:
    """The network of that name and options, with as many classes as the head has where the options do not say.

    Raises:
      ValueError: no such network, option or value.
    """
    model = create_model(architecture, **options)
    bias = next((x for name, x in state_dict.items() if f".{name}".endswith(".head.bias")), None)
    counts = hasattr(getattr(model, "classifier", model), "num_classes")
    if bias is None or not counts or "num_classes" in options:
        return model
    return create_model(architecture, **options | {"num_classes": bias.size})


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
