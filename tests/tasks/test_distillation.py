"""Distillation: each term is one row, with its weight and its need of a teacher."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vimd_jax.config import STAGES, default_config
from vimd_jax.settings import Setting, at_least
from vimd_jax.tasks import distillation
from vimd_jax.tasks.classification import CLASSIFICATION
from vimd_jax.tasks.distillation import Term, distilled, hidden_layers
from vimd_jax.tasks.task import Output
from vimd_jax.training.roles import build_networks


def config_of(**weights) -> ConfigDict:
    config = default_config("student")
    config.sr.name = "bicubic"
    config.loss.update(weights)
    return config


@pytest.mark.parametrize(
    ("logits_weight", "hidden_weight", "teaches"), [(0.0, 0.0, False), (1.0, 0.0, True), (0.0, 1.0, True)]
)
def test_a_teacher_is_built_for_the_terms_that_need_one(logits_weight, hidden_weight, teaches):
    config = config_of(logits_weight=logits_weight, hidden_weight=hidden_weight)
    assert (build_networks(config, "abc").teacher is not None) == teaches


def test_a_new_term_is_one_row_and_its_setting(monkeypatch):
    """Whoever adds a term gets the teacher by that row; the loss and its terms follow."""
    distance = Term("distance_weight", lambda output, options: jnp.mean(abs(output.value - output.teacher.value)))
    bias = Term("bias_weight", lambda output, options: jnp.mean(output.value), needs_teacher=False)
    for name, term in {"distance": distance, "bias": bias}.items():
        monkeypatch.setitem(distillation.TERMS, name, term)
        monkeypatch.setitem(distillation.SETTINGS, f"loss.{term.weight}", Setting(0.0, at_least(0), "of the test"))
    task = distilled(CLASSIFICATION)
    monkeypatch.setitem(STAGES, "student", dataclasses.replace(STAGES["student"], task=task))
    config = config_of(logits_weight=0.0, hidden_weight=0.0, bias_weight=2.0)
    assert not task.needs_teacher(config)
    config.loss.distance_weight = 3.0
    assert task.needs_teacher(config)
    output = Output(jnp.array([[2.0, 0.0]]), {}, Output(jnp.array([[1.0, 0.0]])))
    loss, terms = task.loss(output, {"target": jnp.array([0])}, config)
    assert terms["distance"] == 0.5 and terms["bias"] == 1
    np.testing.assert_allclose(loss, terms["cross_entropy"] + 2 * terms["bias"] + 3 * terms["distance"], rtol=1e-6)


def test_layers_are_read_or_refused():
    assert [hidden_layers(text) for text in ("all", "last", "5,11")] == ["all", "last", (5, 11)]
    with pytest.raises(ValueError, match="config.loss.hidden_layers is 'first': give"):
        distilled(CLASSIFICATION).check(config_of(hidden_layers="first"), 3)
