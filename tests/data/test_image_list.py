import json

import numpy as np
import pytest

from vimd_jax.data.sources import load_source
from vimd_jax.errors import DatasetError

LINES = [("a/000.png", "owl", "train"), ("a/001.png", "wren", "train"), ("a/002.png", "owl", "test")]


@pytest.fixture
def images(image_folder):
    return image_folder({"a": 40})


def as_csv(rows, header="file,label,split"):
    return "\n".join([header, *(",".join(row) for row in rows)])


def as_json_lines(rows):
    return "\n".join(json.dumps(dict(zip(("file", "label", "split"), row)) | {"width": 3}) for row in rows)


@pytest.mark.parametrize(
    "name, content", [("l.csv", as_csv(LINES)), ("l.csv", "\ufeff" + as_csv(LINES)), ("l.jsonl", as_json_lines(LINES))]
)
def test_a_list_with_splits(dataset_config, images, name, content):
    (images / name).write_text(content)
    for directory in (images, images / name):
        config = dataset_config(name="list", directory=str(directory))
        train, test = load_source(config, "train"), load_source(config, "test")
        assert train.class_names == test.class_names == ("owl", "wren")
        np.testing.assert_array_equal(train.labels, [0, 1])
        np.testing.assert_array_equal(test.labels, [0])
        assert test.key(0) == "a/002.png" and test.read(0).image.size == (16, 12) and test.read(0).target == 0


def test_a_list_without_splits(dataset_config, images):
    """Test images are the same for every seed; no image is in two splits."""
    (images / "labels.csv").write_text(as_csv([(f"a/{i:03d}.png", "xy"[i % 2]) for i in range(40)], "file,label"))
    config = dataset_config(name="list", directory=str(images), validation_fraction=0.2)
    splits = {
        seed: [load_source(config, split, seed=seed) for split in ("train", "validation", "test")] for seed in (0, 1)
    }
    keys = {seed: [{part.key(i) for i in range(len(part))} for part in parts] for seed, parts in splits.items()}
    assert all(sum(map(len, parts)) == len(set.union(*parts)) == 40 for parts in keys.values())
    assert keys[0][2] == keys[1][2] and keys[0][1] != keys[1][1]


def test_a_list_for_each_split(dataset_config, images):
    for name, i in {"train": 0, "valid": 1, "test": 2}.items():
        (images / f"{name}.csv").write_text(as_csv([(f"a/00{i}.png", "owl")], "file,label"))
    config = dataset_config(name="list", directory=str(images))
    keys = [load_source(config, split).key(0) for split in ("train", "validation", "test")]
    assert keys == ["a/000.png", "a/001.png", "a/002.png"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "lists no images"),
        ("path,class\nx.png,owl", "l.csv, image 1: has no file or no label; expected a .csv"),
        (as_csv([*LINES, ("x.png", "", "train")]), "l.csv, image 4: has no file or no label"),
        (as_csv([*LINES, ("x.png", "owl", "dev")]), "image 4: the split is 'dev'; choose one of train, val"),
        (as_csv([*LINES, ("x.png", "crow", "test")]), "crow, of x.png, is not a class of a training image"),
        (as_csv([*LINES, ("x.png", "owl", "")]), "has these images: train, test, without a split; expected train and"),
        (as_csv([("x.png", '"a\x1b"', "train"), *LINES]), "in these data a class is called 'a\\x1b'; rename it"),
        (as_csv(LINES[:2]), "has these images: train; expected train and test"),
        ("\xff", "l.csv: 'utf-8' codec can't decode"),
    ],
)
def test_mistakes_are_one_line(dataset_config, images, content, message):
    (images / "l.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DatasetError) as error:
        load_source(dataset_config(name="list", directory=str(images)), "train")
    assert message in str(error.value) and "config.dataset." in str(error.value) and "\n" not in str(error.value)
