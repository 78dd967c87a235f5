"""Pairs of folders with label maps: what they may look like, and what is said of data that are wrong."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import golden
from tests.tiny import tiny_config
from vimd_jax.configs import FOLDER
from vimd_jax.data.classes import IGNORED, read_classes
from vimd_jax.data.geometry import rounded_sizes
from vimd_jax.data.label_maps import read_map, value_table
from vimd_jax.data.pipeline import eval_batches, train_batches
from vimd_jax.data.sources import check_readable, load_source
from vimd_jax.errors import DatasetError, UnreadableImage
from vimd_jax.tasks.segmentation import SEGMENTATION

CLASSES = "sky #4682b4\nwide road #804080\ntree #6b8e23\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four images of 40x30 pixels and less: blue above (class 0), grey below (1), with a green square (2)."""
    for split, sizes in (("train", ((40, 30), (30, 40), (24, 24))), ("val", ((40, 30), (21, 33)))):
        for number, (width, height) in enumerate(sizes):
            labels = np.zeros((height, width), np.uint8)
            labels[height // 2 :] = 1
            labels[4:9, 5:11] = 2
            labels[0, 0] = IGNORED
            colours = np.array([[70, 130, 180], [128, 128, 128], [20, 200, 20]], np.uint8)
            image = Image.fromarray(colours[np.minimum(labels, 2)])
            save(image, tmp_path / "images" / split / f"{number}.png")
            save(Image.fromarray(labels), tmp_path / "annotations" / split / f"{number}.png")
    (tmp_path / "classes.txt").write_text(CLASSES)
    return tmp_path


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def settings(folder, **changes):
    fields = {"name": "label_maps", "directory": str(folder), "high_resolution": 16, "low_resolution": 4}
    fields |= {"validation_fraction": 0.0} | changes
    return tiny_config("segmenter", **{f"dataset__{name}": value for name, value in fields.items()}).dataset


def test_images_and_maps_in_splits(folder):
    train, test = (load_source(settings(folder), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)  # without a folder test, val is the test
    assert train.class_names == ("sky", "wide road", "tree") and train.colours[2].tolist() == [0x6B, 0x8E, 0x23]
    image, labels = train.read(1)
    assert image.size == labels.size == train.size(1) == (30, 40)
    assert np.unique(np.asarray(labels)).tolist() == [0, 1, 2, IGNORED]


def test_a_network_that_restores_images_sees_them_alone(folder):
    config = tiny_config("sr", dataset__name="label_maps", dataset__directory=str(folder)).dataset
    source = load_source(config, "test")
    assert len(source) == 2 and not source.maps and source.read(0).target is None
    batch = next(eval_batches(source, config, batch_size=2))
    assert batch["high"].shape == (2, 32, 32, 3) and batch["low"].shape == (2, 8, 8, 3) and "target" not in batch


def test_validation_is_held_out_where_there_is_none(folder):
    parts = [load_source(settings(folder, validation_fraction=0.5), split) for split in ("train", "validation")]
    assert sum(map(len, parts)) == 3 and all(map(len, parts))


def test_training_folders_and_subfolders_have_other_names_too(folder):
    for part in ("images", "annotations"):
        (folder / part / "train").rename(folder / part / "town")
        (folder / part / "training").mkdir()
        (folder / part / "town").rename(folder / part / "training" / "town")
    assert len(load_source(settings(folder), "train")) == 3


def test_the_layout_of_cityscapes(folder):
    for split, part in itertools.product(("train", "val"), ("leftImg8bit", "gtFine")):
        source = folder / ("images" if part == "leftImg8bit" else "annotations") / split
        for path in source.iterdir():
            ending = "leftImg8bit" if part == "leftImg8bit" else "gtFine_labelTrainIds"
            save(Image.open(path), folder / part / split / "ulm" / f"{path.stem}_{ending}.png")
    save(Image.new("RGB", (40, 30)), folder / "gtFine" / "train" / "ulm" / "0_gtFine_color.png")
    shutil.rmtree(folder / "images")
    assert len(load_source(settings(folder), "train")) == 3


def test_palettes_are_read_as_indices(folder):
    path = folder / "annotations" / "train" / "0.png"
    expected = np.asarray(read_map(path))
    palette = Image.fromarray(expected)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    palette.save(path)
    with Image.open(path) as image:
        assert image.mode == "P"
    np.testing.assert_array_equal(load_source(settings(folder), "train").read(0).target, expected)


@pytest.mark.parametrize(
    "classes, values, ignored, expected",
    [
        (3, "", "", {0: 0, 2: 2, 255: IGNORED, 3: -1}),
        (150, "1..150", "0", {0: IGNORED, 1: 0, 150: 149, 151: -1, 255: IGNORED}),
        (2, "0,255", "", {0: 0, 255: 1, 1: -1}),
        (11, "", "11", {10: 10, 11: IGNORED, 12: -1}),
        (3, "1..2, 7", "3..6", {1: 0, 7: 2, 5: IGNORED, 0: -1}),
    ],
)
def test_values_of_classes(classes, values, ignored, expected):
    table = value_table(classes, values, ignored)
    assert {value: table[value] for value in expected} == expected


def _remove(folder, name):
    (folder / name).unlink()


def _empty(folder, name):
    shutil.rmtree(folder / name)
    (folder / name).mkdir()


def _write(folder, name, image):
    image.save(folder / name)


# What is done to good data, then the error, of the listing or of reading it all.
WRONG = {
    "no folder of images": (lambda f: shutil.rmtree(f / "images"), "has no folder images; expected images/train/"),
    "no folder of maps": (lambda f: shutil.rmtree(f / "annotations"), "has no folder annotations; expected"),
    "no split": (
        lambda f: shutil.rmtree(f / "images" / "train"),
        "config.dataset.directory: .*images has these images: test; expected train and test, perhaps validation",
    ),
    "empty split": (lambda f: _empty(f, "images/train"), "images/train has no images"),
    "image without map": (
        lambda f: _remove(f, "annotations/train/1.png"),
        r"images/train/1.png has no label map of the same name in \S+annotations/train \(1 of 3 have none\); add it",
    ),
    "map without image": (
        lambda f: _remove(f, "images/train/2.png"),
        r"annotations/train/2.png has no image of the same name in \S+images/train \(1 of 3",
    ),
    "two images of one map": (
        lambda f: _write(f, "images/train/0.jpg", Image.new("RGB", (40, 30))),
        "0.png and 0.jpg have the same label map; rename or remove one",
    ),
    "map of another size": (
        lambda f: _write(f, "annotations/train/0.png", Image.new("L", (30, 40))),
        r"annotations/train/0.png: a label map of 30x40 pixels, but \S+images/train/0.png has 40x30; they must",
    ),
    "value beyond the classes": (
        lambda f: _write(f, "annotations/train/0.png", Image.new("L", (40, 30), 7)),
        "annotations/train/0.png: the value 7 is neither that of one of the 3 classes nor ignored; see config.dataset",
    ),
    "colours instead of numbers": (
        lambda f: _write(f, "annotations/train/0.png", Image.new("RGB", (40, 30))),
        "annotations/train/0.png: a label map has one channel of 8 bits.*this has mode RGB; save the numbers",
    ),
    "no image at all": (
        lambda f: (f / "annotations/train/0.png").write_text("hello"),
        "annotations/train/0.png: not an image in a known format",
    ),
    "cut short": (
        lambda f: (f / "annotations/train/0.png").write_bytes((f / "annotations/train/0.png").read_bytes()[:-30]),
        "annotations/train/0.png: ",
    ),
    "no names": (lambda f: _remove(f, "classes.txt"), "num_classes is 0 and .*classes.txt is missing; set one of"),
    "a name twice": (lambda f: (f / "classes.txt").write_text("sky\nsky\n"), "the class 'sky' stands there twice"),
    "colours of some": (
        lambda f: (f / "classes.txt").write_text("sky #000000\nroad\n"),
        "1 of 2 classes have a colour; give it to all or none",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_get_one_clear_line(folder, case):
    harm, message = WRONG[case]
    harm(folder)
    with pytest.raises(DatasetError, match=message) as error:
        source = load_source(settings(folder), "train")
        for i in range(len(source)):
            source.read(i)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"directory": ""}, "config.dataset.directory is empty"),
        ({"classes": "no_such"}, "no_such: cannot be read as text: "),
        ({"label_values": "1..2"}, "config.dataset.label_values names 2 values, but there are 3 classes"),
        ({"label_values": "1..300"}, "config.dataset.label_values is '1..300'; give numbers from 0 to 255"),
        ({"ignored_values": "2"}, "give a value two meanings"),
        ({"num_classes": 5}, "config.dataset.num_classes is 5, but the data have 3 classes"),
    ],
)
def test_wrong_settings_get_one_clear_line(folder, changes, message):
    with pytest.raises(DatasetError, match=message):
        load_source(settings(folder, **changes), "train")


