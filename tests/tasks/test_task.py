"""A task of one's own: a few functions and a row of the table, without and with a teacher."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from vimd_jax import config as settings
from vimd_jax.config import Stage
from vimd_jax.evaluate import evaluate_run
from vimd_jax.load import load_model
from vimd_jax.models import CLASSIFIERS
from vimd_jax.tasks.distillation import distilled
from vimd_jax.tasks.task import Task
from vimd_jax.train import train
from vimd_jax.training.metrics import read_metrics


def mean_colour(record, view):
    return np.asarray(view.apply(record.image), np.float32).mean(axis=(0, 1)) / 255


def loss(output, batch, config):
    squared = jnp.mean(jnp.square(output.value - batch["target"]))
    return squared, {"squared": squared}


def sums(output, batch):
    distance = jnp.abs(output - batch["target"]).mean(axis=-1)
    return {"count": batch["weight"].sum(), "closeness": jnp.sum(batch["weight"] * (1 - distance))}


def panel(output, targets, *_):
    captions = [f"{np.round(colour, 2)}, is {np.round(target, 2)}" for colour, target in zip(output, targets)]
    return {"predicted": np.clip(output, 0, 1)[:, None, None].repeat(4, 1).repeat(4, 2)}, captions


COLOUR = Task(
    networks=CLASSIFIERS,
    network="vim_tiny",
    loss=loss,
    sums=sums,
    scores=lambda total: {"closeness": float(total["closeness"] / total["count"])},
    drawn=("closeness",),
    axis="closeness",
    target=mean_colour,
    outputs=lambda class_names: ("red", "green", "blue"),
    panel=panel,
)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setitem(settings.STAGES, "colour", Stage(COLOUR, trained="colour"))
    pupil = Stage(distilled(COLOUR), trained="pupil", restorer="sr", teacher="colour")
    monkeypatch.setitem(settings.STAGES, "pupil", pupil)


def test_a_task_and_its_distillation_train_evaluate_and_draw(tmp_path):
    train(tiny_config("colour", schedule__num_epochs=1, schedule__warmup_epochs=0), tmp_path / "colour")
    assert load_model(tmp_path / "colour").class_names == ("red", "green", "blue")
    assert (tmp_path / "colour" / "panel.png").read_bytes().startswith(b"\x89PNG")
    lines = read_metrics(tmp_path / "colour")
    assert lines[0]["metrics"]["loss"] == lines[0]["metrics"]["squared"]
    scores = evaluate_run(tiny_config("colour"), tmp_path / "colour", "test")
    assert 0 < scores["closeness"] == pytest.approx(lines[-1]["metrics"]["closeness"]) and scores["count"] == 10
    assert not list((tmp_path / "colour").glob("*.csv"))

    config = tiny_config("pupil", sr__name="bicubic", loss__logits_weight=0.0)
    with pytest.raises(ValueError, match="config.colour.init is empty, but a pupil needs a trained colour network"):
        train(config, tmp_path / "pupil")
    config.colour.init = str(tmp_path / "colour")
    train(config, tmp_path / "pupil")
    metrics = read_metrics(tmp_path / "pupil")[0]["metrics"]
    assert metrics["loss"] == pytest.approx(metrics["squared"] + 20 * metrics["hidden"], rel=1e-5)
