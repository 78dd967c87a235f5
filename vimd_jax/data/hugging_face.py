"""A dataset in a folder as `datasets.Dataset.save_to_disk` of Hugging Face writes it; read by PyArrow alone."""

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vimd_jax.data.images import Reduction, ValueRange, decode_image
from vimd_jax.data.source import SPLIT_NAMES, Record, Source, choose
from vimd_jax.errors import DatasetError, UnreadableImage
from vimd_jax.files import read_regular

EXPECTED = "expected a folder that save_to_disk of Hugging Face's datasets has written"
MOST_BYTES = 2**24  # of a description


class HuggingFaceSource(Source):
    """A split in memory-mapped Arrow files, with images as encoded files and one column of classes."""

    def __init__(self, folder: Path, class_names: Sequence[str] | None = None, value_range: ValueRange = ()):
        """Reads the descriptions and the labels.

        Args:
            folder: of the split; holds state.json.
            class_names: the classes in label order, if already known; by default those of the data.
            value_range: see `read_image`.

        Raises:
            DatasetError: PyArrow is not installed, or the folder is damaged, or has no images or no classes.
        """
        self._folder, self._value_range = folder, value_range
        try:
            features = _json(folder / "dataset_info.json")["features"]
            self._files = [
                str(folder / Path(file["filename"]).name) for file in _json(folder / "state.json")["_data_files"]
            ]
            types = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
            self._image = _column(folder, types, "Image", "image")
            column = _column(folder, types, "ClassLabel", "label")
            values = self._table[column].to_numpy()
            if names := features[column].get("names"):
                values = np.array([*names, None], object)[values]  # -1: no class
        except ImportError:
            raise DatasetError("PyArrow is not installed; run: pip install 'vimd-jax[arrow]'") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"config.dataset.directory: {folder}: {error!r}; {EXPECTED}") from None
        self.class_names = tuple(class_names or names or sorted(set(map(str, values))))
        index = {name: i for i, name in enumerate(self.class_names)}
        if unknown := set(map(str, values)) - set(index):
            raise DatasetError(
                f"config.dataset.directory: {folder}: {min(unknown)!r} is not a class of a training image"
            )
        self.labels = np.array([index[str(value)] for value in values], np.int32)

    @functools.cached_property
    def _table(self) -> Any:
        import pyarrow as pa

        return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in self._files)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_table"}  # which every process maps anew

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        return Record(decode_image(self._open(i), self.name(i), reduction, self._value_range), int(self.labels[i]))

    def check(self, i: int) -> None:
        decode_image(self._open(i), self.name(i), header_only=True)

    def _open(self, i: int) -> io.BytesIO:
        image = self._table[self._image][int(i)].as_py()
        if not image or image["bytes"] is None:
            raise UnreadableImage(f"{self.name(i)}: the image is not in the folder, perhaps only a link to it")
        return io.BytesIO(image["bytes"])

    def name(self, i: int) -> str:
        return f"{self._folder} record {i}"

    def key(self, i: int) -> str:
        return f"record {i}"


def load(config: ConfigDict, split: str, seed: int) -> Source:
    """A split of the dataset in the folder config.directory: see `load_source`."""
    root = Path(config.directory).expanduser()
    found: dict[str, Source] = {}
    if (root / "state.json").is_file():
        found[""] = HuggingFaceSource(root, None, tuple(config.value_range))
    else:
        present = {name: root / name for name in SPLIT_NAMES if (root / name / "state.json").is_file()}
        if not config.directory or not present:
            raise DatasetError(f"config.dataset.directory: {config.directory!r}: {EXPECTED}")
        for name, folder in present.items():  # those of training first
            class_names = found["train"].class_names if "train" in found else None
            found[SPLIT_NAMES[name]] = HuggingFaceSource(folder, class_names, tuple(config.value_range))
    return choose(found, split, config, seed, str(root))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(read_regular(path, MOST_BYTES))


def _column(folder: Path, types: dict[str, str], kind: str, usual: str) -> str:
    """The column of that name, or else the only one of that kind."""
    of_kind = [name for name in types if types[name] == kind]
    if usual in types:
        return usual
    if len(of_kind) != 1:
        raise DatasetError(
            f"config.dataset.directory: {folder} has {len(of_kind)} columns of the type {kind}; call one {usual!r}"
        )
    return of_kind[0]
