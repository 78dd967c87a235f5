"""A dataset in a list: a CSV or JSON-lines file with the fields file, label and perhaps split of each image."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from vimd_jax.data.images import ValueRange
from vimd_jax.data.source import SPLIT_NAMES, FileSource, Source, choose, composed
from vimd_jax.errors import DatasetError, printable
from vimd_jax.files import read_regular

EXPECTED = "expected a .csv or .jsonl file with the fields file, label and perhaps split, or the folder that holds it"
FIELDS = ("file", "label", "split")
MOST_BYTES = 2**30


class Item(NamedTuple):
    """A line of a list; the split is "" where there is none."""

    file: str
    label: str
    split: str


def load(config: ConfigDict, split: str, seed: int) -> Source:
    """A split of the dataset whose list is config.directory, or lies there: see `load_source`.

    Files are relative to the list. Lists called train, test and so on need no field split. Where no image has a split,
    test images are held out, as those for validation are.
    """
    place = Path(config.directory).expanduser()
    lists = [place] if place.is_file() else sorted(place.glob("*.csv")) + sorted(place.glob("*.jsonl"))
    if not config.directory or not lists:
        raise DatasetError(f"config.dataset.directory: {config.directory!r} is no list of images; {EXPECTED}")
    items = [item for path in lists for item in read_list(path)]
    if not items:
        raise DatasetError(f"config.dataset.directory: {place} lists no images; {EXPECTED}")
    by_split: dict[str, list[Item]] = {}
    for item in items:
        by_split.setdefault(item.split, []).append(item)
    names = sorted({item.label for item in by_split.get("train", items)})
    root = place.parent if place.is_file() else place
    found = {name: _source(root, part, names, tuple(config.value_range)) for name, part in by_split.items()}
    return choose(found, split, config, seed, str(place))


def _source(root: Path, items: list[Item], class_names: list[str], value_range: ValueRange) -> FileSource:
    numbers = label_numbers(root, items, class_names)
    return FileSource(root, [item.file for item in items], numbers, class_names, value_range)


def label_numbers(root: Path, items: list[Item], class_names: list[str]) -> list[int]:
    """The label of each item as an index into the class names; raises DatasetError if it is none of them."""
    labels = {name: i for i, name in enumerate(class_names)}
    if unknown := next((item for item in items if item.label not in labels), None):
        raise DatasetError(
            f"config.dataset.directory: {root}: {printable(unknown.label)}, of {printable(unknown.file)}, is not a "
            "class of a training image"
        )
    return [labels[item.label] for item in items]


def read_list(path: Path) -> Iterator[Item]:
    """The lines of a list.

    Raises:
        DatasetError: it cannot be read, or a line lacks a field; the message names it.
    """
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8-sig")
        rows = _json_lines(text) if path.suffix == ".jsonl" else csv.DictReader(io.StringIO(text, newline=""))
        for number, row in enumerate(rows, 1):
            yield _item(row, SPLIT_NAMES.get(path.stem.lower(), ""), f"{path}, image {number}")
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError) as error:
        raise DatasetError(f"config.dataset.directory: {path}: {error}; {EXPECTED}") from None


def _json_lines(text: str) -> Iterator[object]:
    for line in filter(str.strip, text.splitlines()):
        try:
            yield json.loads(line)
        except ValueError:
            yield None


def _item(row: object, split: str, place: str) -> Item:
    fields = {k: v for k, v in row.items() if k in FIELDS} if isinstance(row, dict) else {}
    values = {name: composed(str(value).strip()) for name, value in fields.items() if value is not None}
    if not values.get("file") or not values.get("label"):
        raise DatasetError(f"config.dataset.directory: {place}: has no file or no label; {EXPECTED}")
    if named := values.get("split"):
        split = SPLIT_NAMES.get(named.lower(), "")
        if not split:
            raise DatasetError(
                f"config.dataset.directory: {place}: the split is {printable(named)!r}; choose one of "
                f"{', '.join(SPLIT_NAMES)}"
            )
    return Item(str(fields["file"]).strip(), values["label"], split)
