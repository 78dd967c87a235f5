"""Every kind of config trains: two steps and an evaluation of a network made small, on synthetic images.

Of published recipes that differ in names and numbers only, one trains, and the networks of the others are built.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vimd_jax import train
from vimd_jax.config import STAGES, check_settings
from vimd_jax.configs import FOLDER, find_config, load_config
from vimd_jax.models import model_options
from vimd_jax.training import workdirs
from vimd_jax.training.metrics import read_metrics
from vimd_jax.training.optimizer import create_schedule
from vimd_jax.training.roles import build_networks

SHARED = ("recipes", "imagenet", "ade20k")  # what others import
SEGMENTERS = [path.stem for path in sorted(FOLDER.glob("upernet_*_ade20k.py"))]
CLASSIFIERS = [path.stem for path in sorted(FOLDER.glob("*_imagenet.py"))]
BUILT = [*SEGMENTERS, *CLASSIFIERS, "local_vmamba_search", "small_segmenter_student"]
FILES = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem not in (*SHARED, *BUILT)]
OTHERS = [
    "upernet_vim_tiny_ade20k",
    "vim_tiny_imagenet",
    "student_cub:released",
    "teacher_cub:logged",
    "quickstart:baseline",
]

SMALL = {"embed_dim": 16, "depth": 2, "patch_size": 16, "stride": 16, "channels": 4, "num_blocks": 1}
SMALL |= {"head_channels": 8, "auxiliary_channels": 8}
ONE_STAGE = {"dims": (32,), "depths": (1,)}
NAMES = {"segmenter": "small_segmenter"}  # of the configs of roles that have none of the same name


@pytest.fixture(scope="module")
def label_maps(tmp_path_factory) -> Path:
    """A folder of images with label maps of four classes."""
    folder, rng = tmp_path_factory.mktemp("label_maps"), np.random.default_rng(0)
    for part, split in itertools.product(("images", "annotations"), ("train", "val", "test")):
        (folder / part / split).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (40, 40, 3), np.uint8) if part == "images" else rng.integers(0, 4, (40, 40))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / part / split / f"{i}.png")
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    return folder


def shrink(config: ConfigDict, label_maps: Path) -> None:
    """Makes a stage take seconds; what it computes stays the same."""
    for role in STAGES[config.stage]:
        section = config[role]
        if section.name == "bicubic":
            continue
        options = model_options(section.name)
        section.update({name: value for name, value in (SMALL | ONE_STAGE).items() if name in options})
        if section.get("directions") or (section.name.startswith("local_v") and "search" not in section.name):
            section.directions = (("h", "h_flip", "w2", "w2_flip"),)
    config.update({"batch_size": 4, "eval_batch_size": 8, "seed": 0})  # runs of several seeds are one
    config.dataset.update({"name": "synthetic", "directory": "", "num_classes": 0, "validation_fraction": 0.3})
    config.dataset.update({"synthetic_classes": 4, "synthetic_train_size": 8, "synthetic_test_size": 8})
    config.dataset.update({"high_resolution": 32, "low_resolution": 8})
    config.schedule.update({"num_epochs": 1, "warmup_epochs": 0, "num_steps": 0})
    if STAGES[config.stage].task.maps:
        config.dataset.update({"name": "label_maps", "directory": str(label_maps), "size_limits": (0, 0)})
        config.dataset.update({"classes": "", "label_values": "", "ignored_values": ""})
        if config.inference.mode == "slide":
            config.inference.update({"window": 32, "stride": 24})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a small config in a folder of its own, or finds it there: many are the same when small. Draws nothing."""
    folder, known, patch = tmp_path_factory.mktemp("configs"), {}, pytest.MonkeyPatch()
    patch.setattr(train, "save_pictures", lambda *_: None)
    patch.setattr(train.report, "save", lambda *_: None)

    def run(config):
        key = json.dumps(json.loads(config.to_json()), sort_keys=True)
        if key not in known:
            known[key] = folder / str(len(known))
            train.train(config, known[key])
        return known[key]

    yield run
    patch.undo()


@pytest.mark.parametrize("run", FILES + OTHERS)
def test_every_config_trains(run, trained, label_maps):
    config = load_config(run)
    made = {}
    for stage, _ in workdirs.stages(config, Path("run")):
        with stage.unlocked():
            shrink(stage, label_maps)
            for role in STAGES[stage.stage]:  # the networks that the stage needs are those made before it
                needed = stage[role].name != "bicubic" and role != stage.stage
                stage[role].init = str(made.get(role) or _made_for(role, stage, trained, label_maps)) if needed else ""
        made[stage.stage] = trained(stage)
        lines = read_metrics(made[stage.stage])
        assert [line["step"] for line in lines if line["split"] == "train"] == [2]
        assert {"train", "test"} <= {line["split"] for line in lines}


@pytest.mark.parametrize("run", BUILT)
def test_every_other_config_is_built(run):
    for config, _ in workdirs.stages(load_config(run), Path("run")):
        check_settings(config)
        create_schedule(config.schedule, steps_per_epoch=1263)
        names = [f"class {i}" for i in range(150)]
        networks = build_networks(config, names)
        networks.task.check(config, len(names))
        if run in (*SEGMENTERS, *CLASSIFIERS):
            assert networks.trained.num_classes == 150
            assert networks.trained.image_size == (512 if run in SEGMENTERS else 224)


@pytest.mark.parametrize("run", SEGMENTERS)
def test_a_recipe_is_called_as_its_network(run):
    assert run == f"{load_config(run).segmenter.name}_ade20k"


def _made_for(role: str, config: ConfigDict, trained, label_maps: Path) -> Path:
    """A small network for the role of a stage, whose own run is in another config."""
    other = load_config(NAMES.get(role, role))
    with other.unlocked():
        other[role].update({name: config[role][name] for name in config[role] if name != "init"})
        shrink(other, label_maps)
    return trained(other)


def test_a_config_is_found_by_path_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart:baseline") == f"{FOLDER}/quickstart.py:baseline"
    (tmp_path / "quickstart").touch()
    assert find_config("quickstart:baseline") == "quickstart:baseline"
    with pytest.raises(ValueError, match="student_cup is neither a file nor .*; did you mean student_cub?"):
        find_config("student_cup")
    with pytest.raises(ValueError, match="configs/student_cub.py is neither .*; did you mean student_cub?"):
        find_config("configs/student_cub.py")
