"""Published weights by name, from the Hub to a trained and evaluated network that sees images as published."""

import jax
import numpy as np
import pytest
import torch_writer
from hub_server import COMMITS
from tiny import VIM, tiny_config

from vimd_jax import evaluate, load_model, report, train
from vimd_jax.models import create_model, list_models
from vimd_jax.models.published import PUBLISHED
from vimd_jax.training import workdirs
from vimd_jax.training.roles import zeros
from weight_convert import export_state_dict
from weight_convert.convert import main as convert

OPTIONS = {name: value for name, value in VIM.items() if name != "name"} | {"image_size": 32}


@pytest.fixture(autouse=True)
def published(hub, tmp_path, monkeypatch):
    """A tiny file of four classes in the place of Vim-tiny's."""
    model = create_model("vim_tiny", num_classes=4, **OPTIONS)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), zeros(model))
    torch_writer.save(tmp_path / "tiny.pth", {"model": export_state_dict(variables, model)})
    hub.files[f"someone/tiny/{COMMITS['main']}/tiny.pth"] = (tmp_path / "tiny.pth").read_bytes()
    entry = PUBLISHED["vim_tiny"]._replace(file="hf://someone/tiny/tiny.pth")
    monkeypatch.setitem(PUBLISHED, "vim_tiny", entry)
    monkeypatch.setattr(train, "save_pictures", lambda *_: None)
    monkeypatch.setattr(report, "save", lambda *_: None)


def stage_of(config, tmp_path, given=()):
    ((stage, workdir),) = workdirs.stages(config, tmp_path / "run", lambda field: field in given)
    return stage, workdir


def test_a_run_and_what_comes_of_it_see_images_as_published(tmp_path, caplog):
    caplog.set_level("INFO", "vimd_jax")
    config = tiny_config("teacher", teacher__init="pretrained", schedule__num_epochs=1, schedule__warmup_epochs=0)
    stage, workdir = stage_of(config, tmp_path)
    said = "config.teacher.input_normalization is True and config.dataset.eval_crop is 0.875, as for hf://someone/tiny/"
    assert sum(line.startswith(said) for line in caplog.messages) == 1
    train.train(stage, workdir)
    best = load_model(workdir)
    assert best.crop == 0.875 and best.model.input_normalization
    train.train(*stage_of(config, tmp_path))  # the same command: nothing is left to do
    assert "is finished" in caplog.messages[-1]

    scores = evaluate.measure(tiny_config("teacher"), tmp_path, "test", workdir).scores
    assert scores == evaluate.measure(stage, tmp_path, "test", workdir).scores

    student = tiny_config("student", teacher__init=str(workdir), sr__name="bicubic")
    assert stage_of(student, tmp_path)[0].teacher.input_normalization


def test_what_the_user_sets_stays(tmp_path, caplog):
    caplog.set_level("INFO", "vimd_jax")
    config = tiny_config("classifier", classifier__init="pretrained", classifier__input_normalization=False)
    config.dataset.eval_crop = 0.9
    assert stage_of(config, tmp_path)[0].to_dict() == config.to_dict()
    config.dataset.eval_crop = 1.0
    assert stage_of(config, tmp_path, ["dataset.eval_crop"])[0].to_dict() == config.to_dict()
    assert not caplog.messages
    assert stage_of(config, tmp_path)[0].dataset.eval_crop == 0.875


def test_a_loaded_network_sees_images_as_published(hub):
    trained = load_model("pretrained:vim_tiny", options=OPTIONS)
    assert (trained.crop, trained.model.input_normalization, len(trained.class_names)) == (0.875, True, 4)
    assert load_model("pretrained", "vim_tiny", options=OPTIONS).crop == 0.875
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 18:46] = 255  # the central 28 columns, of 32 the share 0.875
    assert trained.prepare(image).min() > 0.5
    unchanged = load_model("pretrained:vim_tiny", options=OPTIONS | {"input_normalization": False})
    assert not unchanged.model.input_normalization


def test_published_weights_are_evaluated_by_name(tmp_path):
    config = tiny_config("classifier")
    by_name = evaluate.measure(config, tmp_path, "test", "pretrained").scores
    config.update({"classifier": {"input_normalization": True}, "dataset": {"eval_crop": 0.875}})
    assert by_name == evaluate.measure(config, tmp_path, "test", "hf://someone/tiny/tiny.pth").scores


def test_a_conversion_of_published_weights_keeps_their_view(tmp_path, capsys):
    options = [x for name, value in OPTIONS.items() if name != "image_size" for x in ("--option", f"{name}={value}")]
    command = ["--model", "vim_tiny", "--checkpoint", "pretrained", "--image_size", "32", "--output"]
    assert convert([*command, str(tmp_path / "converted"), *options]) == 0
    assert "as published: crop 0.875, {'input_normalization': True}" in capsys.readouterr().out
    trained = load_model(tmp_path / "converted")
    assert trained.crop == 0.875 and trained.model.input_normalization


def test_names_with_weights():
    names = list_models("vim*", pretrained=True)
    assert names == ["vim_base", "vim_small", "vim_small_stride8", "vim_tiny", "vim_tiny_stride8"]
    assert set(list_models(pretrained=True)) < set(list_models())
