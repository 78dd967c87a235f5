"""The description of a task: all that training, evaluation and their pictures need of it.

A task is a value, made of pure functions and names. A batch holds uint8 images of one view, "high" (b, H, W, 3) and
"low" (b, h, w, 3), "target" (b, …) and "weight" (b,), 0 for what fills up a batch. Functions of arrays run on devices.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from vimd_jax.data.geometry import View
from vimd_jax.data.sources import Record, Source
from vimd_jax.errors import DatasetError
from vimd_jax.settings import Setting

Batch = dict[str, jax.Array]
Terms = dict[str, jax.Array]
Table = list[tuple]


class Output(NamedTuple):
    """The results of a network for a batch in training.

    Attributes:
      value: logits, a restored image, …
      features: of `return_features=True`; {} for a task that reads none.
      teacher: the same of the frozen teacher on the true images; None without one. Where config.loss.hidden_map is on,
        both `features["hidden_states"]` are maps of the same shapes.
    """

    value: jax.Array
    features: dict[str, Any] = {}
    teacher: "Output | None" = None


class Sums(NamedTuple):
    """The findings of an evaluation over all its images.

    Attributes:
      total: sums over the images, float64; "count" is how many there were.
      images: for the arrays of `Task.per_image`, and for "index", the image's number in the source, their values of all
        images, in no particular order.
    """

    total: dict[str, np.ndarray]
    images: dict[str, np.ndarray]


def _output(model: nn.Module, variables: Any, images: jax.Array, config: ConfigDict) -> jax.Array:
    return model.apply(variables, images)


def _nothing(*_: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Task:
    """A goal of learning from images.

    Attributes:
      networks: the names of the networks that can learn it.
      network: the one that a config has by default.
      loss: (output, batch, config of the stage) -> the loss and its terms by name, means over the batch.
      sums: (`answer`, batch) -> sums over the batch, each image counted by its weight, with "count".
      scores: total sums, see `Sums` -> scores by name, in the order of the log; without "count".
      drawn: the scores that curves.png shows; more of the first one means a better network.
      axis: title of their axis.
      remark: scores of a finished network -> a warning that they call for, if any.
      target: (record, view) -> what stands beside an image in a batch, an array of one shape; for a record without
        target, an array that does not count. None: nothing.
      outputs: the dataset's class names -> the names of the network's outputs; () where it has no such outputs.
      maps: whether targets are label maps: crops then keep the scale of objects, and whole images are evaluated.
      view: what the network reads, "high" or "low".
      truth: the views that loss and sums read beside it.
      reads_features: whether the loss reads `Output.features`.
      needs_teacher: config of the stage -> whether the loss reads `Output.teacher`.
      settings: the fields of a config that only stages of this task have.
      check: (config of the stage, number of outputs) -> None, or ValueError for settings that do not go together.
      mix: (key, batch, names of the views, number of outputs, config of the stage, name of the axis of devices) -> the
        batch to train on. None: as it is.
      answer: (network, its variables, images in [0, 1], config of the stage) -> the output that an evaluation scores.
      per_image: (the network's output, batch) -> arrays (b,) that an evaluation keeps of every image; one that has the
        name of a sum is the image's share of it. From the shares of all sums that `scores` reads, a report derives
        intervals.
      confusion: (Sums, number of outputs) -> how often each true class (rows) was predicted as each class.
      tables: (Sums, names of the outputs) -> tables to write as CSV by name, the first row being the titles.
      panel: (the network's output, targets, names of the outputs, the images in high resolution, the source's colours)
        -> further columns of the panel, title -> images, and a caption for each image.
    """

    networks: Collection[str]
    network: str
    loss: Callable[[Output, Batch, ConfigDict], tuple[jax.Array, Terms]]
    sums: Callable[[jax.Array, Batch], dict[str, jax.Array]]
    scores: Callable[[dict[str, np.ndarray]], dict[str, float]]
    drawn: tuple[str, ...]
    axis: str
    remark: Callable[[dict[str, float]], str | None] = _nothing
    target: Callable[[Record, View], Any] | None = None
    outputs: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda class_names: ()
    maps: bool = False
    view: str = "high"
    truth: tuple[str, ...] = ()
    reads_features: bool = False
    needs_teacher: Callable[[ConfigDict], bool] = lambda config: False
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    check: Callable[[ConfigDict, int], None] = _nothing
    mix: Callable[..., Batch] | None = None
    answer: Callable[[nn.Module, Any, jax.Array, ConfigDict], jax.Array] = _output
    per_image: Callable[[jax.Array, Batch], dict[str, jax.Array]] = lambda output, batch: {}
    confusion: Callable[[Sums, int], np.ndarray | None] = _nothing
    tables: Callable[[Sums, tuple[str, ...]], dict[str, Table]] = lambda sums, names: {}
    panel: Callable[..., tuple[dict[str, np.ndarray], list[str]]] = lambda output, targets, names, images, colours: (
        {},
        [""] * len(output),
    )


def unit(images: jax.Array) -> jax.Array:
    """Images with values from 0 to 255 as float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def check_source(task: Task, source: Source, name: str) -> None:
    """Raises DatasetError unless the dataset of this name has label maps exactly where the task learns them."""
    if task.target is None or (task.maps == source.maps and task.outputs(source.class_names)):
        return
    has, learns = (("label maps", "classes of images"), ("classes of images", "label maps"))[task.maps]
    remedy = "; label maps are read with config.dataset.name=label_maps" if task.maps else ""
    raise DatasetError(f"config.dataset.name={name} has {has}, but this stage learns {learns}{remedy}")
