"""Loading a network, or the variables for one: from a folder of this library's format or from a PyTorch file.

This is the one module that knows both formats.
"""

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.checkpoints.adapt import ADAPTABLE, fit
from vimd_jax.checkpoints.format import read_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import describe
from vimd_jax.models.network import variable_shapes
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.srvm import SRVM, part
from weight_convert.load import load_torch_model, torch_variables

log = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    architecture: str | None = None,
    *,
    options: dict[str, Any] | None = None,
    class_names: Iterable[str] | None = None,
    key: str | None = None,
) -> TrainedModel:
    """A network to use: from the workdir of a run, a converted or exported folder, or a PyTorch file.

    Args:
      path: the folder, or a `.pth` or `.safetensors` file.
      architecture: what a PyTorch file holds, one of `list_models()`. A folder knows it.
      options: of that architecture, where they differ from its own.
      class_names: for a file or folder that names none.
      key: the entry of a PyTorch file, e.g. "model_ema".

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: what is there cannot be read (`CheckpointError`), or does not fit what is asked for.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such workdir, converted checkpoint or PyTorch file")
    if path.is_file():
        if not architecture:
            raise ValueError(f"{path} does not say which network it holds: name its architecture (--model)")
        trained = load_torch_model(path, architecture, options or {}, key)
    else:
        if architecture or options:
            raise ValueError(f"{path} knows its network: leave out the architecture (--model) and the options")
        trained = read_model(path)
    if class_names is None:
        return trained
    names, expected = tuple(class_names), len(trained.class_names)
    if len(names) != expected:
        raise ValueError(f"{len(names)} class names were given, but {path} has {expected} classes")
    return dataclasses.replace(trained, class_names=names)


def load_variables(
    path: str | Path, model: nn.Module, *, adapt: bool = False, key: str | None = None, position_mode: str = "correct"
) -> dict[str, Any]:
    """Variables of `model` from a checkpoint of the same network, or of an SRVM-Net that the model is one part of.

    Args:
      path: a workdir, a converted or exported folder, or a PyTorch file.
      model: the network to fill.
      adapt: where the number of classes differs, start the head anew; where the grid of patches differs, resize the
        position embedding; log either. False: such a difference is an error too.
      key: the entry of a PyTorch file, e.g. "model_ema".
      position_mode: see `resize_position_embedding`.

    Raises:
      FileNotFoundError, ValueError: nothing is there, it cannot be read, or it holds another network.
    """
    path, grid = Path(path), None
    if path.is_file():
        leaves = torch_variables(path, model, flexible=True, key=key)
        if not adapt and all(leaves[leaf].shape == x.shape for leaf, x in variable_shapes(model).items()):
            return unflatten_dict(leaves, sep="/")  # for whatever grid: the file does not tell
    else:
        source, variables = _part_for(model, load_model(path))
        _check_same_network(path, source, model)
        leaves, grid = flatten_dict(variables, sep="/"), getattr(source, "grid", None)
    leaves, changes = fit(leaves, model, grid=grid, mode=position_mode, source=str(path))
    if changes and not adapt:
        raise ValueError(f"{path} does not fit the network: {'; '.join(change.difference for change in changes)}")
    for change in changes:
        log.info("%s: %s: %s", path, *change)
    return unflatten_dict(leaves, sep="/")


def _part_for(model: nn.Module, trained: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A network and its variables; of an SRVM-Net the part that `model` could be."""
    if not isinstance(trained.model, SRVM) or isinstance(model, SRVM):
        return trained.model, trained.variables
    name = "sr" if isinstance(model, SRResNet) else "classifier"
    return getattr(trained.model, name), part(trained.variables, name)


def _check_same_network(path: Path, source: nn.Module | None, model: nn.Module) -> None:
    """Refuses a network of another class, or one that differs in an option that `fit` cannot make up for."""
    if type(source) is not type(model):
        found = "no such network" if source is None else f"a {type(source).__name__}"
        raise ValueError(f"{path} holds {found}, but the model is a {type(model).__name__}")
    there, here = describe(source)["options"], describe(model)["options"]
    different = [option for option in here if there.get(option) != here[option] and option not in ADAPTABLE]
    if different:
        options = ", ".join(f"{o} is {there.get(o)!r} there, {here[o]!r} in the model" for o in different)
        raise ValueError(f"{path} holds another network: {options}")