def test_headers_are_checked_before_anything_is_trained(folder):
    (folder / "annotations" / "val" / "1.png").write_text("hello")
    with pytest.raises(UnreadableImage, match=r"val/1.png: not an image.* \(1 of the 2 test images"):
        check_readable(load_source(settings(folder), "test"), "test", "stop")


def test_names_and_colours_of_the_installed_files():
    ade20k, camvid = (read_classes(FOLDER / f"{name}_classes.txt") for name in ("ade20k", "camvid"))
    assert len(ade20k.names) == 150 and ade20k.names[0] == "wall" and ade20k.colours[0].tolist() == [120, 120, 120]
    assert len(camvid.names) == 11


def test_training_crops_show_what_their_maps_say(folder):
    config = settings(folder, scale_range=(0.9, 2.0), largest_class=1.0)
    config.augment.photometric = False
    source = load_source(config, "train")
    batches = train_batches(source, config, batch_size=8, seed=1, views=("high",), target=SEGMENTATION.target)
    batch = next(batches)
    batches.close()
    assert batch["high"].shape == (8, 16, 16, 3) and batch["target"].shape == (8, 16, 16)
    assert batch["target"].dtype == np.uint8 and set(np.unique(batch["target"])) <= {0, 1, 2, IGNORED}
    sure = np.zeros(batch["target"].shape, bool)  # away from the borders of classes, where pixels mix
    sure[:, 2:-2, 2:-2] = all_equal_around(batch["target"])
    colours = np.array([[70, 130, 180], [128, 128, 128], [20, 200, 20]])
    for label, colour in enumerate(colours):
        pixels = batch["high"][sure & (batch["target"] == label)].astype(int)
        assert np.abs(pixels - colour).max(initial=0) < 60, label


