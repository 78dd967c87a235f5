import io
import os
import re
import sys
import textwrap
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vimd_jax.data import sources
from vimd_jax.data.catalog import DATASETS, DatasetInfo
from vimd_jax.data.sources import check_readable, load_source
from vimd_jax.errors import DatasetError, UnreadableImage

THREE_SPLITS = {"train/ant": 4, "train/bee": 3, "val/ant": 2, "test/ant": 1, "test/bee": 2}


def test_folder_with_three_splits(dataset_config, image_folder):
    config = dataset_config(name="folder", directory=str(image_folder(THREE_SPLITS)))
    train, validation, test = (load_source(config, split) for split in ("train", "validation", "test"))
    assert train.class_names == validation.class_names == test.class_names == ("ant", "bee")
    np.testing.assert_array_equal(train.labels, [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(validation.labels, [0, 0])
    np.testing.assert_array_equal(test.labels, [0, 1, 1])
    assert train.labels.dtype == np.int32
    assert train.name(4).endswith("train/bee/000.png")
    with Image.open(train.name(4)) as image:
        np.testing.assert_array_equal(np.asarray(train.read(4).image), np.asarray(image))


def test_val_is_the_test_set_in_the_published_layout(dataset_config, image_folder):
    config = dataset_config(name="folder", directory=str(image_folder({"train/a": 20, "train/b": 10, "val/a": 2})))
    assert len(load_source(config, "test")) == 2
    assert len(load_source(config, "train")) + len(load_source(config, "validation")) == 30


@pytest.mark.parametrize("folder", ["val", "test"])
def test_evaluation_needs_no_training_images(dataset_config, image_folder, folder):
    config = dataset_config(name="folder", directory=str(image_folder({f"{folder}/a": 2, f"{folder}/b": 1})))
    assert len(load_source(config, "test")) == 3
    with pytest.raises(DatasetError, match=f"contains {folder}/; expected train/"):
        load_source(config, "train")


def test_held_out_images(dataset_config, image_folder):
    folder = image_folder({"train/many": 400, "train/two": 2, "train/one": 1, "test/one": 1})
    config = dataset_config(name="folder", directory=str(folder), validation_fraction=0.1)

    def names(split, seed):
        source = load_source(config, split, seed=seed)
        return {source.name(i): source.class_names[source.labels[i]] for i in range(len(source))}

    train, validation = names("train", 0), names("validation", 0)
    assert not set(train) & set(validation) and len(train | validation) == 403
    assert 20 <= len(validation) <= 60 and set(train.values()) == {"many", "two", "one"}
    assert all(f"/{label}/" in name for name, label in (train | validation).items())
    assert names("validation", 0) == validation != names("validation", 1)

    for name in sorted(validation)[:3] + sorted(train)[:3]:  # what is held out does not depend on the others
        Path(name).unlink()
        train.pop(name, None), validation.pop(name, None)
    assert (names("train", 0), names("validation", 0)) == (train, validation)

    config.validation_fraction = 0.0
    assert len(names("train", 0)) == 397
    with pytest.raises(DatasetError, match="validation_fraction"):
        load_source(config, "validation")
    config.validation_fraction = 0.9999  # of each class something to train on stays
    assert set(names("train", 0).values()) == {"many", "two", "one"}


def test_file_extensions_and_hidden_files(dataset_config, image_folder):
    folder = image_folder({"train/a": 1, "train/b": 1, "test/a": 1})
    for name in ("x.JPG", "y.jpeg", "z.Tiff"):
        Image.new("RGB", (4, 4)).save(folder / "train/a" / name)
    for name in ("notes.txt", "._x.jpg", ".hidden.png"):
        (folder / "train/a" / name).write_text("not an image")
    (folder / "train/.ipynb_checkpoints").mkdir()
    source = load_source(dataset_config(name="folder", directory=str(folder), validation_fraction=0.0), "train")
    assert [source.name(i).rsplit("/", 1)[1] for i in range(4)] == ["000.png", "x.JPG", "y.jpeg", "z.Tiff"]
    assert source.class_names == ("a", "b")


def test_files_that_look_like_no_image_are_counted(dataset_config, image_folder, caplog):
    folder = image_folder({"train/a": 1, "test/a": 1})
    for name in ("x.heic", "y.HEIC", "raw", ".DS_Store"):
        (folder / "train/a" / name).write_text("")
    Image.new("RGB", (4, 4)).save(folder / "train/a/z.jfif", "JPEG")
    source = load_source(dataset_config(name="folder", directory=str(folder), validation_fraction=0.0), "train")
    assert len(source) == 2
    assert "2 with .heic, 1 with no suffix" in caplog.text and "DS_Store" not in caplog.text


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_validation_folder(dataset_config, image_folder, name):
    folder = image_folder({"train/a": 4, f"{name}/a": 3, "test/a": 2})
    config = dataset_config(name="folder", directory=str(folder))
    assert [len(load_source(config, split)) for split in ("train", "validation", "test")] == [4, 3, 2]
    image_folder({"val/a": 1})
    with pytest.raises(DatasetError, match=f"contains val/ and {name}/; keep one"):
        load_source(config, "train")


def test_what_is_no_image_and_no_class(dataset_config, image_folder, caplog):
    """Service folders, directories, pipes: left out, and told apart from links, which are what they point to."""
    folder = image_folder({"train/a": 2, "test/a": 1, "elsewhere": 3})
    for name in (
        *("@eaDir", "lost+found", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information"),
        *(".ipynb_checkpoints", ".thumbnails", "a/@eaDir", "a/x.jpg"),
    ):
        (folder / "train" / name).mkdir()
        Image.new("RGB", (4, 4)).save(folder / "train" / name / "1.png")
    os.mkfifo(folder / "train/a/pipe.jpg")
    (folder / "train/b").symlink_to(folder / "elsewhere")
    (folder / "train/a/gone.png").symlink_to(folder / "nowhere.png")
    source = load_source(dataset_config(name="folder", directory=str(folder), validation_fraction=0.0), "train")
    assert source.class_names == ("a", "b")
    assert [source.key(i) for i in range(len(source))] == [
        *("a/000.png", "a/001.png", "a/gone.png", "b/000.png", "b/001.png", "b/002.png")
    ]
    with pytest.raises(UnreadableImage, match=r"gone\.png: No such file"):
        source.check(2)
    assert "1 that are pipes" in caplog.text and "1 that are folders" in caplog.text


def test_names_that_are_not_utf_8(dataset_config, image_folder):
    folder = image_folder({"train/a": 3, "test/a": 1})
    os.rename(folder / "train/a/000.png", os.fsencode(folder / "train/a") + b"/caf\xe9.png")
    source = load_source(dataset_config(name="folder", directory=str(folder), validation_fraction=0.01), "train")
    assert [source.key(i) for i in range(3)] == ["a/001.png", "a/002.png", "a/caf\\udce9.png"]
    assert source.read(2).image.size == (16, 12)


def test_composed_and_decomposed_names_are_one_class(dataset_config, image_folder):
    composed, decomposed = (unicodedata.normalize(form, "Zaunkönig") for form in ("NFC", "NFD"))
    folder = image_folder({f"train/{composed}": 2, f"test/{decomposed}": 1})
    config = dataset_config(name="folder", directory=str(folder))
    assert load_source(config, "test").class_names == (composed,) and len(load_source(config, "test")) == 1
    image_folder({f"train/{decomposed}": 1})
    with pytest.raises(DatasetError, match="two class folders called .*decomposed accents"):
        load_source(config, "test")


def test_spaces_of_any_width_are_spaces(dataset_config, image_folder):
    names = ("blue\u3000jay", "grey\u00a0crow")  # Japanese and no-break spaces
    folder = image_folder({f"{split}/{name}": 1 for split in ("train", "test") for name in names})
    assert load_source(dataset_config(name="folder", directory=str(folder)), "test").class_names == names


def test_a_small_part_of_16_bits_is_said_once_and_the_range_can_be_named(dataset_config, image_folder, caplog):
    folder = image_folder({"train/a": 1, "test/a": 1})
    for split in ("train", "test"):
        Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(folder / split / "a/000.png")
    config = dataset_config(name="folder", directory=str(folder), validation_fraction=0.0)
    assert [load_source(config, "test").read(0).image.getpixel((0, 0))[0] for _ in range(3)] == [16] * 3
    assert caplog.text.count("config.dataset.value_range") == 2, "once for train/, once for test/"
    config.value_range = (0, 4095)
    assert load_source(config, "test").read(0).image.getpixel((0, 0))[0] == 255


def test_headers_are_checked_without_decoding(dataset_config, image_folder, caplog):
    folder = image_folder(THREE_SPLITS)
    source = load_source(dataset_config(name="folder", directory=str(folder)), "test")
    check_readable(source, "test", "stop")
    (folder / "test/ant/000.png").write_bytes(b"")
    with pytest.raises(
        UnreadableImage, match=rf"000\.png: the file is empty \(1 of the {len(source)} test images .*skip"
    ):
        check_readable(source, "test", "stop")
    check_readable(source, "test", "skip")
    assert "they are left out" in caplog.text
    assert [source.key(i) for i in range(len(source))][0] == "ant/000.png"


def test_unreadable_image_is_named(dataset_config, image_folder):
    folder = image_folder(THREE_SPLITS)
    (folder / "test/ant/000.png").write_bytes(b"")
    source = load_source(dataset_config(name="folder", directory=str(folder)), "test")
    with pytest.raises(UnreadableImage, match=r"test/ant/000\.png: the file is empty"):
        source.read(0)


@pytest.mark.parametrize(
    "counts, changes, message",
    [
        ({}, {"directory": ""}, "config.dataset.directory is empty"),
        ({}, {"directory": "/no/such/folder"}, "/no/such/folder is not a folder"),
        ({}, {}, "contains none of train/, val/, test/; expected train/<class>"),
        ({"train/a": 1}, {}, "contains train/; expected"),
        ({"test/a": 1, "val/a": 1}, {}, "contains val/, test/; expected"),
        ({"train": 2, "test/a": 1}, {}, "train has no class folders"),
        ({"train/a": 1, "train/b": 0, "test/a": 1}, {}, "train/b has no images"),
        ({"train/a": 1, "test/a": 1, "test/b": 1}, {}, "test/b is not a class of the training set"),
        ({"train/a": 1, "test/a": 1, "val/c": 1}, {}, "val/c is not a class of the training set"),
        (THREE_SPLITS, {"num_classes": 5}, "num_classes is 5, but the data have 2 classes"),
        (THREE_SPLITS, {"name": "birds"}, "config.dataset.name is 'birds'; choose one of synthetic, folder"),
        ({"train/a\nb": 1, "test/a": 1}, {}, r"a class folder called 'a\nb'; rename it"),
    ],
)
def test_mistakes_are_one_line_with_field_and_remedy(dataset_config, image_folder, counts, changes, message):
    config = dataset_config(name="folder", directory=str(image_folder(counts)))
    config.update(changes)
    with pytest.raises(DatasetError) as error:
        load_source(config, "train")
    assert message in str(error.value) and "config.dataset." in str(error.value) and "\n" not in str(error.value)


def test_a_source_of_ones_own(dataset_config, tmp_path, monkeypatch):
    """The one in the docs."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]
    (tmp_path / "my_birds.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    config = dataset_config(name="my_birds:load", validation_fraction=0.5)
    sizes = [len(load_source(config, split)) for split in ("train", "validation", "test")]
    assert sizes[0] + sizes[1] == sizes[2] == 4 and sizes[0] >= 2
    record = load_source(config, "test").read(1)
    assert (record.target, record.image.getpixel((0, 0))) == (1, (255, 255, 255))
    for name in ("my_birds:laod", "no_birds:load"):
        with pytest.raises(DatasetError, match=f"config.dataset.name is '{name}': "):
            load_source(dataset_config(name=name), "train")


def test_two_classes_of_one_name(dataset_config, monkeypatch):
    source = load_source(dataset_config(), "test")
    source.class_names = ("owl", "jay", "owl", "rook")
    monkeypatch.setitem(sources.FORMATS, "synthetic", lambda *_: source)
    with pytest.raises(DatasetError, match="in these data two classes are called 'owl'; rename one"):
        load_source(dataset_config(), "test")


def test_unknown_split(dataset_config):
    with pytest.raises(DatasetError, match="split is 'val'; choose one of train, validation, test"):
        load_source(dataset_config(), "val")


@pytest.fixture
def tiny_pets(monkeypatch):
    """The catalog's pets, shrunk to two classes, seven training and three test images."""
    info = DatasetInfo("Oxford-IIIT Pet", 2, (7,), 3, "oxford_iiit_pet")
    monkeypatch.setitem(DATASETS, "pets", info)
    return info


def test_known_dataset_from_a_folder(dataset_config, image_folder, tiny_pets):
    config = dataset_config(name="pets", num_classes=2)
    config.directory = str(image_folder({"train/a": 4, "train/b": 3, "test/a": 1, "test/b": 2}))
    assert len(load_source(config, "test")) == 3


def test_validation_folder_counts_as_training_images(dataset_config, image_folder, tiny_pets):
    counts = {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 2}
    config = dataset_config(name="pets", directory=str(image_folder(counts)))
    assert [len(load_source(config, split)) for split in ("train", "validation", "test")] == [5, 2, 3]


@pytest.mark.parametrize(
    "counts",
    [
        {"train/a": 7, "test/a": 3},
        {"train/a": 4, "train/b": 4, "test/a": 3},
        {"train/a": 4, "train/b": 3, "test/a": 4},
    ],
)
def test_known_dataset_must_be_complete(dataset_config, image_folder, tiny_pets, counts):
    config = dataset_config(name="pets", directory=str(image_folder(counts)))
    with pytest.raises(
        DatasetError, match="contains .* but Oxford-IIIT Pet .* has 2 classes, 7 training and 3 .*=folder"
    ):
        load_source(config, "train")
    config.name = "folder"
    assert load_source(config, "train")


def test_datasets_that_tfds_does_not_have(dataset_config):
    for name in ("mit67", "action", "aircraft"):
        with pytest.raises(DatasetError, match="TensorFlow Datasets does not have .*config.dataset.directory"):
            load_source(dataset_config(name=name), "train")


def test_tfds_not_installed(dataset_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DatasetError, match=r"pip install 'vimd-jax\[tfds\]', or set config.dataset.directory"):
        load_source(dataset_config(name="cub"), "train")


@pytest.fixture
def fake_tfds(monkeypatch, tmp_path):
    """The parts of tensorflow_datasets in use, with ten encoded images; TFDS itself is not a test dependency."""

    class ImageFeature:
        pass

    def record(i):
        file = io.BytesIO()
        Image.new("RGB", (8, 6), (i, 0, 0)).save(file, "PNG")
        return {"image": file.getvalue(), "label": i % 2, "file_name": b"x"}

    class Builder:
        splits = {"train": range(7), "test": range(10, 13)}
        info = types.SimpleNamespace(
            full_name="oxford_iiit_pet/4.0.0",
            features={
                "image": ImageFeature(),
                "label": types.SimpleNamespace(names=["cat", "dog"]),
                "file_name": object(),
            },
        )

        def as_data_source(self, split, decoders):
            assert decoders == {"image": "skip"}
            return [record(i) for i in self.splits[split]]

    module = types.SimpleNamespace(
        builder=lambda name, file_format: Builder(),
        features=types.SimpleNamespace(Image=ImageFeature),
        decode=types.SimpleNamespace(SkipDecoding=lambda: "skip"),
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Builder


def test_tfds_source(dataset_config, fake_tfds, tiny_pets):
    config = dataset_config(name="pets", validation_fraction=0.3)
    test = load_source(config, "test")
    assert test.class_names == ("cat", "dog")
    np.testing.assert_array_equal(test.labels, [0, 1, 0])
    assert test.read(1).image.getpixel((0, 0)) == (11, 0, 0) and test.read(1).target == test.labels[1]
    assert test.name(1) == "oxford_iiit_pet[test] record 1"
    assert sum(len(load_source(config, split)) for split in ("train", "validation")) == 7


def test_tfds_dataset_not_prepared(dataset_config, fake_tfds, tiny_pets):
    fake_tfds.splits = {}
    with pytest.raises(DatasetError, match="run: tfds build oxford_iiit_pet --file_format=array_record"):
        load_source(dataset_config(name="pets"), "train")
