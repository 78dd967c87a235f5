"""Distillation: the terms that a teacher adds to the loss of any task (ViMD, https://arxiv.org/abs/2411.17980)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from vimd_jax import losses
from vimd_jax.settings import ABOVE_0, ANY, Setting, at_least, one_of
from vimd_jax.tasks.task import Batch, Output, Task, Terms


class Term(NamedTuple):
    """One term of the loss.

    Attributes:
      weight: its factor, a field of config.loss; 0 switches it off.
      value: (output, config.loss) -> the term.
      needs_teacher: whether it reads `Output.teacher`.
    """

    weight: str
    value: Callable[[Output, ConfigDict], jax.Array]
    needs_teacher: bool = True


def _logits(output: Output, options: ConfigDict) -> jax.Array:
    return losses.logits_distillation(output.value, output.teacher.value, options.temperature)


def _hidden(output: Output, options: ConfigDict) -> jax.Array:
    states = output.features["hidden_states"], output.teacher.features["hidden_states"]
    layers = hidden_layers(options.hidden_layers)
    return losses.hidden_state_distillation(*states, layers, options.hidden_normalize)


TERMS = {"logits": Term("logits_weight", _logits), "hidden": Term("hidden_weight", _hidden)}

SETTINGS = {
    "loss.logits_weight": Setting(1.0, at_least(0), "alpha of the paper; 0 switches the term off"),
    "loss.temperature": Setting(4.0, ABOVE_0, "of the logits that are distilled"),
    "loss.hidden_weight": Setting(20.0, at_least(0), "beta of the paper; 0 switches the term off"),
    "loss.hidden_layers": Setting("all", ANY, 'layers that are distilled: "all", "last", or numbers as in "5,11,23"'),
    "loss.hidden_normalize": Setting(True, ANY, "scale each token to unit length first"),
    "loss.teacher_view": Setting(
        "high",
        one_of("high", "low"),
        'the images that the teacher reads: "high", the true ones; or, a control, "low", those that the student reads',
    ),
    "loss.hidden_map": Setting(
        False,
        ANY,
        "ours, not the paper's: a learned linear map from each layer of the student to the teacher's layer of the same "
        "relative depth, for networks of different shapes",
    ),
}


def distilled(task: Task) -> Task:
    """The task with a teacher: to its own loss, each of `TERMS` is added with its weight."""

    def loss(output: Output, batch: Batch, config: ConfigDict) -> tuple[jax.Array, Terms]:
        total, terms = task.loss(output, batch, config)
        for name, term in TERMS.items():
            if weight := config.loss[term.weight]:
                terms[name] = term.value(output, config.loss)
                total += weight * terms[name]
        return total, terms

    def check(config: ConfigDict, num_outputs: int) -> None:
        task.check(config, num_outputs)
        hidden_layers(config.loss.hidden_layers)

    return dataclasses.replace(
        task,
        loss=loss,
        check=check,
        reads_features=True,
        needs_teacher=lambda config: any(t.needs_teacher and config.loss[t.weight] for t in TERMS.values()),
        settings={**task.settings, **SETTINGS},
    )


def hidden_layers(text: str) -> str | tuple[int, ...]:
    """Reads config.loss.hidden_layers: "all", "last", or layer numbers as in "5,11,23"."""
    if text in ("all", "last"):
        return text
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(
            f'config.loss.hidden_layers is {text!r}: give "all", "last" or layer numbers as in "5,11,23".'
        ) from None
