"""Whole runs: three stages in a row, interruption, wrong requests, and the programs that use what comes out."""

import csv
import dataclasses
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import golden
import golden_models
import jax
import matplotlib
import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import tiny_config

from vimd_jax import evaluate, predict, train
from vimd_jax.checkpoints import training_state
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.command import StopRequest
from vimd_jax.data.geometry import central_view
from vimd_jax.data.images import find_images
from vimd_jax.data.sources import load_source
from vimd_jax.data.synthetic import class_markings
from vimd_jax.errors import DatasetError, Stopped, TrainingError, UnreadableImage
from vimd_jax.load import load_model
from vimd_jax.models import create_model
from vimd_jax.training import plots, roles, workdirs
from vimd_jax.training.metrics import MetricWriter, read_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with finished runs "sr", "teacher" and "student"."""
    jax.config.update("jax_disable_most_optimizations", True)  # made before conftest does so, compared to the bit after
    folder = tmp_path_factory.mktemp("runs")
    train.train(tiny_config("sr"), folder / "sr")
    train.train(tiny_config("teacher"), folder / "teacher")
    train.train(student_config(folder), folder / "student")
    return folder


@pytest.fixture(autouse=True)
def logged(caplog, monkeypatch):
    """The whole log, whichever tests ran before."""
    caplog.set_level("INFO", logger="vimd_jax")
    monkeypatch.setattr(logging.getLogger("vimd_jax"), "propagate", True)


def student_config(folder: Path, **changes):
    """A student with everything on that is random."""
    augmented = {
        "dataset__augment__rand_augment": "rand-m9-mstd0.5-inc1",
        "dataset__augment__erasing_probability": 0.25,
        "mixing__mixup_alpha": 0.8,
        "mixing__cutmix_alpha": 1.0,
    }
    inits = {"sr__init": str(folder / "sr"), "teacher__init": str(folder / "teacher")}
    return tiny_config("student", **{**augmented, **inits, **changes})


def final_state(workdir: Path):
    manager = training_state.open_folder(workdir / "checkpoints")
    return manager.restore(manager.latest_step()).arrays


@pytest.mark.parametrize("stage", ["sr", "teacher", "student"])
def test_a_finished_run_leaves_what_it_promises(trained, stage):
    workdir = trained / stage
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 7))
    assert {line["split"] for line in lines} == {"train", "validation", "test"}
    for name in ("curves.png", "panel.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    assert any((workdir / "tensorboard").iterdir())
    test = [line["metrics"] for line in lines if line["split"] == "test"]
    assert len(test) == 1 and test[0]["count"] == 10


def test_student_metrics_name_every_term(trained):
    metrics = read_metrics(trained / "student")[0]["metrics"]
    weighted = metrics["cross_entropy"] + 1.0 * metrics["logits"] + 20.0 * metrics["hidden"]
    assert metrics["loss"] == pytest.approx(weighted, rel=1e-5)


def test_the_student_keeps_its_sr_network_frozen(trained):
    sr, student = load_model(trained / "sr").variables, load_model(trained / "student").variables
    same = jax.tree.map(np.array_equal, sr["params"], student["params"]["sr"])
    assert all(jax.tree.leaves(same))


def test_running_again_changes_nothing(trained):
    before = final_state(trained / "teacher"), read_metrics(trained / "teacher")
    train.train(tiny_config("teacher"), trained / "teacher")
    after = final_state(trained / "teacher"), read_metrics(trained / "teacher")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before[0], after[0])))
    assert before[1] == after[1]


def test_an_interrupted_run_continues_to_the_same_bits(trained, tmp_path, monkeypatch):
    config = student_config(trained)
    for stop_at in (2, 3, 5):  # mid-epoch, at the end of an epoch, mid-epoch again
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(train, "train_batches", _sigterm_after(stop_at, train.train_batches))
            train.train(config, tmp_path / "run")
        assert stopped.value.code == 128 + signal.SIGTERM
        assert int(final_state(tmp_path / "run")["step"]) == stop_at
    train.train(config, tmp_path / "run")
    whole, pieces = final_state(trained / "student"), final_state(tmp_path / "run")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, pieces)))
    losses = [[x["metrics"]["loss"] for x in read_metrics(d)] for d in (trained / "student", tmp_path / "run")]
    assert losses[0] == losses[1]


def _sigterm_after(step, train_batches):
    def wrapped(*args, start_step, **kwargs):
        for number, batch in enumerate(train_batches(*args, start_step=start_step, **kwargs), start_step + 1):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return wrapped


def start(config: str, workdir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "vimd_jax.train", f"--config={config}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Reads what the process says until a line contains the text."""
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return said
    raise AssertionError(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_stops_before_the_next_stage(tmp_path, number):
    flags = [f"--config.stages.{stage}.dataset.num_workers=1" for stage in ("first", "second")]
    process = start("tests/tiny.py:two_stages", tmp_path / "run", *flags)
    wait_for(process, "step 2/")
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said and "and saved it; the same command continues." in said
    assert training_state.open_folder(tmp_path / "run" / "first" / "checkpoints").latest_step() >= 2
    assert not (tmp_path / "run" / "second").exists()


def test_a_stop_during_an_evaluation_is_answered_there(trained, tmp_path, monkeypatch):
    config = tiny_config("teacher")

    class Impatient(StopRequest):
        """Asks to stop at the second call, which is between two batches of the first evaluation."""

        calls = 0

        def check(self, step=0):
            Impatient.calls += 1
            if Impatient.calls == 4:
                raise Stopped(143)

    with pytest.raises(Stopped):
        train.train(config, tmp_path, stop=Impatient())
    assert int(final_state(tmp_path)["step"]) == 3
    assert {line["split"] for line in read_metrics(tmp_path)} == {"train"}
    train.train(config, tmp_path)
    assert numbers(tmp_path) == numbers(trained / "teacher")


def numbers(workdir: Path) -> list:
    clocks = ("images_per_second", "input_wait")
    return [
        (line["split"], line["step"], {name: x for name, x in line["metrics"].items() if name not in clocks})
        for line in read_metrics(workdir)
    ]


def test_a_first_step_that_fails_claims_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UnreadableImage):
        patch.setattr(train, "train_batches", _unreadable)
        train.train(tiny_config("teacher"), tmp_path)
    assert training_state.open_folder(tmp_path / "checkpoints").latest_step() is None
    train.check(tiny_config("teacher", batch_size=4), tmp_path)


