"""Configs: sections for every network, options declared by the networks alone."""

import pytest
from ml_collections import ConfigDict

from vimd_jax.config import DERIVED, STAGES, default_config, given_options
from vimd_jax.models import CLASSIFIERS, create_model, model_options
from vimd_jax.training.networks import build_networks


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_option_of_every_classifier_can_be_set(name):
    section = default_config("classifier").classifier
    for option in set(model_options(name)) - set(DERIVED):
        assert option in section, option


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_sections_that_it_reads(stage):
    config = default_config(stage)
    networks = {"sr", "classifier", "teacher", "student"}
    assert {name for name in config if name in networks} == set(STAGES[stage])
    assert config.is_locked


def test_options_reach_the_network_and_those_not_given_keep_its_own_value():
    config = default_config("teacher")
    config.dataset.high_resolution = 32
    config.teacher.update(
        {"name": "vim_tiny", "class_token": "none", "depth": 2, "scan_implementation": "sequential", "remat": True}
    )
    model = build_networks(config, num_classes=3).trained
    expected = {"num_classes": 3, "image_size": 32, "class_token": None, "depth": 2, "remat": True}
    assert {name: getattr(model, name) for name in expected} == expected
    assert model.scan_implementation == "sequential"
    assert (model.embed_dim, model.merge) == (create_model("vim_tiny").embed_dim, "mean")


def test_lists_become_tuples():
    section = default_config("classifier").classifier
    section.update({"name": "vmamba_tiny", "dims": (8, 16), "depths": (1, 1)})
    assert create_model(section.name, **given_options(section)).depths == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "vim_tiny", "directions": ("h",)},
            "^config.teacher.directions: vim_tiny has no such option, .*merge",
        ),
        ({"name": "vim_tiny", "merge": "max"}, "^config.teacher.merge: 'max' is not valid, expected Literal"),
        ({"name": "vim"}, "^config.teacher.name: there is no network 'vim', did you mean"),
        ({"name": "vim_tiny", "depth": 0}, "^config.teacher.depth: 0 is not valid, expected at least 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    config = default_config("teacher")
    config.teacher.update(options)
    with pytest.raises(ValueError, match=message):
        build_networks(config, num_classes=3)


def test_a_field_that_does_not_exist_or_of_another_type_is_an_error():
    config = default_config("teacher")
    with pytest.raises(AttributeError, match="embd_dim"):
        config.teacher.embd_dim = 3
    with pytest.raises(TypeError):
        config.teacher.depth = "many"
    with pytest.raises(ValueError, match="^config.stage is 'pupil': choose one of sr, classifier"):
        default_config("pupil")


def test_a_student_frozen_networks_are_those_it_needs():
    config = default_config("student")
    nets = build_networks(config, num_classes=3)
    assert nets.is_student and nets.sr is not None and nets.teacher is not None
    config.sr.name = "bicubic"
    config.loss.update({"logits_weight": 0.0, "hidden_weight": 0.0})
    nets = build_networks(config, num_classes=3)
    assert nets.is_student and nets.sr is None and nets.teacher is None
    assert isinstance(config.teacher, ConfigDict)
