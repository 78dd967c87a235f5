"""Packed datasets: the same images in the same order as from folders."""

import sys

import numpy as np
import official_archives as official
import pytest

from vimd_jax.data import array_record
from vimd_jax.data.pipeline import train_batches
from vimd_jax.data.prepare import prepare
from vimd_jax.data.sources import check_readable, load_source
from vimd_jax.errors import DatasetError, UnreadableImage


@pytest.fixture
def packed(tmp_path):
    layout, archives = official.miniature("aircraft", tmp_path / "downloads")
    assert prepare(layout, archives, tmp_path / "packed", pack=True) == layout.sizes
    prepare(layout, archives, tmp_path / "folder")
    return tmp_path / "packed"


def test_packed_is_as_unpacked(packed, dataset_config, tmp_path):
    assert sorted(path.name for path in packed.iterdir()) == sorted(
        f"{split}{suffix}" for split in ("train", "val", "test") for suffix in (".array_record", ".csv")
    )
    one, other = (
        dataset_config(name=name, directory=str(tmp_path / folder))
        for name, folder in (("array_record", "packed"), ("folder", "folder"))
    )
    for split in ("train", "validation", "test"):
        a, b = load_source(one, split), load_source(other, split)
        assert a.class_names == b.class_names and [a.key(i) for i in range(len(a))] == [b.key(i) for i in range(len(b))]
        for i in range(len(a)):
            assert a.read(i).target == b.read(i).target
            np.testing.assert_array_equal(np.asarray(a.read(i).image), np.asarray(b.read(i).image))
        check_readable(a, split, "stop")


def test_worker_processes_read_it(packed, dataset_config):
    config = dataset_config(name="array_record", directory=str(packed))
    batches = {}
    for workers in (0, 1):
        config.num_workers = workers
        stream = train_batches(load_source(config, "train"), config, batch_size=2, seed=0, views=("high",))
        batches[workers] = [next(stream)["high"] for _ in range(2)]
        stream.close()
    np.testing.assert_array_equal(batches[0], batches[1])


def test_what_does_not_belong_together_is_refused(packed, dataset_config):
    config = dataset_config(name="array_record", directory=str(packed))
    (packed / "test.csv").write_text("file,label\na.jpg,707-320\n")
    with pytest.raises(DatasetError, match=r"has 2 records, but .*test.csv names 1; pack the dataset again"):
        load_source(config, "test")
    (packed / "test.csv").write_text("file,label\na.jpg,707-320\nb.jpg,glider\n")
    with pytest.raises(DatasetError, match="glider, of b.jpg, is not a class of a training image"):
        load_source(config, "test")
    (packed / "test.csv").unlink()
    with pytest.raises(DatasetError, match="test.csv"):
        load_source(config, "test")
    with pytest.raises(DatasetError, match="expected train.array_record with train.csv"):
        load_source(dataset_config(name="array_record", directory=str(packed / "nothing")), "test")


def test_damage_is_named(packed, dataset_config):
    config = dataset_config(name="array_record", directory=str(packed))
    whole = (packed / "test.array_record").read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"x" * 100):
        (packed / "test.array_record").write_bytes(damage)
        with pytest.raises(DatasetError, match="test.array_record.*; pack the dataset again") as caught:
            load_source(config, "test")
        assert "\n" not in str(caught.value)
    start = whole.index(b"\xff\xd8\xff")
    (packed / "test.array_record").write_bytes(whole[:start] + bytes(200) + whole[start + 200 :])
    with pytest.raises(UnreadableImage, match="test.array_record: 707-320/"):
        check_readable(load_source(config, "test"), "test", "stop")


def test_label_maps_are_not_packed(tmp_path):
    layout, archives = official.miniature("voc", tmp_path / "downloads")
    with pytest.raises(DatasetError, match="has label maps, which are not packed"):
        prepare(layout, archives, tmp_path / "data", pack=True)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(DatasetError, match="array_record is not installed .*pip install array_record"):
        array_record.write(tmp_path / "x.array_record", [])
