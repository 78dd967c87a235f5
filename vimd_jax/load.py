"""Loading a network, or the variables for one: from a folder of this library's format or from a PyTorch file.

This is the one module that knows both formats.
"""

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.checkpoints.adapt import ADAPTABLE, Change, adapted_leaves, segmenter_leaves
from vimd_jax.checkpoints.format import read_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.compilation_cache import keep_programs
from vimd_jax.models import describe
from vimd_jax.models.network import Network, part, variable_shapes
from weight_convert.hub import architecture_of, published, resolve
from weight_convert.load import load_torch_model, torch_variables
from weight_convert.mapping import fill, tensors_for
from weight_convert.tables import recorded_options, tensors_by_part
from weight_convert.torch_file import load_torch_checkpoint

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

    One that is named `pretrained` sees images as published: its crop, and whether it normalises them. From here on, JAX
    keeps what it compiles on disk, see `vimd_jax.compilation_cache`.

    Args:
      path: the folder, or a `.pth` or `.safetensors` file, in which `~` is the home directory; or the name of a file
        elsewhere, see `weight_convert.hub`.
      architecture: of a PyTorch file, one of `list_models()`. A folder knows its own.
      options: of that architecture, where they differ from its own.
      class_names: for a file or folder that names none.
      key: the entry of a PyTorch file, e.g. "model_ema".

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: what is there cannot be read (`CheckpointError`), or does not fit what is asked for.
    """
    keep_programs()
    architecture = architecture or architecture_of(path)
    entry = published(path, architecture)
    options = (entry.options if entry else {}) | (options or {})
    path = resolve(path, architecture).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such workdir, converted checkpoint or PyTorch file")
    if path.is_dir():
        if architecture or options or key:
            raise ValueError(f"{path} knows its network: leave out the architecture (--model), the options and the key")
        trained = read_model(path)
    elif not path.is_file():
        raise ValueError(f"{path}: not a regular file, so not a checkpoint")
    elif not architecture:
        raise ValueError(f"{path} does not say which network it holds: name its architecture (--model)")
    else:
        trained = load_torch_model(path, architecture, options, key)
        trained = dataclasses.replace(trained, crop=entry.crop) if entry else trained
    if class_names is None:
        return trained
    names, expected = tuple(class_names), len(trained.class_names)
    if len(names) != expected:
        raise ValueError(f"{len(names)} class names were given, but {path} has {expected} classes")
    return dataclasses.replace(trained, class_names=names)


def load_variables(
    path: str | Path, model: Network, *, adapt: bool = False, key: str | None = None, position_mode: str = "correct"
) -> dict[str, Any]:
    """Variables of `model` from a checkpoint of the same network, or of a composite that has such a part.

    A segmenter can also start from the classifier that its backbone is the trunk of, if `adapt` is set.

    Args:
      path: as in `load_model`.
      model: the network to fill.
      adapt: where the number of classes differs, start the head anew, or leave it out if `model` has none; where the
        grid of patches differs, resize the position embedding; log either. False: such a difference is an error too.
      key: the entry of a PyTorch file, e.g. "model_ema".
      position_mode: see `resize_position_embedding`.

    Raises:
      FileNotFoundError, ValueError: nothing is there, it cannot be read, or it holds another network.
    """
    name, origin = str(path), None
    path = resolve(name, describe(model)["architecture"]).expanduser()
    if adapt and "backbone" in model.parts and (classifier := _classifier(path, model, key)):
        leaves, changes = segmenter_leaves(*classifier, model, position_mode, name)
        return _logged(name, leaves, changes)
    if path.is_file():
        leaves = torch_variables(path, model, flexible=True, key=key)
        shapes = {name: leaf.shape for name, leaf in variable_shapes(model).items()}
        if not adapt and shapes == {name: leaf.shape for name, leaf in leaves.items()}:
            return unflatten_dict(leaves, sep="/")  # for whatever grid: the file does not record it
    else:
        origin, variables = _network_like(model, load_model(path))
        _check_same_network(path, origin, model)
        leaves = flatten_dict(variables, sep="/")
    leaves, changes = adapted_leaves(leaves, model, origin=origin, mode=position_mode, source=name)
    if changes and not adapt:
        raise ValueError(f"{name} does not fit the network: {'; '.join(change.difference for change in changes)}")
    return _logged(name, leaves, changes)


def _logged(name: str, leaves: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    for change in changes:
        log.info("%s: %s: %s", name, *change)
    return unflatten_dict(leaves, sep="/")


def _classifier(path: Path, model: Network, key: str | None) -> tuple[dict[str, Any], Network] | None:
    """The leaves and the network of a classifier of the class of a segmenter's backbone; None where it is a segmenter.

    What a PyTorch file does not record, it has in common with the backbone; class tokens stand in the middle.
    """
    backbone = model.parts["backbone"]
    if not path.is_file():
        origin, variables = _network_like(backbone, trained := load_model(path))
        if trained.model.dense:
            return None
        if type(origin) is not type(backbone):
            raise ValueError(f"{path} holds a {type(origin).__name__}, but the backbone is a {type(backbone).__name__}")
        return flatten_dict(variables, sep="/"), origin
    state_dict = load_torch_checkpoint(path, key=key)
    if "" not in tensors_by_part(state_dict, model.parts):
        return None
    state_dict = tensors_for(state_dict, backbone, str(path))
    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    recorded = recorded_options(shapes, type(backbone))
    options = {name: recorded[name] for name in ("class_token", "rope") if name in recorded}
    if "norm_f.weight" in state_dict and "norm_f.bias" not in state_dict and hasattr(backbone, "normalization"):
        options["normalization"] = "rms"
    origin = backbone.clone(**options)
    return fill(state_dict, origin, flexible=True, source=str(path)), origin


def _network_like(model: Network, trained: TrainedModel) -> tuple[Network, dict[str, Any]]:
    """The network of a checkpoint and its variables; of a composite the first part of the class of `model`, if any."""
    networks = [(trained.model, trained.variables)]
    for network, variables in networks:
        if type(network) is type(model):
            return network, variables
        networks += [(inner, part(variables, name)) for name, inner in network.parts.items()]
    return networks[0]


def _check_same_network(path: Path, source: Network, model: Network) -> None:
    """Refuses a network of another class, or one that differs in an option that adapting cannot make up for."""
    if type(source) is not type(model):
        raise ValueError(f"{path} holds a {type(source).__name__}, but the model is a {type(model).__name__}")
    there, here = describe(source)["options"], describe(model)["options"]
    different = [option for option in here if there.get(option) != here[option] and option not in ADAPTABLE]
    if different:
        options = ", ".join(f"{o} is {there.get(o)!r} there, {here[o]!r} in the model" for o in different)
        raise ValueError(f"{path} holds a different network: {options}")
