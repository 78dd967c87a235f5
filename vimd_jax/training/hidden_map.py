"""Distilling hidden states between networks of different shapes: our own addition, not in the paper of ViMD.

Each layer of the student is paired with the teacher's layer of the same relative depth. Its tokens, without class
tokens, are a map of features; that is resized to the teacher's grid and projected to the teacher's channels by a linear
map of its own, which is trained with the student and left out of what is saved as best.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from vimd_jax.models.network import input_images
from vimd_jax.models.positions import class_token_positions
from vimd_jax.tasks.task import Output
from vimd_jax.training.roles import Networks

NAME = "hidden_map"  # of the maps' parameters beside those of the student


def add(config: ConfigDict, networks: Networks, variables: dict[str, Any]) -> dict[str, Any]:
    """Variables of a student with its maps, where config.loss.hidden_map asks for them."""
    if networks.teacher is None or not config.loss.hidden_map:
        return variables
    student, teacher = (_map_shapes(model) for model in (networks.trained, networks.teacher))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    maps = {}
    for i, j in enumerate(_partners(len(student), len(teacher))):
        shape = student[i][-1], teacher[j][-1]
        maps[f"layer_{i}"] = {"kernel": nn.initializers.lecun_normal()(jax.random.fold_in(key, i), shape)}
    return {**variables, "params": {**variables["params"], NAME: maps}}


def apply(params: dict[str, Any], networks: Networks, output: Output, size: tuple[int, int]) -> Output:
    """Brings the hidden states of a student and its teacher to the same shapes.

    Args:
      params: of the student, with its maps.
      networks: of the stage.
      output: of the student, with its teacher's.
      size: (height, width) of the images that both have read.

    Returns:
      The same with other `features["hidden_states"]`: for each layer of the student its mapped features and the
      teacher's, (batch, rows, columns, teacher's channels).
    """
    student = feature_maps(networks.trained, output.features["hidden_states"], size)
    teacher = feature_maps(networks.teacher, output.teacher.features["hidden_states"], size)
    targets = [teacher[j] for j in _partners(len(student), len(teacher))]
    mapped = []
    for i, (features, target) in enumerate(zip(student, targets)):
        if features.shape[1:3] != target.shape[1:3]:
            features = jax.image.resize(features, (*target.shape[:3], features.shape[-1]), "linear")
        mapped.append(features @ params[NAME][f"layer_{i}"]["kernel"])
    return Output(
        output.value,
        {**output.features, "hidden_states": mapped},
        output.teacher._replace(features={**output.teacher.features, "hidden_states": targets}),
    )


def _partners(student_depth: int, teacher_depth: int) -> list[int]:
    """For each layer of a student the teacher's layer that is as far from the first to the last."""
    depths = (np.arange(student_depth) + 1) / student_depth
    return [max(0, round(depth * teacher_depth) - 1) for depth in depths]


def feature_maps(model: nn.Module, hidden: Any, size: tuple[int, int]) -> list[jax.Array]:
    """The features of every layer as maps (batch, rows, columns, channels), without class tokens.

    Args:
      model: a classifier.
      hidden: its `features["hidden_states"]`.
      size: (height, width) of the images that it has read.
    """
    if isinstance(hidden, tuple | list):
        return list(hidden)
    rows, columns = model.grid_of(size)
    kept = np.delete(np.arange(hidden.shape[2]), class_token_positions(model.class_token, rows * columns))
    return [jnp.take(layer, kept, axis=1).reshape(-1, rows, columns, layer.shape[-1]) for layer in hidden]


def _map_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    def maps(key):
        images = jnp.zeros(input_images(model).shape)
        hidden = model.init_with_output(key, images, return_features=True)[0][1]["hidden_states"]
        return feature_maps(model, hidden, images.shape[1:3])

    return [x.shape for x in jax.eval_shape(maps, jax.random.key(0))]
