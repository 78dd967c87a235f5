"""A dataset in ArrayRecord files: few large files instead of many small ones, as network drives prefer.

DIR/train.array_record    the image files of a split, a record each
DIR/train.csv             their names and labels in the same order, with the header file,label
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vimd_jax.data.image_list import label_numbers, read_list
from vimd_jax.data.images import Reduction, ValueRange, decode_image
from vimd_jax.data.source import SPLIT_NAMES, Record, Source, choose, composed
from vimd_jax.errors import DatasetError, UnreadableImage
from vimd_jax.files import replace_file

SUFFIX = ".array_record"
EXPECTED = f"expected train{SUFFIX} with train.csv, likewise test and perhaps val, as prepare --pack makes them"


class ArrayRecordSource(Source):
    """The images of a split in an ArrayRecord file."""

    def __init__(
        self,
        path: Path,
        files: list[str],
        labels: list[int],
        class_names: list[str],
        value_range: ValueRange = (),
    ):
        """Opens the file.

        Args:
            path: the file.
            files: a name for each record.
            labels: of the records, indices into `class_names`.
            class_names: the classes in label order.
            value_range: see `read_image`.

        Raises:
            DatasetError: the file is damaged, or has another number of records than there are names.
        """
        self._path, self._files, self._value_range = path, files, value_range
        self.labels, self.class_names = np.array(labels, np.int32), tuple(class_names)
        try:
            self._records = _library("array_record_data_source").ArrayRecordDataSource(str(path))
        except (ValueError, RuntimeError, OSError) as error:
            raise DatasetError(f"config.dataset.directory: {path}: {str(error)!r}; pack the dataset again") from None
        if len(self._records) != len(files):
            raise DatasetError(
                f"config.dataset.directory: {path} has {len(self._records)} records, but {path.with_suffix('.csv')} "
                f"names {len(files)}; pack the dataset again"
            )

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        return Record(decode_image(self._open(i), self.name(i), reduction, self._value_range), int(self.labels[i]))

    def check(self, i: int) -> None:
        decode_image(self._open(i), self.name(i), header_only=True)

    def _open(self, i: int) -> io.BytesIO:
        try:
            return io.BytesIO(self._records[int(i)])
        except (ValueError, RuntimeError, OSError, IndexError) as error:
            raise UnreadableImage(f"{self.name(i)}: {str(error)!r}") from None

    def name(self, i: int) -> str:
        return f"{self._path}: {self._files[i]}"

    def key(self, i: int) -> str:
        return composed(self._files[i])


def load(config: ConfigDict, split: str, seed: int) -> Source:
    """A split of the dataset in the folder config.directory: see `load_source`."""
    root = Path(config.directory).expanduser()
    present = [stem for stem in SPLIT_NAMES if (root / f"{stem}{SUFFIX}").is_file()]
    paths = {SPLIT_NAMES[stem]: root / f"{stem}{SUFFIX}" for stem in present}
    if not config.directory or not paths:
        raise DatasetError(f"config.dataset.directory: {config.directory!r}: {EXPECTED}")
    lists = {name: list(read_list(path.with_suffix(".csv"))) for name, path in paths.items()}
    names = sorted({item.label for item in lists.get("train", sum(lists.values(), []))})
    found = {
        name: ArrayRecordSource(
            path,
            [item.file for item in lists[name]],
            label_numbers(root, lists[name], names),
            names,
            tuple(config.value_range),
        )
        for name, path in paths.items()
    }
    return choose(found, split, config, seed, str(root))


def write(path: Path, images: Iterable[tuple[str, str, bytes]]) -> None:
    """Writes an ArrayRecord file and its list.

    Args:
        path: the file, which ends in `SUFFIX`.
        images: name, label and content of each image file.

    Raises:
        DatasetError: array_record is not installed.
    """
    # Single records, so that any one is read alone; images are compressed already.
    writer = _library("array_record_module").ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("file", "label"))
    try:
        for name, label, content in images:
            writer.write(content)
            rows.writerow((name, label))
    finally:
        writer.close()
    replace_file(path.with_suffix(".csv"), text.getvalue().encode())


def _library(module: str) -> Any:
    """A module of array_record, which Grain brings along except on Windows."""
    try:
        import array_record.python as library
        from array_record.python import array_record_data_source, array_record_module  # noqa: F401
    except ImportError as error:
        raise DatasetError(f"array_record is not installed ({error}); run: pip install array_record") from None
    return getattr(library, module)
