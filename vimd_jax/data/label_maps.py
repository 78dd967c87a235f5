"""A dataset of images with label maps, in pairs of folders.

    DIR/images/train/a.jpg        DIR/annotations/train/a.png
    DIR/images/val/b.jpg          DIR/annotations/val/b.png

Subfolders and other names of the splits ("training", "validation") work too, as does the layout of Cityscapes
(leftImg8bit/train/<city>/x_leftImg8bit.png with gtFine/train/<city>/x_gtFine_labelTrainIds.png). The pixels of a map
are numbers of classes; config.dataset.label_values and ignored_values say which number means what. A palette in the
file changes nothing: its indices count.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vimd_jax.data.classes import IGNORED, Classes, read_classes
from vimd_jax.data.images import EXTENSIONS, MAX_PIXELS, Reduction, check_header, find_images, read_image
from vimd_jax.data.source import SPLIT_NAMES, Record, Source, choose, composed
from vimd_jax.errors import DatasetError, UnreadableImage, printable
from vimd_jax.files import open_regular

LAYOUT = "expected images/train/*.jpg and annotations/train/*.png with the same names, likewise val and perhaps test"
SPLIT_FOLDERS = SPLIT_NAMES | {"training": "train", "testing": "test"}


class Layout(NamedTuple):
    """Where images and label maps lie: their folders, and what their names add to what they share."""

    images: str
    maps: str
    image_ending: str = ""
    map_ending: str = ""


LAYOUTS = (
    Layout("images", "annotations"),
    Layout("leftImg8bit", "gtFine", "_leftImg8bit", "_gtFine_labelTrainIds"),
)


class ImageSource(Source):
    """The images of pairs of files, for a stage that learns from images alone."""

    class_names = ()

    def __init__(self, pairs: list[tuple[Path, Path]], root: Path):
        """Keeps what it is given; nothing is read yet.

        Args:
            pairs: files of images and of their maps.
            root: the folder that holds all of them.
        """
        self._pairs, self._root = pairs, root

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        return Record(read_image(self.name(i), reduction))

    def check(self, i: int) -> None:
        check_header(self.name(i))

    def name(self, i: int) -> str:
        return os.fspath(self._pairs[i][0])

    def key(self, i: int) -> str:
        return composed(self._pairs[i][0].relative_to(self._root).as_posix())


class LabelMapSource(ImageSource):
    """Image files with a label map each; `colours` (classes, 3) uint8, or None."""

    maps = True

    def __init__(self, pairs: list[tuple[Path, Path]], root: Path, classes: Classes, values: np.ndarray):
        """See `ImageSource`.

        Args:
            pairs: files of images and of their maps.
            root: the folder that holds all of them.
            classes: of the maps.
            values: (256,) int, the class of each value of a map, `IGNORED`, or -1 for values that may not occur.
        """
        super().__init__(pairs, root)
        self._values = values
        self.class_names, self.colours = classes

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        image, path = read_image(self.name(i), reduction), self._pairs[i][1]
        values = read_map(path)
        reduced = [tuple(-(-side // factor) for side in values.size) for factor in (1, 2, 4, 8)]
        if image.size not in reduced:
            raise UnreadableImage(
                f"{path}: a label map of {values.width}x{values.height} pixels, but {self.name(i)} has "
                f"{image.width}x{image.height}; they must have the same size"
            )
        labels = self._values[np.asarray(values)]
        if labels.min() < 0:
            strange = np.unique(np.asarray(values)[labels < 0])
            raise UnreadableImage(
                f"{path}: the value {strange[0]} is neither that of one of the {len(self.class_names)} classes nor "
                "ignored; see config.dataset.label_values and config.dataset.ignored_values"
            )
        return Record(image, Image.fromarray(labels.astype(np.uint8)))

    def check(self, i: int) -> None:
        super().check(i)
        self.size(i)

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of image i, which are those of its label map."""
        with _opened_map(self._pairs[i][1]) as image:
            return image.size


def read_map(path: Path) -> Image.Image:
    """The values of a label map, mode "L": grey values, or the indices of a palette.

    Raises:
        UnreadableImage: it cannot be decoded, or is a picture in colours, or has more than 8 bits.
    """
    with _opened_map(path) as image:
        try:
            image.load()
        except Exception as error:  # Pillow's decoders raise errors of nearly every type on damaged files
            raise UnreadableImage(f"{path}: {printable(error)}") from None
        return Image.fromarray(np.asarray(image).astype(np.uint8))


@contextlib.contextmanager
def _opened_map(path: Path) -> Iterator[Image.Image]:
    try:
        file = open_regular(path)  # closed below; only the errors of opening are caught
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from None
    with file:
        try:
            image = Image.open(file)
        except Exception:  # Pillow raises errors of nearly every type on damaged files
            raise UnreadableImage(f"{path}: not an image in a known format") from None
        if image.mode not in ("L", "P", "1"):
            raise UnreadableImage(
                f"{path}: a label map has one channel of 8 bits, grey or with a palette, but this has mode "
                f"{image.mode}; save the numbers of the classes, not colours"
            )
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(f"{path}: more than {MAX_PIXELS // 10**6} megapixels; scale it down")
        yield image


