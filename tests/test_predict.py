"""The command that labels images: what it prints, whatever the names are."""

import csv
import io
import json
import os
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from vimd_jax import predict
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model

NAMES = ("crow", "owl\x1b[2J", "line\nbreak")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = create_model("vim_tiny", embed_dim=16, depth=1, patch_size=8, stride=8, image_size=16, num_classes=3)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32)))
    folder = tmp_path_factory.mktemp("net")
    save_model(folder, TrainedModel(model, variables, NAMES))
    return folder


@pytest.fixture
def files(tmp_path):
    """Three images, one of them with a name that is not UTF-8."""
    for name in (b"a\x1b[31m.png", b"caf\xe9.png", b"z.png"):
        Image.new("RGB", (20, 16), "red").save(tmp_path / os.fsdecode(name))
    return tmp_path


def run(monkeypatch, capfd, checkpoint, *arguments) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", ["predict", f"--checkpoint={checkpoint}", *map(str, arguments)])
    status = 0
    try:
        predict.main()
    except SystemExit as ended:
        status = ended.code
    return *capfd.readouterr(), status


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_no_name_ends_the_output_or_reaches_the_terminal(form, checkpoint, files, monkeypatch, capfd):
    (files / "broken.png").write_bytes(b"no image")
    out, err, status = run(monkeypatch, capfd, checkpoint, files, f"--format={form}")
    assert status == 1 and "broken.png: not an image" in err and "1 of 4 images were not labelled" in err
    assert all(c.isprintable() or c in "\n\r" for c in out + err)
    if form == "json":
        found = json.loads(out)
        assert [image["file"] for image in found] == sorted(str(p) for p in files.iterdir() if p.name != "broken.png")
        assert {label["class"] for label in found[0]["labels"]} == set(NAMES)
    elif form == "csv":
        rows = list(csv.reader(io.StringIO(out)))
        assert len(rows) == 1 + 3 * 3 and rows[4][0] == f"{files}/caf\\udce9.png"
        assert {row[2] for row in rows[1:]} == {"crow", r"owl\x1b[2J", r"line\nbreak"}
    else:
        assert out.count("%") == 9 and out.count("\n") == 12


def test_results_are_written_as_they_come(checkpoint, files, monkeypatch, capfd):
    """After a failure what was there before it has been written."""

    def fails_later(classifier, images, original=TrainedModel.probabilities, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 3:
            raise ValueError("the third batch fails")
        return original(classifier, images)

    monkeypatch.setattr(TrainedModel, "probabilities", fails_later)
    out, err, status = run(monkeypatch, capfd, checkpoint, files, "--format=csv", "--batch_size=1", "--top=1")
    assert status == 1 and "third batch" in err
    assert len(out.splitlines()) == 3


def test_a_pipe_is_no_image(checkpoint, tmp_path, monkeypatch, capfd):
    os.mkfifo(tmp_path / "x.png")
    _, err, status = run(monkeypatch, capfd, checkpoint, tmp_path / "x.png")
    assert status == 1 and "x.png: not a regular file" in err
    _, err, status = run(monkeypatch, capfd, tmp_path / "x.png", tmp_path / "x.png", "--model=vim_tiny")
    assert status == 1 and "x.png: not a regular file" in err


def test_class_names_from_a_pipe_or_another_encoding_are_refused(checkpoint, files, tmp_path, monkeypatch, capfd):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin1").write_bytes("é\nb\nc\n".encode("latin1"))
    for name, message in (("pipe", "not a regular file"), ("latin1", "latin1: not a text file in UTF-8")):
        _, err, status = run(monkeypatch, capfd, checkpoint, files, f"--classes={tmp_path / name}")
        assert status == 1 and message in err


def test_a_picture_that_cannot_be_drawn_costs_no_label(checkpoint, files, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("vimd_jax.explain.draw", None)
    options = f"--explain={tmp_path / 'why'}", "--format=csv", "--top=1"
    out, err, status = run(monkeypatch, capfd, checkpoint, files, *options)
    assert status == 0 and len(out.splitlines()) == 1 + 3


def test_deep_images_with_a_small_range_are_said(checkpoint, tmp_path, monkeypatch, capfd):
    Image.fromarray(np.full((32, 32), 4095, np.uint16)).save(tmp_path / "x.png")
    _, err, status = run(monkeypatch, capfd, checkpoint, tmp_path)
    assert status == 0 and err.startswith("warning: 16-bit images with values from 4095 to 4095, a small part")


def test_explanations_are_drawn_beside_the_labels(checkpoint, files, monkeypatch, capfd):
    folder = files / "new" / "explained"
    out, err, status = run(monkeypatch, capfd, checkpoint, files, "--top=1", f"--explain={folder}")
    assert status == 0 and out.count("%") == 3, err
    drawn = sorted(folder.iterdir())
    assert [os.fsencode(path.name)[:7] for path in drawn] == [b"0001_a\x1b", b"0002_ca", b"0003_z."]
    with Image.open(drawn[2]) as picture:
        assert picture.size == (2 * 336 + 8, 336)
