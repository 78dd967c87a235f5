"""A PyTorch file as a network of this library, or as the variables of one."""

import hashlib
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model
from vimd_jax.models.network import square, variable_shapes
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.srvm import SRVM
from weight_convert.mapping import fill
from weight_convert.tables import halves
from weight_convert.torch_file import load_torch_checkpoint

log = logging.getLogger(__name__)

_MOST_NUMBERS = 2**31  # 20 times Vim-base


def load_torch_model(path: Path, architecture: str, options: dict[str, Any], key: str | None = None) -> TrainedModel:
    """A PyTorch file as it is: the network has as many classes as the file's head, unless `options` say otherwise.

    Raises:
      ValueError: the file cannot be read (`CheckpointError`) or does not fit the network.
    """
    state_dict = load_torch_checkpoint(path, key=key)
    model = model_for(state_dict, architecture, options)
    variables = unflatten_dict(fill(state_dict, model, source=str(path)), sep="/")
    for assumed in assumptions(model, options):
        log.info("%s: assumed, as the file does not tell: %s", path, assumed)
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
    path: Path, model: nn.Module, flexible: bool = False, *, key: str | None = None
) -> dict[str, np.ndarray]:
    """Path → array of every variable of `model` from a PyTorch file, or from its part of an SRVM-Net's file.

    If `flexible`, the leaves of `adapt.FLEXIBLE` keep the shape they come with.
    """
    state_dict = load_torch_checkpoint(path, key=key)
    if not isinstance(model, SRVM) and (parts := halves(state_dict)).keys() != {""}:
        state_dict = parts.get("sr" if isinstance(model, SRResNet) else "classifier", {}) | parts.get("", {})
    return fill(state_dict, model, flexible, str(path))


def model_for(state_dict: dict[str, Any], architecture: str, options: dict[str, Any]) -> nn.Module:
    """The network of that name and options, with as many classes as the head has where the options do not say.

    Raises:
      ValueError: no such network, option or value, or a network too large for any memory.
    """
    model = create_model(architecture, **options)
    head = next((x for name, x in state_dict.items() if f".{name}".endswith(".head.weight") and x.ndim), None)
    counts = hasattr(getattr(model, "classifier", model), "num_classes")
    if head is not None and counts and "num_classes" not in options:
        model = create_model(architecture, **options | {"num_classes": head.shape[0]})
    try:
        numbers = sum(math.prod(leaf.shape) for leaf in variable_shapes(model).values())
    except OverflowError:
        numbers = math.inf
    if numbers > _MOST_NUMBERS:
        raise ValueError(f"a network of more than {_MOST_NUMBERS:,} numbers: check image_size, num_classes and sizes")
    return model


def assumptions(model: nn.Module, options: dict[str, Any]) -> list[str]:
    """What no PyTorch file of such a network tells, and `options` do not say."""
    has = {name: getattr(getattr(model, "classifier", model), name, None) for name in ("class_token", "merge")}
    told = ("double", None)  # class tokens that have other tensors
    return [
        f"{name} is {has[name]!r} (--option {name}=...)"
        for name in sorted(has.keys() - options)
        if has[name] not in told
    ]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
