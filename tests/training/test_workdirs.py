"""Which run a folder belongs to: settings, classes, images, and one process at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_config

from vimd_jax.data.sources import Source, Splits, load_source
from vimd_jax.training import workdirs


@pytest.fixture
def images(tmp_path):
    for folder, count in {"train/ant": 12, "train/bee": 12, "test/ant": 2, "test/bee": 2}.items():
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / folder / f"{i:02d}.png")
    return tmp_path / "data"


def config_of(images):
    return tiny_config("teacher", dataset__name="folder", dataset__directory=str(images))


def splits(config):
    return Splits(*(load_source(config.dataset, split, seed=0) for split in ("train", "validation", "test")))


@pytest.fixture
def workdir(tmp_path, images):
    """A run with a checkpoint."""
    config = config_of(images)
    workdirs.claim(tmp_path / "run", config, splits(config))
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    return tmp_path / "run"


def test_a_run_of_an_earlier_version_continues(workdir, images):
    """Settings that it does not have are at their defaults; one that is gone and was not set does not matter."""
    stored = json.loads((workdir / "config.json").read_text())
    del stored["scan_implementation"], stored["teacher"]["init_key"]
    stored["teacher"]["scan_implementation"] = None
    (workdir / "config.json").write_text(json.dumps(stored))
    config = config_of(images)
    workdirs.check(workdir, config, splits(config))
    config.scan_implementation = "sequential"
    with pytest.raises(ValueError, match="config.scan_implementation was '', is 'sequential'"):
        workdirs.check(workdir, config, splits(config))


class Maps(Source):
    """Images with maps of labels, which have no class of their own."""

    class_names = ("sky", "tree")

    def __len__(self):
        return 4

    def name(self, i):
        return f"{i}.jpg"


def test_images_without_classes_are_counted_together():
    found = workdirs.fingerprint(Splits(Maps(), Maps(), Maps()))["test"]
    assert {name: count for name, (count, _) in found.items()} == {"sky": 0, "tree": 0, "": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("remove", r"of the train images, class 'bee' has \d+ where it had \d+"),
        ("rename", r"of the train images, class 'bee' has files of other names"),
        ("class", r"of the train images, class 'bee' is new or gone"),
    ],
)
def test_changed_images_are_noticed(workdir, images, change, message):
    config = config_of(images)
    workdirs.check(workdir, config, splits(config))
    victim = next(Path(p) for i in range(24) if "bee" in (p := splits(config).train.name(i)))
    if change == "remove":
        victim.unlink()
    elif change == "rename":
        victim.rename(victim.with_name("00x.png"))
    else:
        for split in ("train", "test"):
            (images / split / "bee").rename(images / split / "wasp")
    with pytest.raises(ValueError, match=f"was trained on other images: {message}.*another --workdir"):
        workdirs.check(workdir, config, splits(config))


def test_moved_images_are_the_same(images, tmp_path):
    before = workdirs.fingerprint(splits(config_of(images)))
    images.rename(tmp_path / "elsewhere")
    assert workdirs.fingerprint(splits(config_of(tmp_path / "elsewhere"))) == before


def test_a_run_without_a_checkpoint_owns_nothing(workdir, images):
    config = config_of(images)
    config.seed = 3
    with pytest.raises(ValueError, match="config.seed was 0, is 3"):
        workdirs.check(workdir, config, splits(config))
    (workdir / "checkpoints" / "5").rmdir()
    workdirs.check(workdir, config, splits(config))
    workdirs.claim(workdir, config, splits(config))
    assert workdirs.read_config(workdir).seed == 3


@pytest.mark.parametrize("content", ["", "{", "[1", "null", "[" * 100_000, '{"train": 3, "stage": [1]}'])
@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_damaged_file_is_named(workdir, images, name, content):
    (workdir / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        workdirs.check(workdir, config_of(images), splits(config_of(images)))


@pytest.mark.parametrize("fields", [{"batch_size": "x"}, {"schedule": 3}, {"seed": {"a": 1}}, {"stage": "none"}])
def test_settings_of_other_types_are_damage(workdir, images, fields):
    content = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(content | fields))
    with pytest.raises(ValueError, match="config.json is damaged"):
        workdirs.check(workdir, config_of(images), splits(config_of(images)))


@pytest.mark.parametrize("name", ["run[1]", "a\\b"])
def test_a_folder_that_could_not_be_read_again_is_refused(tmp_path, images, name):
    with pytest.raises(ValueError, match="could not be read again"):
        workdirs.check(tmp_path / name, config_of(images), splits(config_of(images)))


def test_a_link_to_such_a_folder_is_refused_too(tmp_path, images):
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run[1]")
    with pytest.raises(ValueError, match="could not be read again"):
        workdirs.check(tmp_path / "link", config_of(images), splits(config_of(images)))


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_checkpoints_without_a_description_are_no_fresh_folder(workdir, images, name):
    (workdir / "best").mkdir()
    (workdir / name).unlink()
    config = config_of(images)
    with pytest.raises(ValueError, match=f"run holds checkpoints, but its {name} is gone"):
        workdirs.check(workdir, config, splits(config))
    workdirs.claim(workdir, config, splits(config))
    assert (workdir / "best").is_dir()


def test_a_network_without_checkpoints_is_set_aside(tmp_path, images):
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "network.json").write_text("{}")
    config = config_of(images)
    workdirs.claim(tmp_path / "run", config, splits(config))
    assert (tmp_path / "run" / "best-before" / "network.json").exists()
    assert not (tmp_path / "run" / "best").exists()


def test_where_weights_lay_is_no_setting(workdir, images, caplog):
    config = config_of(images)
    config.teacher.init = "/scratch/job2/weights"
    caplog.set_level("INFO")
    workdirs.check(workdir, config, splits(config))
    assert any("began with config.teacher.init=, which is not read again" in line for line in caplog.messages)


def test_a_longer_run_is_told_how_to_start(workdir, images):
    config = config_of(images)
    config.schedule.num_epochs = 9
    with pytest.raises(ValueError, match=f"num_epochs was 2, is 9.*To train on, add --config.continue_from={workdir}"):
        workdirs.check(workdir, config, splits(config))


def test_names_of_weights_are_no_paths(tmp_path):
    config = tiny_config("student", teacher__init="pretrained:vim_tiny", sr__init="hf://a/b/c.pth")
    ((stage, _),) = workdirs.stages(config, tmp_path)
    assert (stage.teacher.init, stage.sr.init) == ("pretrained:vim_tiny", "hf://a/b/c.pth")


def test_what_processes_must_share(images, tmp_path):
    config = config_of(images)
    same = workdirs.identity(config, splits(config))
    images.rename(tmp_path / "elsewhere")
    moved = config_of(tmp_path / "elsewhere")
    assert workdirs.identity(moved, splits(moved)) == same
    moved.schedule.learning_rate = 0.1
    assert workdirs.identity(moved, splits(moved)) != same


def test_relative_and_absolute_paths_are_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config("student", teacher__init="{workdir}/../teacher", sr__init="runs/sr")
    ((relative, first),) = workdirs.stages(config, Path("runs/student"))
    config.sr.init = str(tmp_path / "runs/sr")
    ((absolute, second),) = workdirs.stages(config, tmp_path / "runs/student")
    assert (relative, first) == (absolute, second)
    assert os.path.normpath(workdirs.init_source(relative, "teacher", first)) == str(tmp_path / "runs/teacher")


def test_two_runs_in_one_folder(tmp_path):
    program = (
        "import pathlib; from vimd_jax.training import workdirs\n"
        f"with workdirs.locked(pathlib.Path({str(tmp_path)!r})): pass"
    )
    with workdirs.locked(tmp_path):
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "another process is already training there" in second.stderr
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
