"""A dataset as a random-access list of records, whatever its format; the formats themselves: see sources.py."""

import hashlib
import logging
import os
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vimd_jax.data.images import Reduction, ValueRange, check_header, narrow_range, read_image
from vimd_jax.errors import DatasetError, UnreadableImage
from vimd_jax.log import warn_once

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
# What data may call them.
SPLIT_NAMES = {"train": "train", **dict.fromkeys(("val", "valid", "validation"), "validation"), "test": "test"}


class Record(NamedTuple):
    """An image and its target.

    Attributes:
        image: RGB.
        target: an index into the source's `class_names`, or a map of such indices on the image's grid (Pillow, mode
            "L"), or any other value that a task learns; None where there is none.
    """

    image: Image.Image
    target: Any = None


class Source:
    """A list of images and their targets.

    Attributes:
        class_names: the class names.
        labels: int32 (number of images,), indices into `class_names`; None where an image has no class of its own.
            They serve to hold out images and to check a dataset; training reads the records.
        maps: whether targets are label maps.
        colours: uint8 (classes, 3) in which label maps are drawn; None: any.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray | None = None
    maps: bool = False
    colours: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        """Image i in RGB, a JPEG where possible smaller by what `reduction` allows; raises UnreadableImage."""
        raise NotImplementedError

    def check(self, i: int) -> None:
        """Raises UnreadableImage if the header of image i cannot be read."""

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of image i, of a source of label maps; raises UnreadableImage."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Name of image i in messages."""
        raise NotImplementedError

    def key(self, i: int) -> str:
        """Identity of image i, wherever the data are stored."""
        return self.name(i)


class FileSource(Source):
    """Image files of known classes."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: Sequence[int],
        class_names: Sequence[str],
        value_range: ValueRange = (),
    ):
        """Keeps what it is given; a sample is read, to warn of 16-bit images that use a small part of their range.

        Args:
            root: the folder that the file names are relative to.
            files: one an image.
            labels: of the images, indices into `class_names`.
            class_names: the classes in label order.
            value_range: see `read_image`.
        """
        self._root, self._files, self._value_range = os.fspath(root), list(files), value_range
        self.labels, self.class_names = np.array(labels, np.int32), tuple(class_names)
        sample = range(0, len(self), max(1, len(self) // 8))
        if not value_range and (text := narrow_range(map(self.name, sample))):
            warn_once(f"{root}: {text}")

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        return Record(read_image(self.name(i), reduction, self._value_range), int(self.labels[i]))

    def check(self, i: int) -> None:
        check_header(self.name(i))

    def name(self, i: int) -> str:
        return os.path.join(self._root, self._files[i])

    def key(self, i: int) -> str:
        return composed(self._files[i])


class Subset(Source):
    """The images of another source at the given indices."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices
        self.class_names = source.class_names
        self.labels = None if source.labels is None else source.labels[indices]
        self.maps, self.colours = source.maps, source.colours

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        return self._source.read(self._indices[i], reduction)

    def check(self, i: int) -> None:
        self._source.check(self._indices[i])

    def size(self, i: int) -> tuple[int, int]:
        return self._source.size(self._indices[i])

    def name(self, i: int) -> str:
        return self._source.name(self._indices[i])

    def key(self, i: int) -> str:
        return self._source.key(self._indices[i])


class Splits(NamedTuple):
    """The images of a run; `held_out` picks the best network."""

    train: Source
    held_out: Source
    test: Source


def check_readable(source: Source, split: str, on_error: str) -> None:
    """Opens every image as far as its header; raises UnreadableImage, or with on_error "skip" says how many are bad."""

    def problem(i: int) -> str | None:
        try:
            source.check(i)
        except UnreadableImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(8) as pool:  # threads, because the files may lie on a network
        problems = [text for text in pool.map(problem, range(len(source))) if text]
    if not problems:
        return
    text = f"{problems[0]} ({len(problems)} of the {len(source)} {split} images cannot be read)"
    if on_error == "stop" or len(problems) == len(source):
        raise UnreadableImage(f"{text}; remove or replace them, or set config.dataset.on_error=skip")
    log.warning("%s; they are left out.", text)


def choose(found: Mapping[str, Source], split: str, config: ConfigDict, seed: int, place: str) -> Source:
    """A split of data that have only some.

    With only training and validation images, the layout of the published experiments, the latter are the test set.
    Where validation images are missing, config.validation_fraction of the training images are held out.

    Args:
        found: the images of the splits that the data have; under "" those of data without splits, of which the same
            share are the test set.
        split: which is wanted.
        config: `config.dataset`.
        seed: selects what is held out for validation.
        place: where the data lie, for the message.

    Raises:
        DatasetError: the data have no such split, or none to train on and to test.
    """
    found = dict(found)
    if set(found) == {""}:
        parts = {"train": "train", "test": "validation"}
        found = {name: hold_out(found[""], part, config.validation_fraction, "test") for name, part in parts.items()}
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    if "" in found or "test" not in found or (split != "test" and "train" not in found):
        has = ", ".join(name or "without a split" for name in found)
        raise DatasetError(
            f"config.dataset.directory: {place} has these images: {has}; expected train and test, perhaps validation"
        )
    if split == "test" or "validation" in found:
        return found[split]
    return hold_out(found["train"], split, config.validation_fraction, seed)


def hold_out(source: Source, split: str, fraction: float, seed: int | str) -> Source:
    """The training or validation part of a source, with about `fraction` of the images held out for validation.

    Whether an image is held out depends on its key and the seed alone, so it does not change when others come or go;
    only of a class that would have nothing left to train on, one image stays.
    """
    draws = np.array([uniform(f"{seed}/{source.key(i)}") for i in range(len(source))])
    held_out = draws < fraction
    for label in range(len(source.class_names) if source.labels is not None else 0):
        of_class = np.flatnonzero(source.labels == label)
        if len(of_class) and held_out[of_class].all():
            held_out[of_class[draws[of_class].argmax()]] = False
    return Subset(source, np.flatnonzero(held_out if split == "validation" else ~held_out))


def uniform(text: str) -> float:
    """A number in [0, 1) that a text always gives."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def composed(text: str) -> str:
    """A name as it compares, wherever the data lie: macOS decomposes é into two characters; others keep what they get.

    Bytes that are not UTF-8 are escaped.
    """
    return unicodedata.normalize("NFC", text).encode(errors="backslashreplace").decode()