def _unreadable(*args, **kwargs):
    raise UnreadableImage("a.jpg: broken")
    yield


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_lost_best_network_is_replaced(trained, tmp_path, damage, caplog):
    shutil.copytree(trained / "teacher", tmp_path / "run")
    if damage == "flip":
        file = next((tmp_path / "run" / "best").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-64] + bytes(64))
    else:
        shutil.rmtree(tmp_path / "run" / "best")
    train.train(tiny_config("teacher"), tmp_path / "run")
    assert any("The best network is lost" in line for line in caplog.messages)
    assert load_model(tmp_path / "run").provenance["step"] == 6
    assert read_metrics(tmp_path / "run")[-1]["metrics"]["best_step"] == 6


def test_a_new_run_takes_nothing_from_one_without_checkpoints(trained, tmp_path):
    shutil.copytree(trained / "teacher", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train.train(tiny_config("teacher", schedule__num_epochs=3), tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["split"] == "train"] == list(range(1, 10))


def test_an_error_saves_what_is_whole(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        yield from itertools.islice(train_batches(*args, **kwargs), 2)
        raise UnreadableImage("a.jpg: broken")

    train_batches = train.train_batches
    monkeypatch.setattr(train, "train_batches", broken)
    with pytest.raises(UnreadableImage):
        train.train(tiny_config("teacher"), tmp_path)
    assert int(final_state(tmp_path)["step"]) == 2


def test_unreadable_images_are_left_out_to_the_end(tmp_path):
    source = load_source(tiny_config("teacher").dataset, "test", seed=0)
    for split, count in {"train": 12, "test": 6}.items():
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                source.read(i % 10).image.save(tmp_path / split / label / f"{i:02d}.png")
    for name in ("test/a/00.png", "test/b/05.png", "train/a/03.png"):  # the first and the last one of the panel too
        (tmp_path / name).write_bytes(b"broken")
    folder = {"dataset__name": "folder", "dataset__directory": str(tmp_path)}
    with pytest.raises(UnreadableImage, match=r"test/a/00.png: not an image .* \(2 of the 12 test images"):
        train.train(tiny_config("teacher", **folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train.train(tiny_config("teacher", **folder, dataset__on_error="skip"), tmp_path / "run")
    assert (tmp_path / "run" / "panel.png").exists()
    assert read_metrics(tmp_path / "run")[-1]["metrics"]["count"] == 10


def test_ruined_weights_are_neither_saved_nor_scored(tmp_path):
    """The update that ruins them is the last one of the first epoch."""
    config = tiny_config("teacher")
    real = train.create_schedule

    def ruinous(*args):
        schedule = real(*args)
        return lambda step: schedule(step) + 1e38 * (step == 2)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError, match="not finite"):
        patch.setattr(train, "create_schedule", ruinous)
        train.train(config, tmp_path)
    assert not (tmp_path / "best").exists()
    assert training_state.open_folder(tmp_path / "checkpoints").latest_step() is None


def test_outputs_that_are_not_finite_have_no_score(trained, tmp_path):
    classifier = load_model(trained / "teacher")
    head = classifier.variables["params"]["head"]
    head["bias"] = np.full_like(head["bias"], 3e38)  # finite, as a checkpoint must be
    head["kernel"] = np.full_like(head["kernel"], 3e38)
    with pytest.raises(ValueError, match="outputs of the network are not finite"):
        classifier.predict(np.ones((1, 32, 32, 3), np.float32))
    save_model(tmp_path, classifier)
    with pytest.raises(TrainingError, match="outputs of the network are not finite"):
        evaluate.evaluate_run(tiny_config("teacher"), trained / "teacher", "test", tmp_path)


def test_a_non_finite_loss_stops_and_names_step_and_images(tmp_path):
    config = tiny_config("teacher", schedule__learning_rate=1e30, schedule__warmup_learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"not finite at step \d+ .*Images of the batch: .*synthetic"):
        train.train(config, tmp_path)


def test_a_kill_in_the_middle_of_the_first_best_network_is_survived(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / ".variables-0123.safetensors.77").write_bytes(b"half of it")
    options = {"merge": "sum", "pool": "last", "class_token": "none", "input_normalization": True}
    config = tiny_config("classifier", **{f"classifier__{name}": value for name, value in options.items()})
    train.train(config, tmp_path)
    assert len(list((tmp_path / "best").iterdir())) == 2
    model = load_model(tmp_path).model
    assert {name: getattr(model, name) for name in options} == options | {"class_token": None}
    logged = read_metrics(tmp_path)[-1]["metrics"]
    scores = evaluate.evaluate_run(config, tmp_path, "test")
    assert scores == pytest.approx({name: logged[name] for name in scores})


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.8])
def test_binary_cross_entropy_as_in_deit_iii(tmp_path, mixup_alpha):
    changes = {"loss__label_loss": "binary_cross_entropy", "loss__label_smoothing": 0.0, "loss__target_threshold": 0.0}
    config = tiny_config("classifier", **changes, mixing__mixup_alpha=mixup_alpha, dataset__augment__three_augment=True)
    train.train(config, tmp_path)
    metrics = read_metrics(tmp_path)[0]["metrics"]
    # Of 4 classes, each by itself and at first near one half.
    assert metrics["loss"] == metrics["binary_cross_entropy"] == pytest.approx(np.log(2), rel=0.2)


def test_averaged_weights_are_evaluated_and_saved(tmp_path):
    config = tiny_config("teacher", ema_decay=0.5)
    train.train(config, tmp_path)
    state, best = final_state(tmp_path), load_model(tmp_path).variables
    if read_metrics(tmp_path)[-1]["metrics"]["best_step"] == int(state["step"]):
        assert np.array_equal(state["average"]["params"]["head"]["kernel"], best["params"]["head"]["kernel"])
    assert not np.array_equal(state["average"]["params"]["head"]["kernel"], state["params"]["head"]["kernel"])


def test_a_student_and_teacher_of_stages_with_batch_norms(tmp_path):
    """Hidden states of stages are distilled; the statistics change while training and belong to the best network."""
    maps = {"name": "efficient_vmamba_tiny", "dims": (8, 16), "depths": (1, 1)}
    config = tiny_config("student", sr__name="bicubic", schedule__warmup_epochs=0, schedule__num_epochs=1)
    for role in ("teacher", "student"):
        config[role].update(dict.fromkeys(tiny.VIM) | maps | {"init": str(tmp_path / "teacher")})
    model = create_model(maps["name"], num_classes=4, image_size=32, dims=(8, 16), depths=(1, 1))
    teacher = golden_models.random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    save_model(tmp_path / "teacher", TrainedModel(model, teacher, tuple(map(str, class_markings(4)))))

    train.train(config, tmp_path / "student")
    metrics = read_metrics(tmp_path / "student")[0]["metrics"]
    weighted = metrics["cross_entropy"] + 1.0 * metrics["logits"] + 20.0 * metrics["hidden"]
    assert metrics["hidden"] > 0 and metrics["loss"] == pytest.approx(weighted, rel=1e-5)
    student = load_model(tmp_path / "student")
    assert set(student.variables["batch_stats"]) == {"classifier"}
    statistics = student.variables["batch_stats"]["classifier"], teacher["batch_stats"]
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, *statistics)))
    assert student.predict(np.zeros((1, 8, 8, 3), np.float32)).shape == (1, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "config.batch_size"),
        ({"dataset__name": "folder", "dataset__directory": "/nowhere"}, "config.dataset.directory"),
        ({"dataset__name": "bird"}, "bird"),
        ({"teacher__dtype": "float8"}, "config.teacher.dtype"),
        (
            {"teacher__directions": ("h",)},
            "config.teacher.directions: vim_tiny has no such option, choose from .*merge",
        ),
        ({"teacher__name": "vim_tinny"}, "config.teacher.name is 'vim_tinny': choose one of vim_tiny"),
        ({"teacher__init": "/nowhere"}, "/nowhere"),
        ({"selection": "vote"}, "vote"),
        ({"scan_implementation": "fast"}, "config.scan_implementation is 'fast': it must be empty or native or"),
        ({"scan_implementation": "triton"}, "config.scan_implementation: 'triton' cannot run here"),
        (
            {"teacher__init_key": "model_ema"},
            "init_key is 'model_ema', but only a PyTorch file has keys",
        ),
        ({"teacher__init_position_mode": "old"}, "init_position_mode is 'old': it must be correct or reference"),
        ({"eval_every_epochs": 0}, "config.eval_every_epochs is 0: it must be at least 1"),
        ({"log_every_steps": 0}, "config.log_every_steps"),
        ({"checkpoint_every_steps": 0}, "config.checkpoint_every_steps"),
        ({"seed": -1}, "config.seed"),
        ({"seed": 2**63}, "config.seed"),
        ({"ema_decay": 1.0}, "config.ema_decay is 1.0: it must be at least 0 and below 1"),
        ({"loss__label_smoothing": 1.5}, "config.loss.label_smoothing"),
        ({"loss__target_threshold": 0.0}, "config.loss: target_threshold is 0.0, but only label_loss=binary_cross"),
        (
            {"loss__target_threshold": 0.0, "loss__label_loss": "binary_cross_entropy"},
            "config.loss: with label_smoothing 0.1, every class is above target_threshold 0.0: set label_smoothing",
        ),
        ({"loss__target_threshold": 1.5}, "config.loss.target_threshold is 1.5: it must be at least 0 and below 1"),
        ({"mixing__mixup_alpha": -1.0}, "config.mixing.mixup_alpha is -1.0: it must be at least 0"),
        ({"mixing__cutmix_alpha": -1.0}, "config.mixing.cutmix_alpha"),
        ({"mixing__probability": 1.5}, "config.mixing.probability is 1.5: it must be from 0 to 1"),
        ({"mixing__switch_probability": -0.5}, "config.mixing.switch_probability"),
        ({"dataset__augment__rand_augment": "m9"}, "config.dataset.augment.rand_augment is 'm9'"),
        ({"optimizer__clip_norm": -1.0}, "config.optimizer.clip_norm is -1.0: it must be at least 0"),
        ({"optimizer__b2": 1.0}, "config.optimizer.b2"),
        ({"schedule__learning_rate": -1.0}, "config.schedule.learning_rate"),
        ({"schedule__learning_rate": float("nan")}, "config.schedule.learning_rate is nan"),
        ({"schedule__warmup_epochs": -1}, "config.schedule.warmup_epochs"),
        ({"schedule__num_epochs": 0}, "config.schedule.num_epochs"),
        ({"schedule__name": "linear"}, "config.schedule.name is 'linear': it must be cosine or"),
        ({"optimizer__weight_decay": -0.1}, "config.optimizer.weight_decay"),
        ({"optimizer__eps": 0.0}, "config.optimizer.eps"),
        ({"optimizer__b1": 2.0}, "config.optimizer.b1"),
        ({"log_every_steps": -1}, "config.log_every_steps is -1"),
        ({"dataset__validation_fraction": 1.0}, "config.dataset.validation_fraction is 1.0"),
        ({"dataset__synthetic_classes": 0}, "config.dataset.synthetic_classes"),
        ({"dataset__augment__erasing_probability": 1.1}, "config.dataset.augment.erasing_probability is 1.1"),
        ({"dataset__augment__erasing_mode": "noise"}, "erasing_mode is 'noise': it must be pixel or rand or const"),
        ({"dataset__augment__erasing_count": 0}, "config.dataset.augment.erasing_count"),
        ({"dataset__augment__color_jitter": -0.1}, "config.dataset.augment.color_jitter"),
        ({"loss__label_loss": "bce"}, "config.loss.label_loss is 'bce': it must be cross_entropy or binary_cross"),
        ({"dataset__low_resolution": 0}, "config.dataset.low_resolution"),
        ({"dataset__num_workers": -1}, "config.dataset.num_workers"),
        ({"dataset__repeats": 0}, "config.dataset.repeats"),
        ({"dataset__on_error": "ask"}, "config.dataset.on_error is 'ask': it must be stop or skip"),
        ({"dataset__eval_crop": 1.5}, "config.dataset.eval_crop"),
        ({"dataset__crop_scale": (0.5, 0.1)}, "config.dataset.crop_scale"),
        ({"dataset__crop_scale": (0.1, 0.5, 1.0)}, "config.dataset.crop_scale"),
        ({"dataset__crop_scale": (0.0, 0.0)}, "config.dataset.crop_scale"),
        ({"dataset__crop_scale": (1.0,)}, "config.dataset.crop_scale"),
        ({"dataset__crop_scale": (0.5, 3.0)}, "config.dataset.crop_scale"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError, DatasetError), match=message):
        train.train(tiny_config("teacher", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_that_are_not_square(tmp_path):
    """A student that learns from labels alone, behind bicubic interpolation; trained twice, it is finished already."""
    sizes = {"dataset__high_resolution": (32, 16), "dataset__low_resolution": (8, 4)}
    alone = {"sr__name": "bicubic", "loss__logits_weight": 0.0, "loss__hidden_weight": 0.0}
    config = tiny_config("student", schedule__num_epochs=1, schedule__warmup_epochs=0, **sizes, **alone)
    for _ in range(2):
        train.train(config, tmp_path / "run")
    student = load_model(tmp_path / "run")
    assert (student.image_size, student.low_resolution) == ((32, 16), (8, 4))
    assert student.predict(np.zeros((2, 8, 4, 3), np.uint8)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"set config.dataset.low_resolution to \(8, 4\)"):
        config = tiny_config("sr", dataset__high_resolution=(32, 16), dataset__low_resolution=(8, 8))
        train.train(config, tmp_path / "sr")


def test_a_student_needs_trained_networks(tmp_path, trained):
    with pytest.raises(ValueError, match="config.sr.init is empty"):
        train.train(tiny_config("student"), tmp_path / "a")
    with pytest.raises(ValueError, match="4 classes in the checkpoint, 5 wanted"):
        train.train(student_config(trained, dataset__synthetic_classes=5), tmp_path / "b")
    with pytest.raises(ValueError, match="config.dataset.low_resolution"):
        train.train(student_config(trained, dataset__low_resolution=9), tmp_path / "c")
    with pytest.raises(ValueError, match=r"config.loss: layers: \(0, 2\) is not valid"):
        train.train(student_config(trained, loss__hidden_layers="0,2"), tmp_path / "d")
    assert not any(tmp_path.glob("[acd]"))


def test_a_workdir_belongs_to_one_config(trained):
    with pytest.raises(ValueError, match=r"config.schedule.num_epochs was 2, is 3"):
        train.train(tiny_config("teacher", schedule__num_epochs=3), trained / "teacher")


def test_a_workdir_of_before_a_field_existed_is_read(trained, tmp_path):
    stored = json.loads((trained / "teacher" / "config.json").read_text())
    del stored["teacher"]["rope"], stored["ema_decay"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert workdirs.read_config(tmp_path) == workdirs.read_config(trained / "teacher")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.dataset.nmae=cub", "the config has no field 'nmae', did you mean 'name'?"),
        ("--config.student.image_size=64", "the config has no field 'image_size'"),
        ("--config.batch_size=many", "config.batch_size"),
        ("--config.student.name=srvm_tiny", "config.student.name is 'srvm_tiny': choose one of"),
        ("--config.sr.name=vim_tiny", "config.sr.name is 'vim_tiny': choose one of srresnet_x2"),
        ("--config=configs/nothing.py", "configs/nothing.py"),
        ("--config=recipes", "recipes is no config"),
        ("--config=configs/small_classifier.py:foo", "ValueError: The network is 'foo': choose one of vim_tiny"),
    ],
)
def test_a_misspelt_or_mistyped_field_ends_the_program_with_one_line(tmp_path, flag, message):
    config = [] if flag.startswith("--config=") else ["--config=configs/quickstart.py:baseline"]
    command = [sys.executable, "-m", "vimd_jax.train", *config, f"--workdir={tmp_path}/run", *flag.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate and predict


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_evaluate_agrees_with_the_training_log(trained, stage):
    config, workdir = workdirs.read_config(trained / stage), trained / stage
    scores = evaluate.evaluate_run(config, workdir, "test")
    logged = read_metrics(workdir)[-1]["metrics"]
    assert scores == pytest.approx({name: logged[name] for name in scores})
    rows = list(csv.reader((workdir / "test_per_class.csv").read_text().splitlines()))
    assert sum(int(row[2]) for row in rows[1:]) == round(logged["top1"] / 100 * 10)
    confusion = np.array(
        [row[1:] for row in csv.reader((workdir / "test_confusion.csv").read_text().splitlines())][1:], int
    )
    assert confusion.sum() == 10


def test_predict_labels_files_and_folders(trained, tmp_path, capsys):
    source = load_source(tiny_config("student").dataset, "test", seed=0)
    source.read(0).image.resize((8, 8)).save(tmp_path / "small.png")
    source.read(1).image.resize((50, 40)).save(tmp_path / "large.png")
    classifier = load_model(trained / "student")
    paths = find_images([tmp_path])
    labelled = dict(predict.label(classifier, paths, 2, downsample=False))
    assert [path.name for path in labelled] == ["small.png"]
    assert "large.png: 50x40 pixels" in capsys.readouterr().err
    labelled = dict(predict.label(classifier, paths, 2, downsample=True))
    assert len(labelled) == 2
    np.testing.assert_allclose([p.sum() for p in labelled.values()], 1, rtol=1e-5)
    np.testing.assert_allclose(classifier.predict(tmp_path, downsample=True), list(labelled.values()), rtol=1e-5)


def test_predict_reads_a_file_as_it_is():
    file = golden.FOLDER / "checkpoints" / "vim_style.pth"
    options = {"embed_dim": 48, "depth": 4, "stride": 8, "image_size": 64}
    classifier = load_model(file, "vim_tiny", options=options)
    assert len(classifier.class_names) == classifier.model.num_classes == 10
    with pytest.raises(ValueError, match="vim_style.pth: the weights do not fit Vim: wrong shape .*: pos_embed is"):
        load_model(file, "vim_tiny", options=options | {"image_size": 96})
    with pytest.raises(ValueError, match="vim_style.pth does not say which network it holds: .*--model"):
        load_model(file)
    wide = load_model(file, "vim_tiny", options=options | {"image_size": (16, 400)})
    assert wide.prepare(ROOT / "docs" / "panel.png").shape == (16, 400, 3)


def test_predict_looks_at_images_as_the_run_did(trained, tmp_path):
    save_model(tmp_path / "teacher", dataclasses.replace(load_model(trained / "teacher"), crop=0.5))
    classifier = load_model(tmp_path / "teacher")
    image = load_source(tiny_config("teacher").dataset, "test", seed=0).read(0).image.resize((64, 64))
    image.save(tmp_path / "x.png")
    expected = np.asarray(central_view(image.size, classifier.image_size, 0.5).apply(image), np.float32) / 255
    np.testing.assert_array_equal(classifier.prepare(tmp_path / "x.png"), expected)


def test_evaluate_refuses_another_network_and_other_classes(trained, tmp_path):
    workdir = trained / "teacher"
    with pytest.raises(ValueError, match="merge is 'mean' there, 'sum' in the model"):
        evaluate.evaluate_run(tiny_config("teacher", teacher__merge="sum"), workdir, "test")
    with pytest.raises(ValueError, match="4 classes in the checkpoint, 3 wanted"):
        evaluate.evaluate_run(tiny_config("teacher", dataset__synthetic_classes=3), workdir, "test")
    with pytest.raises(ValueError, match="is for other classes than the data: 'barred wing"):
        evaluate.evaluate_run(tiny_config("teacher", **folder_of(tmp_path, "abcd")), workdir, "test")


def folder_of(root: Path, classes: Iterable[str]) -> dict[str, str]:
    """Settings of a dataset of class folders, made under `root` with a few grey images."""
    for split, count in {"train": 12, "test": 2}.items():
        for shade, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (40, 40), 40 * shade + i).save(root / split / name / f"{i:02d}.png")
    return {"dataset__name": "folder", "dataset__directory": str(root)}


def test_pictures_and_tables_never_stop_a_run(tmp_path, monkeypatch, caplog, capsys):
    """And are drawn, with names of any characters, whatever the user's settings are."""
    config = tiny_config("teacher", **folder_of(tmp_path / "data", ["bill $5", "bill $10", "\\frac", "a_b^c"]))
    with matplotlib.rc_context({"text.usetex": True}):
        train.train(config, tmp_path / "run")
    pictures = [tmp_path / "run" / name for name in ("curves.png", "panel.png")]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert not any("could not be written" in line for line in caplog.messages)
    for picture in pictures:
        picture.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(plots, "_figure", None)
        train.train(config, tmp_path / "run")
        evaluate.evaluate_run(config, tmp_path / "run", "test")
    failed = [line for line in caplog.messages if "could not be written" in line]
    assert [line.split(" ")[0].split("/")[-1] for line in failed] == ["curves.png", "panel.png", "test_confusion.png"]
    train.train(config, tmp_path / "run")
    assert all(picture.exists() for picture in pictures)


@pytest.mark.parametrize(("seconds", "times"), [(0, 3), (1e9, 1)])  # at two epochs and the end; at the end
def test_pictures_appear_during_a_run(seconds, times, tmp_path, monkeypatch):
    seen = []
    real = train.save_pictures

    def looking(*args):
        real(*args)
        seen.append({path.name for path in tmp_path.glob("*.png")})

    monkeypatch.setattr(train, "save_pictures", looking)
    monkeypatch.setattr(train, "SECONDS_BETWEEN_PICTURES", seconds)
    train.train(tiny_config("teacher"), tmp_path)
    assert seen == [{"curves.png", "panel.png"}] * times


def test_evaluate_prints_before_it_draws(trained, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "write_tables", lambda *_: print("tables"))
    monkeypatch.setattr(evaluate, "is_given", lambda field: False)
    monkeypatch.setattr(evaluate, "show_log", lambda: None)
    monkeypatch.setattr(evaluate, "flags", SimpleNamespace(FLAGS=SimpleNamespace(split="test", checkpoint=None)))
    evaluate.main(workdirs.read_config(trained / "teacher"), trained / "teacher")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["teacher", "tables"]


def test_evaluate_looks_at_images_as_the_checkpoint_says(trained, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "vimd_jax")
    save_model(tmp_path / "half", dataclasses.replace(load_model(trained / "teacher"), crop=0.5))
    crops = []
    real = evaluate.passes
    monkeypatch.setattr(
        evaluate, "passes", lambda s, config, t: crops.append(config.dataset.eval_crop) or real(s, config, t)
    )
    config = tiny_config("teacher")
    evaluate.evaluate_run(config, tmp_path, "test", tmp_path / "half")
    evaluate.measure(config, tmp_path, "test", tmp_path / "half", given=lambda field: field == "dataset.eval_crop")
    assert crops == [0.5, 1.0]
    assert any("was trained with eval_crop 0.5, which is taken; the config has 1.0" in line for line in caplog.messages)


def test_evaluate_reads_deep_images_as_the_checkpoint_says(trained, tmp_path):
    teacher = load_model(trained / "teacher")
    for name in teacher.class_names:
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(np.full((32, 32), 2048, np.uint16)).save(tmp_path / "test" / name / "1.png")
    save_model(tmp_path / "deep", dataclasses.replace(teacher, value_range=(0, 4095)))
    config = tiny_config("teacher", dataset__name="folder", dataset__directory=str(tmp_path))
    for checkpoint, grey in (("deep", 128), (trained / "teacher", 8)):
        source = evaluate.measure(config, tmp_path, "test", tmp_path / checkpoint).source
        assert source.read(0).image.getpixel((0, 0)) == (grey,) * 3


def test_a_checkpoint_names_what_its_images_look_like():
    config = tiny_config("student")
    view = {"low_resolution": [8, 16], "crop": 1.0, "value_range": [0, 4095]}
    seen = evaluate._as_trained(config, view, {}, lambda field: field == "dataset.eval_crop", "there").dataset
    assert (seen.low_resolution, seen.value_range) == ((8, 16), (0, 4095))
    view = {"low_resolution": 0, "crop": 1.0}
    normalised = {"input_normalization": True}
    seen = evaluate._as_trained(config, view, normalised, lambda field: False, "there")
    assert seen.dataset.low_resolution == 8 and seen.student.input_normalization


def test_classes_in_another_order_are_matched_by_name(trained, tmp_path, caplog):
    caplog.set_level("INFO", "vimd_jax")
    teacher = load_model(trained / "teacher")
    names = teacher.class_names[::-1]
    head = {name: leaf[..., ::-1] for name, leaf in teacher.variables["params"]["head"].items()}
    variables = {"params": {**teacher.variables["params"], "head": head}}
    save_model(tmp_path / "turned", dataclasses.replace(teacher, variables=variables, class_names=names))
    config = tiny_config("teacher")
    expected = evaluate.evaluate_run(config, tmp_path, "test", trained / "teacher")
    assert evaluate.evaluate_run(config, tmp_path, "test", tmp_path / "turned") == expected
    assert any("matched by name" in line for line in caplog.messages)

    save_model(tmp_path / "other", dataclasses.replace(teacher, class_names=("oak", "elm", "fir", "yew")))
    with pytest.raises(ValueError, match="other is for other classes than the data: 'elm' is not among them"):
        evaluate.evaluate_run(config, tmp_path, "test", tmp_path / "other")

    student = student_config(trained, teacher__init=str(tmp_path / "turned"), student__init=str(tmp_path / "other"))
    networks = roles.build_networks(student, teacher.class_names)
    started, frozen = roles.initial_variables(student, networks, tmp_path / "run")
    assert np.array_equal(frozen["teacher"]["params"]["head"]["kernel"], teacher.variables["params"]["head"]["kernel"])
    assert not np.array_equal(started["params"]["head"]["kernel"], teacher.variables["params"]["head"]["kernel"])
    assert any("The head is initialised anew" in line for line in caplog.messages)
    student.teacher.init = str(tmp_path / "other")
    with pytest.raises(ValueError, match="other is for other classes"):
        roles.initial_variables(student, networks, tmp_path / "run")


def test_frozen_networks_are_what_they_hold_not_where_they_lie(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "sr", tmp_path / "sr")
    shutil.copytree(trained / "teacher", tmp_path / "teacher")
    config = student_config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "train_batches", _sigterm_after(2, train.train_batches))
        train.train(config, tmp_path / "run")
    (tmp_path / "teacher").rename(tmp_path / "scratch")
    config.teacher.init = str(tmp_path / "scratch")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "train_batches", _sigterm_after(4, train.train_batches))
        train.train(config, tmp_path / "run")
    other = load_model(trained / "teacher")
    other.variables["params"]["head"]["bias"] += 1
    save_model(tmp_path / "scratch" / "best", other)
    with pytest.raises(ValueError, match="config.teacher.init: .*scratch holds another network than the one that"):
        train.train(config, tmp_path / "run")