def all_equal_around(labels: np.ndarray) -> np.ndarray:
    size = labels.shape[1] - 4
    near = [labels[:, i : i + size, j : j + size] for i in range(5) for j in range(5)]
    return np.all([x == near[12] for x in near], axis=0)


def test_whole_images_are_evaluated_once_each_in_batches_of_one_size(folder):
    config = settings(folder)
    source = load_source(config, "test")
    batches = list(eval_batches(source, config, batch_size=2, views=("high",), target=SEGMENTATION.target))
    assert [batch["high"].shape for batch in batches] == [(2, 30, 40, 3), (2, 33, 21, 3)]
    assert [batch["index"].tolist() for batch in batches] == [[0, -1], [1, -1]]
    assert [batch["weight"].tolist() for batch in batches] == [[1, 0], [1, 0]]
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["target"][0], np.asarray(source.read(i).target))
        assert (batch["target"][1] == IGNORED).all()


def test_images_of_many_sizes_are_evaluated_in_few(folder):
    config = settings(folder, eval_sizes=1)
    source = load_source(config, "test")
    (batch,) = eval_batches(source, config, batch_size=2, views=("high", "low"), target=SEGMENTATION.target)
    assert batch["high"].shape == (2, 32, 32, 3) and batch["low"].shape == (2, 8, 8, 3)
    assert batch["label_size"].tolist() == [[30, 40], [33, 21]] and batch["target"].shape == (2, 33, 40)
    for i in range(2):
        rows, columns = batch["label_size"][i]
        np.testing.assert_array_equal(batch["target"][i, :rows, :columns], np.asarray(source.read(i).target))


def test_sizes_are_rounded_no_more_than_needed():
    sizes = [(100 + i, 50 + i % 3) for i in range(20)]
    assert rounded_sizes(sizes, 20) == sizes
    assert len(set(rounded_sizes(sizes, 6))) <= 6
    assert rounded_sizes([(7, 9)], 5, multiple=4) == [(8, 8)]


def test_an_unreadable_image_is_left_out_if_asked(folder):
    (folder / "annotations" / "val" / "1.png").write_text("hello")
    config = settings(folder, on_error="skip")
    source = load_source(config, "test")
    (batch,) = eval_batches(source, config, batch_size=2, views=("high",), target=SEGMENTATION.target)
    assert batch["weight"].tolist() == [1, 0] and batch["skipped"].tolist() == [0, 1]


def test_recorded_values_of_ade20k():
    tensors = golden.tensors("c10_pipeline")
    raw = tensors["label_raw"]
    known = raw <= 150  # the originals take the values above for classes that do not exist
    np.testing.assert_array_equal(value_table(150, "1..150", "0")[raw][known], tensors["label_reduced"][known])
