"""Training, evaluation and prediction of segmenters, on a handful of small images."""

import contextlib
import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.golden_models import random_variables
from tests.tiny import tiny_config
from vimd_jax import predict, train
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.evaluate import evaluate_run
from vimd_jax.load import load_model
from vimd_jax.models import create_model
from vimd_jax.models.srvm import SRVM
from vimd_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Square images of two sizes: blue above, grey below."""
    path, rng = tmp_path_factory.mktemp("maps"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for part in ("images", "annotations"):
            (path / part / split).mkdir(parents=True)
        for i in range(count):
            side = (40, 24)[i % 2]
            labels = np.zeros((side, side), np.uint8)
            labels[rng.integers(side // 3, side - side // 3) :] = 1
            pixels = np.array([[60, 60, 220], [128, 128, 128]])[labels] + rng.integers(-20, 20, (*labels.shape, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path / "images" / split / f"{i}.png")
            Image.fromarray(labels).save(path / "annotations" / split / f"{i}.png")
    (path / "classes.txt").write_text("sky #0000ff\nroad #808080\n")
    return path


def config(stage, folder, **changes):
    fields = {"dataset__name": "label_maps", "dataset__directory": str(folder), "schedule__num_epochs": 2}
    if stage.startswith("segmenter"):
        fields["dataset__size_limits"] = (32, 32)
    return tiny_config(stage, **fields | {"schedule__learning_rate": 3e-3} | changes)


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "segmenter"
    train.train(config("segmenter", folder), path)
    return path


def test_a_run_learns_and_writes_what_every_run_writes(workdir):
    lines = read_metrics(workdir)
    scores = lines[-1]["metrics"]
    assert {"mean_iou", "mean_accuracy", "pixel_accuracy", "loss"} <= set(scores)
    assert {"cross_entropy", "auxiliary"} <= set(lines[0]["metrics"])
    assert scores["count"] == 4 and (workdir / "panel.png").exists() and (workdir / "curves.png").exists()
    page = (workdir / "report.html").read_text()
    assert "mean IoU" in page and "(bootstrap)" in page
    assert load_model(workdir).class_names == ("sky", "road")


def test_evaluation_writes_a_table_of_classes(workdir, folder):
    scores = evaluate_run(config("segmenter", folder), workdir, "test")
    assert scores["mean_iou"] == pytest.approx(read_metrics(workdir)[-1]["metrics"]["mean_iou"], abs=1e-4)
    rows = list(csv.DictReader((workdir / "test_per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == ["sky", "road"]
    assert np.mean([float(row["iou_percent"]) for row in rows]) == pytest.approx(scores["mean_iou"])
    assert sum(int(row["pixels"]) for row in rows) == 2 * (40**2 + 24**2)


@pytest.fixture
def predicted(tmp_path, monkeypatch, capsys):
    """Runs the command `predict`; returns what it says of the images, and of errors."""

    def run(workdir, *arguments):
        output = ["--output", str(tmp_path / "maps"), "--format", "json"]
        monkeypatch.setattr(sys, "argv", ["predict", "--checkpoint", str(workdir), *output, *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            predict.main()
        out, err = capsys.readouterr()
        return json.loads(out), err

    return run


def test_prediction_writes_label_maps(workdir, folder, predicted):
    images, _ = predicted(workdir, folder / "images" / "test")
    assert len(images) == 4
    for image in images:
        assert sum(label["share"] for label in image["labels"]) == pytest.approx(1)
        with Image.open(image["label_map"]) as labels, Image.open(image["file"]) as original:
            assert labels.mode == "P" and labels.size == original.size
            assert labels.getpalette()[:6] == [0, 0, 255, 128, 128, 128]
            share = np.mean(np.asarray(labels) == ["sky", "road"].index(image["labels"][0]["class"]))
        assert share == pytest.approx(image["labels"][0]["share"])
        with Image.open(image["overlay"]) as overlay:
            assert overlay.size == labels.size


def test_prediction_asks_for_a_folder(workdir, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict", "--checkpoint", str(workdir), str(folder / "images" / "test")])
    with pytest.raises(SystemExit):
        predict.main()
    assert "name a folder for label maps (--output DIR)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def student(workdir, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("distilled")
    sr = create_model("srresnet_x4", channels=4, num_blocks=1)
    save_model(path / "sr", TrainedModel(sr, random_variables(sr, np.zeros((1, 8, 8, 3), np.float32))))
    once = {"schedule__num_epochs": 1, "schedule__warmup_epochs": 0}
    changes = once | {"segmenter__init": str(workdir), "sr__init": str(path / "sr")}
    train.train(config("segmenter_student", folder, **changes), path / "student")
    return path / "student"


def test_a_student_is_taught_by_a_segmenter(student):
    lines = read_metrics(student)
    assert {"cross_entropy", "auxiliary", "logits", "hidden"} <= set(lines[0]["metrics"])
    assert lines[-1]["metrics"]["mean_iou"] > 0
    assert isinstance(load_model(student).model, SRVM)


def test_a_student_labels_small_images_at_the_size_that_it_restores(student, folder, tmp_path, predicted):
    Image.open(folder / "images" / "test" / "0.png").resize((8, 6)).save(tmp_path / "small.png")
    images, _ = predicted(student, tmp_path / "small.png")
    with Image.open(images[0]["label_map"]) as labels, Image.open(images[0]["overlay"]) as overlay:
        assert labels.size == overlay.size == (32, 24)


def test_a_student_labels_larger_images_as_it_was_evaluated(student, folder, predicted):
    images, err = predicted(student, "--downsample", folder / "images" / "test")
    assert not err
    right = []
    for image in images:
        truth = image["file"].replace("images", "annotations")
        with Image.open(image["label_map"]) as labels, Image.open(truth) as labelled:
            right.append(np.asarray(labels) == np.asarray(labelled))
    accuracy = 100 * np.mean(np.concatenate(right, axis=None))
    assert accuracy == pytest.approx(read_metrics(student)[-1]["metrics"]["pixel_accuracy"], abs=0.1)


def test_a_student_says_which_images_are_too_large(student, folder, predicted):
    images, err = predicted(student, folder / "images" / "test" / "0.png")
    assert not images and "0.png: 40x40 pixels, but this network reads up to 8x8; add --downsample" in err


def test_a_stage_names_the_data_that_it_needs(folder, tmp_path):
    with pytest.raises(ValueError, match="name=label_maps has label maps, but this stage learns classes of images"):
        train.check(config("classifier", folder), tmp_path)
    with pytest.raises(ValueError, match="name=synthetic has classes of images, but this stage learns label maps"):
        train.check(config("segmenter", folder, dataset__name="synthetic"), tmp_path)