def load(config: ConfigDict, split: str, seed: int) -> Source:
    """A split of a dataset of label maps; of a stage without settings of label maps, as "sr", its images alone.

    Args:
        config: `config.dataset`; reads directory, validation_fraction and, of label maps, classes, num_classes,
            label_values and ignored_values.
        split: "train", "validation" or "test".
        seed: selects the images that are held out, where there is no folder of validation images.

    Raises:
        DatasetError: the folders, the file of classes or the values are not as expected.
    """
    if not config.directory:
        raise DatasetError("config.dataset.directory is empty; name the folder of the images and label maps")
    root = Path(config.directory).expanduser()
    layout = next((layout for layout in LAYOUTS if (root / layout.images).is_dir()), None)
    if layout is None:
        raise DatasetError(f"config.dataset.directory: {root} has no folder images; {LAYOUT}")
    if not (root / layout.maps).is_dir():
        raise DatasetError(f"config.dataset.directory: {root} has no folder {layout.maps}; {LAYOUT}")
    make = ImageSource
    if "label_values" in config:
        classes = _classes(config, root)
        values = value_table(len(classes.names), config.label_values, config.ignored_values)
        make = partial(LabelMapSource, classes=classes, values=values)
    found = {
        split: make(_pairs(root, layout, name), root)
        for name, split in SPLIT_FOLDERS.items()
        if (root / layout.images / name).is_dir()
    }
    return choose(found, split, config, seed, str(root / layout.images))


def _pairs(root: Path, layout: Layout, split: str) -> list[tuple[Path, Path]]:
    """The images of a split with their maps, sorted; each must have the other."""
    images = {}
    for path in _found(root / layout.images / split):
        if path.stem.endswith(layout.image_ending):
            name = _shared(path, root / layout.images, layout.image_ending)
            if name in images:
                raise DatasetError(f"{path} and {images[name].name} have the same label map; rename or remove one")
            images[name] = path
    ending = layout.map_ending
    maps = {
        _shared(path, root / layout.maps, ending): path
        for path in _found(root / layout.maps / split)
        if path.stem.endswith(ending)
    }
    for what, other, there, here in (("label map", layout.maps, maps, images), ("image", layout.images, images, maps)):
        if missing := sorted(here.keys() - there.keys()):
            raise DatasetError(
                f"{here[missing[0]]} has no {what} of the same name in {root / other / split} "
                f"({len(missing)} of {len(here)} have none); add it, or remove the file"
            )
    return [(images[name], maps[name]) for name in sorted(images)]


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DatasetError(f"config.dataset.directory: {folder} is no folder; {LAYOUT}")
    try:
        return find_images([folder])
    except FileNotFoundError:
        raise DatasetError(f"config.dataset.directory: {folder} has no images ({' '.join(EXTENSIONS)})") from None


def _shared(path: Path, folder: Path, ending: str) -> str:
    """The part of a file's name that an image and its map share."""
    return composed(path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending))


def _classes(config: ConfigDict, root: Path) -> Classes:
    """The classes of a file, or numbered ones."""
    if config.classes:
        return read_classes(Path(config.classes).expanduser())
    if (root / "classes.txt").is_file():
        return read_classes(root / "classes.txt")
    if not config.num_classes:
        raise DatasetError(
            f"config.dataset.num_classes is 0 and {root / 'classes.txt'} is missing; set one of config.dataset."
            "num_classes and config.dataset.classes, a file of class names"
        )
    return Classes(tuple(f"class {i}" for i in range(config.num_classes)))


def value_table(num_classes: int, label_values: str, ignored_values: str) -> np.ndarray:
    """The class of each value that a pixel of a map can have, (256,) int: `IGNORED`, or -1 where it may not occur.

    Args:
        num_classes: number of classes.
        label_values: values of the classes in their order, as "1..150" or "0,255"; empty: 0, 1, …
        ignored_values: values of pixels without a label, written likewise; 255 is always among them unless a class has
            it.

    Raises:
        DatasetError: they are no such values, there are not as many as classes, or one is used twice.
    """
    classes = _numbers("label_values", label_values) if label_values else list(range(num_classes))
    if len(classes) != num_classes:
        raise DatasetError(
            f"config.dataset.label_values names {len(classes)} values, but there are {num_classes} classes"
        )
    ignored = _numbers("ignored_values", ignored_values) if ignored_values else []
    if len(set(classes)) < len(classes) or set(classes) & set(ignored):
        raise DatasetError(
            f"config.dataset.label_values {label_values!r} and ignored_values {ignored_values!r} give a value two "
            "meanings"
        )
    table = np.full(256, -1)
    table[[IGNORED, *ignored]] = IGNORED
    table[classes] = np.arange(num_classes)
    return table


def _numbers(field: str, text: str) -> list[int]:
    """Reads numbers and ranges, as "0,3..5"."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})(?:\.\.(\d{1,3}))?\s*", part)
        if not match or int(match[2] or match[1]) > 255:
            raise DatasetError(
                f'config.dataset.{field} is {text!r}; give numbers from 0 to 255 as in "1..150" or "0,255"'
            )
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers
