"""Converted checkpoints: `DIR/variables` (Orbax) and `DIR/provenance.json`, which says what they are and where from."""

import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.models import create_model
from weight_convert.finetune import FLEXIBLE, fit
from weight_convert.mapping import fill, nested, variable_shapes
from weight_convert.torch_file import CheckpointError, load_torch_checkpoint

log = logging.getLogger(__name__)

_HALVES = {"SRResNet": "sr", "Vim": "classifier"}  # of SRVM-Net, by the kind of network


def load_pretrained(
    path: str | Path,
    model: nn.Module,
    *,
    adapt: bool = True,
    key: str | None = None,
    position_mode: str = "correct",
) -> dict[str, Any]:
    """Variables to start `model` from, whatever the number of classes and the grid of patches they were trained with.

    Args:
      path: a directory written by `python -m weight_convert.convert`, or a `.pth` or `.safetensors` file as
        `load_torch_checkpoint` reads it. Of an SRVM-Net either half can be started alone.
      model: the network to start.
      adapt: where the model's number of classes differs, initialise the head anew; where its grid of patches differs,
        resize the position embedding; log either. False: such a difference is an error too.
      key: the entry of a PyTorch file, e.g. "model_ema".
      position_mode: see `resize_position_embedding`.

    Returns:
      The variables, as `model.init` would return them.

    Raises:
      ValueError: the file cannot be read (`CheckpointError`), or is of a network that differs otherwise.
    """
    path, grid = Path(path), None
    if path.is_dir():
        source, variables, _ = load_converted(path)
        variables = half(variables, model)
        source = getattr(source, _half_name(model), source)
        _check_same_network(path, source, model)
        leaves, grid = flatten_dict(variables, sep="/"), getattr(getattr(source, "classifier", source), "grid", None)
    else:
        state_dict, prefix = load_torch_checkpoint(path, key=key), f"{_half_name(model)}."
        if any(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        leaves = fill(state_dict, model, FLEXIBLE, str(path))
    leaves, notes = fit(leaves, model, grid=grid, mode=position_mode)
    if notes and not adapt:
        raise ValueError(f"{path}: fits the model only after changes: {'; '.join(notes)}")
    for note in notes:
        log.info("%s: %s", path, note)
    return nested(leaves)


def half(variables: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Of the variables of an SRVM-Net those of one of its halves, if that is what `model` is; others as they are."""
    name = _half_name(model)
    if name not in variables["params"]:
        return variables
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}


def _half_name(model: nn.Module) -> str:
    return _HALVES.get(type(model).__name__, "none")


def _check_same_network(path: Path, source: nn.Module, model: nn.Module) -> None:
    """Refuses what the shapes of the variables would not show, or show less clearly."""
    if type(source) is not type(model):
        raise ValueError(f"{path}: holds a {type(source).__name__}, but the model is a {type(model).__name__}")
    if different := sorted(set(variable_shapes(source)) ^ set(variable_shapes(model))):
        raise ValueError(f"{path}: the networks differ in {', '.join(different[:20])}")
    source, model = getattr(source, "classifier", source), getattr(model, "classifier", model)
    for field in ("class_token", "pool", "merge", "rope", "paired_layers", "flip_tokens", "input_normalization"):
        if getattr(source, field, None) != getattr(model, field, None):
            raise ValueError(
                f"{path}: {field} is {getattr(source, field)!r} there, {getattr(model, field)!r} in the model"
            )


def save_converted(directory: str | Path, variables: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Writes a converted checkpoint; the directory appears when it is complete.

    Args:
      directory: must not exist yet.
      variables: as `model.init` returns them.
      provenance: JSON values; "model" and "options" are the arguments of `create_model`.

    Raises:
      ValueError: the directory exists.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise ValueError(f"output: {directory} exists; name another directory or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # As NumPy arrays, so that no device of this machine is part of the checkpoint.
            leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}
            checkpointer.save(scratch / "variables", unflatten_dict(leaves, sep="/"))
        provenance = provenance | {"checksum": checksum(variables)}
        (scratch / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        scratch.chmod(0o755)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_converted(directory: str | Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A converted checkpoint as (model, variables, provenance).

    Raises:
      CheckpointError: the directory is no converted checkpoint, or its variables are not those that were written.
    """
    directory = Path(directory).absolute()
    try:
        provenance = json.loads((directory / "provenance.json").read_text())
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in provenance["options"].items()}
        model = create_model(provenance["model"], **options)
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{directory}: not a directory that weight_convert.convert wrote ({reason})") from error
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            variables = checkpointer.restore(directory / "variables")
    except Exception as error:  # Orbax's errors have no common type
        raise CheckpointError(f"{directory}/variables: damaged, convert again ({type(error).__name__})") from error
    if checksum(variables) != provenance.get("checksum"):
        raise CheckpointError(f"{directory}/variables: the checksum in provenance.json is another; convert again")
    shapes = {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}
    if shapes != {path: leaf.shape for path, leaf in variable_shapes(model).items()}:
        raise CheckpointError(f"{directory}: provenance.json names another network than its variables are of")
    return model, nested(flatten_dict(variables, sep="/")), provenance


def checksum(variables: dict[str, Any]) -> str:
    """SHA-256 over path, shape, dtype and bytes of every leaf, in the order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(variables, sep="/").items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(leaf)
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, as sha256sum prints it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
