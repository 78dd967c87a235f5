"""The networks that a config asks for, and the weights that they start from."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vimd_jax.models import create_model
from vimd_jax.models.srvm import SRVM
from vimd_jax.training import checkpoints, workdirs
from vimd_jax.training.parallel import AXIS
from weight_convert import load_pretrained
from weight_convert.checkpoint import half
from weight_convert.finetune import fit
from weight_convert.mapping import input_images, variable_shapes

log = logging.getLogger(__name__)


_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_OVERRIDES = (
    *("embed_dim", "depth", "patch_size", "stride", "state_size", "class_token", "pool", "merge"),
    *("bimamba_type", "norm", "layer_scale", "rope", "paired_layers", "flip_tokens"),
)


def check_resolutions(config: ConfigDict) -> None:
    """Raises ValueError unless the SR network turns the low resolution into the high one."""
    high, low, name = config.dataset.high_resolution, config.dataset.low_resolution, config.sr.name
    scale = high // low if name == "bicubic" else int(name.removeprefix("srresnet_x"))
    if low * scale != high:
        raise ValueError(
            f"config.dataset.low_resolution {low} x {scale} (config.sr.name {name}) is not high_resolution {high}: "
            f"set config.dataset.low_resolution to {high // scale}, or choose another config.sr.name."
        )


def build_network(config: ConfigDict, num_classes: int) -> nn.Module:
    """The network that config.stage trains: SRResNet, HRVM-Net, or SRVM-Net."""
    if config.stage == "sr":
        return _build_sr(config)
    if config.stage == "teacher":
        return build_teacher(config, num_classes)
    sr = None if config.sr.name == "bicubic" else _build_sr(config)
    return SRVM(sr=sr, classifier=_build_classifier(config, "student", num_classes))


def build_teacher(config: ConfigDict, num_classes: int) -> nn.Module:
    """HRVM-Net: the classifier that sees the high-resolution picture."""
    return _build_classifier(config, "teacher", num_classes)


def _build_sr(config: ConfigDict) -> nn.Module:
    if config.sr.name == "bicubic":
        raise ValueError('config.sr.name is "bicubic", which has nothing to train: choose srresnet_x4.')
    axis = AXIS if config.stage == "sr" else None
    return create_model(config.sr.name, channels=config.sr.channels, num_blocks=config.sr.num_blocks, bn_axis_name=axis)


def _build_classifier(config: ConfigDict, role: str, num_classes: int) -> nn.Module:
    fields = config[role]
    if fields.dtype not in _DTYPES:
        raise ValueError(f"config.{role}.dtype is {fields.dtype!r}: choose {' or '.join(_DTYPES)}.")
    given = {name: fields[name] for name in _OVERRIDES if fields[name] is not None}
    overrides = {name: None if value == "none" else value for name, value in given.items()}
    return create_model(
        fields.name,
        num_classes=num_classes,
        image_size=config.dataset.high_resolution,
        drop_path_rate=fields.drop_path_rate,
        input_normalization=fields.input_normalization,
        dtype=_DTYPES[fields.dtype],
        remat=fields.remat,
        **overrides,
    )


def initial_weights(
    config: ConfigDict, network: nn.Module, teacher: nn.Module | None
) -> tuple[Any, Any, dict[str, Any]]:
    """What the stage starts from: (params to train, their batch statistics, variables of the frozen networks).

    Frozen are, in stage "student", the "sr" network ({} for bicubic) and, where it distils, the "teacher".
    """
    trained, frozen = network, {}
    if config.stage == "student":
        trained = network.classifier
        frozen["sr"] = {} if network.sr is None else _frozen_weights(config, "sr", network.sr)
        if teacher is not None:
            frozen["teacher"] = _frozen_weights(config, "teacher", teacher)
    if config[config.stage].init:
        variables = load_variables(config[config.stage].init, trained, fine_tune=True)
    else:
        images = input_images(trained)
        variables = jax.jit(trained.init)(jax.random.key(config.seed), jnp.zeros(images.shape, images.dtype))
    return variables["params"], variables.get("batch_stats", {}), frozen


def _frozen_weights(config: ConfigDict, role: str, model: nn.Module) -> Any:
    if not config[role].init:
        raise ValueError(
            f"config.{role}.init is empty, but a student learns with a trained {role} network: name the workdir of a "
            f'"{role}" run, a converted checkpoint or a PyTorch file.'
        )
    return load_variables(config[role].init, model)


def load_variables(path: str | Path, model: nn.Module, *, fine_tune: bool = False) -> Any:
    """Variables of `model` from a workdir (its best checkpoint), a converted checkpoint or a PyTorch file.

    Args:
      path: where they are. A student also gives its halves, the SR network or the classifier.
      model: the network to fill.
      fine_tune: adapt another class count (a new head) and another grid (resized positions), with a line in the log.

    Raises:
      FileNotFoundError, ValueError: nothing is there, or it does not fit the model; the message says what.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such workdir, converted checkpoint or PyTorch file.")
    if not workdirs.is_workdir(path):
        return load_pretrained(path, model, adapt=fine_tune)
    leaves = flatten_dict(half(checkpoints.load_best(path)[1], model), sep="/")
    shapes = variable_shapes(model)
    if leaves.keys() != shapes.keys():
        differing = ", ".join(sorted(leaves.keys() ^ shapes.keys())[:5])
        raise ValueError(f"{path} does not hold a {type(model).__name__} with these settings; differing: {differing}.")
    if fine_tune:
        leaves, notes = fit(leaves, model)
        for note in notes:
            log.info("%s: %s", path, note)
    _check_shapes(path, leaves, shapes)
    return unflatten_dict(leaves, sep="/")


def _check_shapes(path: Path, leaves: dict[str, Any], shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    wrong = [
        (name, leaves[name].shape, shape.shape) for name, shape in shapes.items() if leaves[name].shape != shape.shape
    ]
    if any(name.endswith("head/kernel") for name, *_ in wrong):
        name, found, expected = next(row for row in wrong if row[0].endswith("head/kernel"))
        raise ValueError(f"{path} tells {found[-1]} classes apart, but the data has {expected[-1]} classes.")
    if wrong:
        listed = "; ".join(f"{name} is {found}, expected {expected}" for name, found, expected in wrong[:5])
        raise ValueError(f"{path} has other sizes than the config asks for: {listed}.")


def load_run(workdir: Path) -> tuple[nn.Module, Any]:
    """The network that a run trained, and its best variables; raises FileNotFoundError where there are none."""
    num_classes = len(workdirs.read_class_names(workdir))
    return build_network(workdirs.read_config(workdir), num_classes), checkpoints.load_best(workdir)[1]


def count(params: Any) -> int:
    """Number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