def test_more_epochs_start_from_a_finished_run(trained, tmp_path, caplog):
    caplog.set_level("INFO", "vimd_jax")
    train.train(tiny_config("teacher"), trained / "teacher")
    assert any(f"--config.continue_from={trained}/teacher" in line for line in caplog.messages)
    config = tiny_config("teacher", continue_from=str(trained / "teacher"))
    with pytest.raises(ValueError, match="is at step 6, and this run ends at 6: raise config.schedule.num_epochs"):
        train.train(config, tmp_path / "run")
    config.schedule.num_epochs = 3
    other = config.copy_and_resolve_references()
    other.dataset.synthetic_classes = 3
    with pytest.raises(ValueError, match="continue_from: .* was trained on other classes: class .* is new or gone"):
        train.train(other, tmp_path / "other")
    train.train(config, tmp_path / "run")
    assert [x["step"] for x in read_metrics(tmp_path / "run") if x["split"] == "train"] == [7, 8, 9]
    assert int(final_state(tmp_path / "run")["opt_state"][0]["count"]) == 9


def test_an_average_of_mostly_initial_weights_is_named(tmp_path, caplog):
    fast = {"schedule__learning_rate": 1e-2, "schedule__num_epochs": 8, "eval_every_epochs": 8}
    train.train(tiny_config("sr", ema_decay=0.9999, **fast), tmp_path / "slow")
    warnings = [line for line in caplog.messages if "The averaged network" in line]
    assert len(warnings) == 1 and "has psnr " in warnings[0] and "100 % of the average are still" in warnings[0]
    caplog.clear()
    train.train(tiny_config("sr", ema_decay=0.9999, ema_warmup=True, **fast), tmp_path / "warm")
    assert not any("The averaged network" in line for line in caplog.messages)


