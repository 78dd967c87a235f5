import io
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from vimd_jax.data.sources import load_source
from vimd_jax.errors import DatasetError, UnreadableImage


def save_to_disk(folder, values, column):
    """A folder as `Dataset.save_to_disk` writes it, with a grey image of brightness i for value i, in two files."""
    pa = pytest.importorskip("pyarrow")

    def png(i):
        file = io.BytesIO()
        Image.new("RGB", (8, 6), (i, i, i)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    folder.mkdir(parents=True)
    files = []
    for start, stop in ((0, 2), (2, len(values))):
        table = pa.table({"image": [png(i) for i in range(start, stop)], "label": values[start:stop]})
        files.append({"filename": f"data-{start}.arrow"})
        with pa.ipc.new_stream(str(folder / files[-1]["filename"]), table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {"features": {"image": {"_type": "Image"}, "label": column | {"_type": column.get("_type", "Value")}}}
        )
    )


@pytest.mark.parametrize(
    "column, train, test",
    [
        ({"_type": "ClassLabel", "names": ["wren", "owl"]}, [0, 1, 1, 0], [1, 1, 0]),
        ({"dtype": "string"}, ["a", "b", "b", "a"], ["b", "b", "a"]),
        ({"dtype": "int64"}, [3, 4, 4, 3], [4, 4, 3]),
    ],
)
def test_a_saved_dataset(dataset_config, tmp_path, column, train, test):
    save_to_disk(tmp_path / "train", train, column)
    save_to_disk(tmp_path / "test", test, column)
    config = dataset_config(name="hugging_face", directory=str(tmp_path), validation_fraction=0.0)
    source = pickle.loads(pickle.dumps(load_source(config, "train")))  # as worker processes get it
    np.testing.assert_array_equal(source.labels, [0, 1, 1, 0])
    assert [source.read(i).image.getpixel((0, 0))[0] for i in range(4)] == [0, 1, 2, 3]
    assert [source.key(3), source.read(2).target] == ["record 3", 1]
    source.check(1)
    found = load_source(config, "test")
    assert found.class_names == source.class_names == tuple(column.get("names") or map(str, sorted(set(train))))
    np.testing.assert_array_equal(found.labels, [1, 1, 0])


def test_one_saved_split_is_divided(dataset_config, tmp_path):
    save_to_disk(tmp_path / "all", [0, 1] * 20, {"_type": "ClassLabel", "names": ["a", "b"]})
    config = dataset_config(name="hugging_face", directory=str(tmp_path / "all"), validation_fraction=0.2)
    assert sum(len(load_source(config, split)) for split in ("train", "validation", "test")) == 40


def test_damaged_or_missing(dataset_config, tmp_path, monkeypatch):
    config = dataset_config(name="hugging_face", directory=str(tmp_path))
    with pytest.raises(DatasetError, match="config.dataset.directory: .*expected a folder that save_to_disk"):
        load_source(config, "train")
    save_to_disk(tmp_path / "test", [0, 1, 1], {"_type": "ClassLabel", "names": ["a", "b"]})
    source = load_source(config, "test")
    monkeypatch.setattr(source, "_table", {"image": [pytest.importorskip("pyarrow").scalar(None)] * 3})
    with pytest.raises(UnreadableImage, match="test record 1: the image is not in the folder"):
        source.read(1)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"pip install 'vimd-jax\[arrow\]'"):
        load_source(config, "test")
    monkeypatch.undo()
    (tmp_path / "test/data-0.arrow").write_bytes(b"broken")
    with pytest.raises(
        DatasetError, match="config.dataset.directory: .*; expected a folder that save_to_disk"
    ) as error:
        load_source(config, "test")
    assert "\n" not in str(error.value)
