"""Distilling hidden states between networks of different shapes: our own addition, not in the paper of ViMD.

Each layer of the student is paired with the teacher's layer of the same relative depth. Its tokens, without class
tokens, are a map of features; that is resized to the teacher's grid and projected to the teacher's channels by a linear
map of its own, which is trained with the student and left out of what is saved as best.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from vimd_jax.models.network import input_images
from vimd_jax.models.positions import class_token_positions
from vimd_jax.training.roles import Networks

NAME = "hidden_map"  # of the maps' parameters beside those of the student


def add(config: ConfigDict, networks: Networks, variables: dict[str, Any]) -> dict[str, Any]:
    """Variables of a student with its maps, where config.loss.hidden_map asks for them."""
    if config.stage != "student" or not config.loss.hidden_map or networks.teacher is None:
        return variables
    student, teacher = (_feature_maps(model, _hidden_shapes(model)) for model in (networks.trained, networks.teacher))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    maps = {}
    for i, j in enumerate(_partners(len(student), len(teacher))):
        shape = student[i].shape[-1], teacher[j].shape[-1]
        maps[f"layer_{i}"] = {"kernel": nn.initializers.lecun_normal()(jax.random.fold_in(key, i), shape)}
    return {**variables, "params": {**variables["params"], NAME: maps}}


def apply(
    params: dict[str, Any],
    networks: Networks,
    student_hidden: jax.Array | Sequence[jax.Array],
    teacher_hidden: jax.Array | Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each layer of the student its mapped features and the teacher's, (batch, rows, columns, teacher's channels).

    Args:
      params: of the student, with its maps.
      networks: of the stage.
      student_hidden: `features["hidden_states"]` of the student.
      teacher_hidden: the same of the teacher.
    """
    student = _feature_maps(networks.trained, student_hidden)
    teacher = _feature_maps(networks.teacher, teacher_hidden)
    targets = [teacher[j] for j in _partners(len(student), len(teacher))]
    mapped = []
    for i, (features, target) in enumerate(zip(student, targets)):
        if features.shape[1:3] != target.shape[1:3]:
            features = jax.image.resize(features, (*target.shape[:3], features.shape[-1]), "linear")
        mapped.append(features @ params[NAME][f"layer_{i}"]["kernel"])
    return mapped, targets


def _partners(student_depth: int, teacher_depth: int) -> list[int]:
    """For each layer of a student the teacher's layer that is as far from the first to the last."""
    depths = (np.arange(student_depth) + 1) / student_depth
    return [max(0, round(depth * teacher_depth) - 1) for depth in depths]


def _feature_maps(model: nn.Module, hidden: Any) -> list[Any]:
    """Every layer's features as maps, without class tokens."""
    if isinstance(hidden, tuple | list):
        return list(hidden)
    rows, columns = model.grid
    kept = np.delete(np.arange(hidden.shape[2]), class_token_positions(model.class_token, rows * columns))
    return [jnp.take(layer, kept, axis=1).reshape(-1, rows, columns, layer.shape[-1]) for layer in hidden]


def _hidden_shapes(model: nn.Module) -> Any:
    def hidden(key):
        images = jnp.zeros(input_images(model).shape)
        return model.init_with_output(key, images, return_features=True)[0][1]["hidden_states"]

    return jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), jax.eval_shape(hidden, jax.random.key(0)))
