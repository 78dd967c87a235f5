"""Configs: sections for every network, options declared by the networks alone."""

import sys

import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from vimd_jax.config import DERIVED, STAGES, default_config, given_options
from vimd_jax.models import CLASSIFIERS, create_model, model_options
from vimd_jax.training.roles import build_networks


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_option_of_every_classifier_can_be_set(name):
    section = default_config("classifier").classifier
    for option in set(model_options(name)) - set(DERIVED):
        assert option in section, option


@pytest.fixture
def from_command_line(monkeypatch):
    """The config of a program that starts with these arguments."""

    def read(config, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        values = flags.FlagValues()
        flag = config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True)
        values(sys.argv)
        return flag.value

    return read


def test_every_option_can_be_set_on_the_command_line(from_command_line):
    section = default_config("classifier").classifier
    texts = {
        object: ("(('h',), 7)", (("h",), 7)),
        int: ("3", 3),
        float: ("0.5", 0.5),
        bool: ("true", True),
        str: ("text", "text"),
        tuple: ("(1, 2)", (1, 2)),
    }
    given = {option: texts[section.get_type(option)] for option in section}
    arguments = [f"--config.classifier.{option}={text}" for option, (text, _) in given.items()]
    read = from_command_line(default_config("classifier"), *arguments).classifier
    assert read.to_dict() == {option: value for option, (_, value) in given.items()}


@pytest.mark.parametrize(
    ("name", "option", "text", "value"),
    [
        ("vim_tiny", "class_token", "none", None),
        ("vmamba_tiny", "dims", "16", 16),
        ("vmamba_tiny", "dims", "(16, 32, 64, 128)", (16, 32, 64, 128)),
        ("local_vim_tiny", "directions", "(('h', 'v'),)", (("h", "v"),)),
        ("local_vim_tiny", "directions", "none", None),
        ("vmamba_tiny", "depths", "(1, 1, 1)", (1, 1, 1)),
        ("vim_tiny", "dtype", "bfloat16", jnp.bfloat16),
    ],
)
def test_options_of_several_types_from_the_command_line(from_command_line, name, option, text, value):
    arguments = f"--config.classifier.name={name}", f"--config.classifier.{option}={text}"
    config = from_command_line(default_config("classifier"), *arguments)
    assert getattr(build_networks(config, "abc").trained, option) == value


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_sections_that_it_reads(stage):
    config = default_config(stage)
    networks = {"sr", "classifier", "teacher", "student", "segmenter", "segmenter_student"}
    assert {name for name in config if name in networks} == set(STAGES[stage])
    assert config.is_locked


def test_options_reach_the_network_and_those_not_given_keep_its_own_value():
    config = default_config("teacher")
    config.dataset.high_resolution = 32
    config.teacher.update({"name": "vim_tiny", "class_token": "none", "depth": 2, "remat": True})
    model = build_networks(config, "abc").trained
    expected = {"num_classes": 3, "image_size": 32, "class_token": None, "depth": 2, "remat": True}
    assert {name: getattr(model, name) for name in expected} == expected
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
        ({"name": "vim_tiny", "merge": "max"}, "^config.teacher.merge: 'max' is not valid, expected 'mean' or 'sum'"),
        ({"name": "vim"}, "^config.teacher.name is 'vim': choose one of vim_"),
        ({"name": "srresnet_x4"}, "^config.teacher.name is 'srresnet_x4': choose one of"),
        ({"name": "srvm_tiny"}, "^config.teacher.name is 'srvm_tiny': choose one of"),
        ({"name": "vim_tiny", "depth": 0}, "^config.teacher.depth: 0 is not valid, expected at least 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    config = default_config("teacher")
    config.teacher.update(options)
    with pytest.raises(ValueError, match=message):
        build_networks(config, "abc")


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
    nets = build_networks(config, "abc")
    assert set(nets.frozen) == {"sr", "teacher"} and nets.views == ("low", "high")
    config.sr.name = "bicubic"
    config.loss.update({"logits_weight": 0.0, "hidden_weight": 0.0})
    nets = build_networks(config, "abc")
    assert not nets.frozen and nets.views == ("low",) and nets.stage.restorer
    assert isinstance(config.teacher, ConfigDict)
