"""The networks that a config asks for, and the variables that they start from."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from vimd_jax.config import DERIVED, STAGES, given_options
from vimd_jax.load import load_variables
from vimd_jax.models import CLASSIFIERS, SR_NETWORKS, create_model, model_options
from vimd_jax.models.network import input_images, options_of, variable_shapes
from vimd_jax.models.srvm import SRVM, bicubic, join
from vimd_jax.training import parallel
from vimd_jax.training.parallel import AXIS
from vimd_jax.training.workdirs import init_path

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a stage.

    Attributes:
      trained: the one whose parameters change; of a student its classifier.
      reads_low: whether the images are low-resolution ones: in stages "sr" and "student".
      is_student: whether the trained network reads what an SR network restores.
      sr: the frozen SR network of a student; None restores by bicubic interpolation.
      teacher: the frozen teacher of a student that distils.
    """

    trained: nn.Module
    reads_low: bool = False
    is_student: bool = False
    sr: nn.Module | None = None
    teacher: nn.Module | None = None

    @property
    def product(self) -> nn.Module:
        """The network that comes out: what is evaluated and saved."""
        return SRVM(self.sr, self.trained) if self.is_student else self.trained

    @property
    def views(self) -> tuple[str, ...]:
        """The images of a batch that training reads, "low" or "high" or both."""
        low = ("low",) if self.reads_low else ()
        return low if self.is_student and self.teacher is None else (*low, "high")

    def product_variables(self, trained: Variables, frozen: dict[str, Variables]) -> Variables:
        """The variables of the product, from those of the trained network and of the frozen ones."""
        return join(frozen.get("sr"), trained) if self.is_student else trained

    def restore(self, frozen: dict[str, Variables], images: jax.Array) -> jax.Array:
        """What a student's classifier reads: low-resolution images, enlarged, without a gradient."""
        if self.sr is None:
            return bicubic(images, self.trained.image_size)
        return jax.lax.stop_gradient(self.sr.apply(frozen["sr"], images))


def build_networks(config: ConfigDict, num_classes: int) -> Networks:
    """The networks of config.stage.

    Raises:
      ValueError: no such network or option, or the SR network does not turn the low resolution into the high one.
    """
    sr = None
    if "sr" in STAGES[config.stage]:
        sr = None if config.sr.name == "bicubic" else _build(config, "sr", train=config.stage == "sr")
        _check_resolutions(config, sr)
    if config.stage == "sr":
        if sr is None:
            raise ValueError('config.sr.name is "bicubic", which has nothing to train: choose srresnet_x4.')
        return Networks(sr, reads_low=True)
    trained = _build(config, config.stage, num_classes, train=True)
    if config.stage != "student":
        return Networks(trained)
    teacher = _build(config, "teacher", num_classes) if _distils(config) else None
    return Networks(trained, reads_low=True, is_student=True, sr=sr, teacher=teacher)


def _build(config: ConfigDict, role: str, num_classes: int | None = None, train: bool = False) -> nn.Module:
    """The network of one section; while it trains, its batch statistics are averaged over the devices."""
    section = config[role]
    _check_section(role, section)
    derived = {} if num_classes is None else {"num_classes": num_classes, "image_size": config.dataset.high_resolution}
    try:
        model = create_model(section.name, **derived, **given_options(section))
    except ValueError as error:
        raise ValueError(f"config.{role}.{error}") from error
    return model.clone(bn_axis_name=AXIS) if train and "bn_axis_name" in options_of(type(model)) else model


def _check_section(role: str, section: ConfigDict) -> None:
    """Raises ValueError unless the named network fits the role and has the options that are set."""
    names = SR_NETWORKS if role == "sr" else CLASSIFIERS
    if section.name not in names:
        close = difflib.get_close_matches(section.name, names, n=3) or names
        raise ValueError(f"config.{role}.name is {section.name!r}: choose one of {', '.join(close)}.")
    allowed = set(model_options(section.name)) - set(DERIVED)
    for option in sorted(set(given_options(section)) - allowed):
        raise ValueError(
            f"config.{role}.{option}: {section.name} has no such option, choose from {', '.join(sorted(allowed))}"
        )


def _check_resolutions(config: ConfigDict, sr: nn.Module | None) -> None:
    high, low, name = config.dataset.high_resolution, config.dataset.low_resolution, config.sr.name
    scale = high // max(low, 1) if sr is None else sr.scale
    if low < 1 or low * scale != high:
        raise ValueError(
            f"config.dataset.low_resolution {low} x {scale} (config.sr.name {name}) is not high_resolution {high}: "
            f"set config.dataset.low_resolution to {high // scale}, or choose another config.sr.name."
        )


def check_sources_of_weights(config: ConfigDict, workdir: Path, made_before: set[Path]) -> None:
    """Raises unless every network that needs weights is told where they are, and something is there or will be.

    Args:
      config: of one stage.
      workdir: its folder.
      made_before: workdirs that earlier stages of the same command make.
    """
    for role in STAGES[config.stage]:
        init, frozen = init_path(config, role, workdir), role != config.stage
        wanted = config.sr.name != "bicubic" if role == "sr" else not frozen or _distils(config)
        if not wanted:
            continue
        if frozen and not init:
            raise ValueError(
                f"config.{role}.init is empty, but a student needs a trained {role} network: name the workdir of a "
                f'"{role}" run, a converted checkpoint or a PyTorch file.'
            )
        if init and not init.exists() and init.resolve() not in made_before:
            raise FileNotFoundError(f"config.{role}.init: {init}: no such workdir, converted checkpoint or file.")


def _distils(config: ConfigDict) -> bool:
    return bool(config.loss.logits_weight or config.loss.hidden_weight)


def initial_variables(config: ConfigDict, networks: Networks, workdir: Path) -> tuple[Variables, dict[str, Variables]]:
    """What the stage starts from: the variables of the trained network, and by role those of the frozen ones.

    Of several processes only the first one reads files. The others get zeros of the same shapes, see `from_first`.
    """
    frozen = {role: getattr(networks, role) for role in ("sr", "teacher") if getattr(networks, role) is not None}
    if not parallel.is_first():
        return zeros(networks.trained), {role: zeros(model) for role, model in frozen.items()}
    frozen = {role: load_variables(init_path(config, role, workdir), model) for role, model in frozen.items()}
    trained, init = networks.trained, init_path(config, config.stage, workdir)
    if init:
        return load_variables(init, trained, adapt=True), frozen
    images = input_images(trained)
    return jax.jit(trained.init)(jax.random.key(config.seed), jnp.zeros(images.shape, images.dtype)), frozen


def zeros(model: nn.Module) -> Variables:
    """Variables of the right shapes."""
    leaves = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in variable_shapes(model).items()}
    return unflatten_dict(leaves, sep="/")


def count(params: Any) -> int:
    """Number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
