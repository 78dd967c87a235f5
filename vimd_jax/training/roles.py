"""The networks that a config asks for, and the variables that they start from."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from vimd_jax.checkpoints.adapt import MODES
from vimd_jax.config import DERIVED, STAGES, Stage, given_options
from vimd_jax.load import load_variables
from vimd_jax.models import create_model, model_options
from vimd_jax.models.network import input_images, join, square, variable_shapes
from vimd_jax.models.srvm import SRVM, bicubic
from vimd_jax.tasks.task import Task, unit
from vimd_jax.training import classes, parallel
from vimd_jax.training.parallel import AXIS
from vimd_jax.training.workdirs import init_source, is_begun
from weight_convert.hub import resolve

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a stage.

    Attributes:
      stage: the row of `STAGES`.
      outputs: names of the trained network's outputs.
      trained: the one whose parameters change; where images are restored first, the network that reads those.
      restorer: the frozen network that restores them; None: bicubic interpolation, or none is restored.
      teacher: the frozen teacher, where the loss needs it.
    """

    stage: Stage
    outputs: tuple[str, ...]
    trained: nn.Module
    restorer: nn.Module | None = None
    teacher: nn.Module | None = None

    @property
    def task(self) -> Task:
        """The task of the stage."""
        return self.stage.task

    @property
    def product(self) -> nn.Module:
        """The network that comes out: what is evaluated and saved."""
        return SRVM(sr=self.restorer, classifier=self.trained) if self.stage.restorer else self.trained

    @property
    def view(self) -> str:
        """The images that the product reads, "low" or "high"."""
        return "low" if self.stage.restorer else self.task.view

    @property
    def views(self) -> tuple[str, ...]:
        """The images of a batch that training reads, "low" or "high" or both."""
        read = {self.view, *self.task.truth} | ({"high"} if self.teacher else set())
        return tuple(view for view in ("low", "high") if view in read)

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The frozen networks by role."""
        by_role = {self.stage.restorer: self.restorer, self.stage.teacher: self.teacher}
        return {role: model for role, model in by_role.items() if model is not None}

    def read(self, workdir: Path) -> list[str]:
        """The roles whose weights are read from elsewhere: in a run that continues, those of frozen networks only."""
        return [*self.frozen, *([] if is_begun(workdir) else [self.stage.trained])]

    def product_variables(self, trained: Variables, frozen: dict[str, Variables]) -> Variables:
        """The variables of the product, from those of the trained network and of the frozen ones."""
        if not self.stage.restorer:
            return trained
        restorer = {} if self.restorer is None else {"sr": frozen[self.stage.restorer]}
        return join(restorer | {"classifier": trained})

    def images(self, frozen: dict[str, Variables], batch: dict[str, jax.Array]) -> jax.Array:
        """The images of a batch that the trained network reads, in [0, 1]; restored ones without a gradient."""
        images = unit(batch[self.view])
        if not self.stage.restorer:
            return images
        if self.restorer is None:
            return bicubic(images, self.trained.image_size)
        return jax.lax.stop_gradient(self.restorer.apply(frozen[self.stage.restorer], images))


def build_networks(config: ConfigDict, class_names: Sequence[str]) -> Networks:
    """The networks of config.stage, for a dataset of these classes.

    Raises:
      ValueError: no such network or option, or the restorer does not turn the low resolution into the high one.
    """
    stage = STAGES[config.stage]
    trained = _build(config, stage.trained, class_names, train=True)
    restorer = teacher = None
    if stage.restorer and config[stage.restorer].name != "bicubic":
        restorer = _build(config, stage.restorer, class_names)
    if stage.teacher and stage.task.needs_teacher(config):
        teacher = _build(config, stage.teacher, class_names)
    networks = Networks(stage, stage.task.outputs(tuple(class_names)), trained, restorer, teacher)
    if networks.view == "low":
        _check_resolutions(config, stage.restorer or stage.trained, restorer if stage.restorer else trained)
    return networks


def _build(config: ConfigDict, role: str, class_names: Sequence[str], train: bool = False) -> nn.Module:
    """The network of one section; while it trains, its batch statistics are averaged over the devices."""
    section = config[role]
    _check_section(role, section)
    outputs = STAGES[role].task.outputs(tuple(class_names))
    size = config.dataset.high_resolution
    image_size = size if isinstance(size, int) else tuple(size)
    derived = {"num_classes": len(outputs), "image_size": image_size} if outputs else {}
    if train and "bn_axis_name" in model_options(section.name):
        derived["bn_axis_name"] = AXIS
    try:
        return create_model(section.name, **derived, **given_options(section))
    except ValueError as error:
        raise ValueError(f"config.{role}.{error}") from error


def _check_section(role: str, section: ConfigDict) -> None:
    """Raises ValueError unless the named network fits the role and has the options that are set."""
    names = STAGES[role].task.networks
    if section.name not in names:
        close = difflib.get_close_matches(section.name, names, n=3) or names
        raise ValueError(f"config.{role}.name is {section.name!r}: choose one of {', '.join(close)}.")
    allowed = set(model_options(section.name)) - set(DERIVED)
    for option in sorted(set(given_options(section)) - allowed):
        raise ValueError(
            f"config.{role}.{option}: {section.name} has no such option, choose from {', '.join(sorted(allowed))}"
        )


def _check_resolutions(config: ConfigDict, role: str, restorer: nn.Module | None) -> None:
    high, low, name = config.dataset.high_resolution, config.dataset.low_resolution, config[role].name
    scale = square(high)[0] // square(low)[0] if restorer is None else restorer.scale
    if tuple(scale * side for side in square(low)) != square(high):
        sides = tuple(side // max(scale, 1) for side in square(high))
        fitting = sides[0] if isinstance(high, int) else sides
        raise ValueError(
            f"config.dataset.low_resolution {low} x {scale} (config.{role}.name {name}) is not high_resolution {high}: "
            f"set config.dataset.low_resolution to {fitting}, or choose another config.{role}.name."
        )


def check_sources_of_weights(config: ConfigDict, networks: Networks, workdir: Path, made_before: set[Path]) -> None:
    """Raises unless every network that needs weights has a path to them, and something is there or will be.

    Weights with a name are downloaded, see `weight_convert.hub`. A run that continues does not read again what its
    network began with.

    Args:
      config: of one stage.
      networks: of the stage.
      workdir: its folder.
      made_before: workdirs that earlier stages of the same command make.
    """
    for role in networks.read(workdir):
        section, init = config[role], init_source(config, role, workdir)
        if role in networks.frozen and not init:
            raise ValueError(
                f"config.{role}.init is empty, but a {config.stage} needs a trained {role} network: name the workdir "
                f'of a "{role}" run, a converted checkpoint or a PyTorch file.'
            )
        path = _local(init, section.name)
        if init and not path.exists() and path.resolve() not in made_before:
            raise FileNotFoundError(f"config.{role}.init: {path}: no such workdir, converted checkpoint or file.")
        if section.init_key and (not init or path.is_dir()):
            raise ValueError(f"config.{role}.init_key is {section.init_key!r}, but only a PyTorch file has keys.")
        if section.init_position_mode not in MODES:
            raise ValueError(
                f"config.{role}.init_position_mode is {section.init_position_mode!r}: it must be {' or '.join(MODES)}."
            )


def _local(init: str, architecture: str) -> Path:
    """The file or folder of weights for an architecture, downloaded if they have a name."""
    return resolve(init, architecture).expanduser()


def initial_variables(config: ConfigDict, networks: Networks, workdir: Path) -> tuple[Variables, dict[str, Variables]]:
    """The variables that the stage starts from: of the trained network, and by role those of the frozen ones.

    Of several processes only the first one reads files. The others get zeros of the same shapes, see `from_first`; and
    so does the trained network of a run that continues from a checkpoint.

    Raises:
      ValueError, FileNotFoundError: weights cannot be read, do not fit, or are for other classes.
    """

    def load(role: str, model: nn.Module, adapt: bool = False) -> tuple[Variables, Path]:
        section, init = config[role], init_source(config, role, workdir)
        name = f"pretrained:{section.name}" if init == "pretrained" else init
        options = {"key": section.init_key or None, "position_mode": section.init_position_mode}
        return load_variables(name, model, adapt=adapt, **options), _local(init, section.name)

    trained, role = networks.trained, networks.stage.trained
    if not parallel.is_first():
        return zeros(trained), {role: zeros(model) for role, model in networks.frozen.items()}
    frozen = {}
    for name, model in networks.frozen.items():
        frozen[name], path = load(name, model)
        if name == networks.stage.teacher and config.loss.logits_weight:
            frozen[name] = classes.in_order(frozen[name], path, networks.outputs)
    if is_begun(workdir):
        return zeros(trained), frozen

    def fresh() -> Variables:
        images = input_images(trained)
        return jax.jit(trained.init)(jax.random.key(config.seed), jnp.zeros(images.shape, images.dtype))

    if not config[role].init:
        return fresh(), frozen
    return classes.in_order_or_anew(*load(role, trained, adapt=True), networks.outputs, fresh), frozen


def zeros(model: nn.Module) -> Variables:
    """Variables of the right shapes."""
    leaves = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in variable_shapes(model).items()}
    return unflatten_dict(leaves, sep="/")


def count(params: Any) -> int:
    """Number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