def test_an_sr_network_worse_than_bicubic_is_named(trained, tmp_path, caplog):
    train.train(tiny_config("sr"), tmp_path / "sr")
    train.train(student_config(trained), tmp_path / "student")
    warnings = [line for line in caplog.messages if "worse than bicubic interpolation, PSNR" in line]
    assert [line.split(":")[0] for line in warnings] == ["test, network of step 6", "config.sr.init"]


def test_training_works_in_a_thread(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train.train, tiny_config("teacher"), tmp_path).result()
    assert (tmp_path / "best").is_dir()


def test_signals_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopRequest():
        assert signal.getsignal(signal.SIGUSR1) != before[2]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_is_anything_to_save_ends_at_once(number):
    """Even while the main thread is in a compilation, here in a lock, where handlers of Python do not run."""
    code = (
        "import time, vimd_jax.command as c\n"
        "stop = c.StopRequest(at_once=True); c.show_log(); print('ready', flush=True)\n"
        "import ctypes; [ctypes.CDLL(None).sleep(50) for _ in range(3)]"  # a signal ends one of them
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number and "before there was anything to save" in said


def test_importing_a_program_defines_no_flags():
    code = (
        "import vimd_jax.train, vimd_jax.evaluate; from absl import flags\n"
        "assert not {'config', 'workdir', 'checkpoint', 'split', 'process_id'} & set(flags.FLAGS)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_full_disk_is_one_line(tmp_path):
    """Here a device that is always full stands for the file."""
    with MetricWriter(tmp_path, 4, 0, 0) as writer:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(TrainingError, match="metrics.jsonl cannot be written .No space left on device.: make room"):
            writer.write(1, "train", {"loss": 1.0})


def test_every_stage_of_a_config_is_checked_before_the_first_begins(tmp_path):
    command = [sys.executable, "-m", "vimd_jax.train", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run"]
    wrong = {
        "--config.stages.student.batch_size=0": "stage student: config.batch_size",
        "--config.stages.student.loss.hidden_layers=99": "stage student: config.loss: layers",
        "--config.stages.teacher.teacher.class_token=tail": "stage teacher: config.teacher.class_token",
        "--config.stages.student.teacher.init=/nowhere": "stage student: config.teacher.init: /nowhere",
    }
    for flag, message in wrong.items():
        result = subprocess.run([*command, flag], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 1 and message in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_predict_writes_every_format(form, capsys):
    predict.write([{"file": "a.png", "labels": [{"class": "owl", "probability": 0.75}]}], form)
    out = capsys.readouterr().out
    assert "a.png" in out and "owl" in out
    if form == "json":
        assert json.loads(out)[0]["labels"][0]["probability"] == 0.75
