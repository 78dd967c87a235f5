"""Datasets as random-access lists of records: a folder of class folders, TensorFlow Datasets, or synthetic."""

import collections
import functools
import hashlib
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vimd_jax.data.catalog import DATASETS
from vimd_jax.data.images import EXTENSIONS, Reduction, check_header, decode_image, is_image_name, read_image
from vimd_jax.data.labels import cached_labels
from vimd_jax.data.synthetic import class_markings, draw_bird
from vimd_jax.errors import DatasetError, UnreadableImage

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
LAYOUT = "expected train/<class>/*.jpg and test/<class>/*.jpg, optionally val/<class>/*.jpg"


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
    """

    class_names: tuple[str, ...]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        """Image i in RGB, a JPEG where possible smaller by what `reduction` allows; raises UnreadableImage."""
        raise NotImplementedError

    def check(self, i: int) -> None:
        """Raises UnreadableImage if the header of image i cannot be read."""

    def name(self, i: int) -> str:
        """Name of image i in messages."""
        raise NotImplementedError

    def key(self, i: int) -> str:
        """Identity of image i, wherever the data are stored."""
        return self.name(i)


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


def load_source(config: ConfigDict, split: str, *, seed: int = 0) -> Source:
    """The images of one split of a dataset.

    Args:
        config: `config.dataset`; reads name, directory, num_classes, validation_fraction and, for the synthetic
            dataset, high_resolution and the synthetic_ fields.
        split: "train", "validation" or "test". Unless the dataset has a validation split of its own,
            `validation_fraction` of each class's training images are held out.
        seed: selects which images are held out.

    Raises:
        DatasetError: the data are missing, empty, or not what the config says; one line that names the remedy.
    """
    if split not in SPLITS:
        raise DatasetError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if config.name == "synthetic":
        source = SyntheticSource(config, split)
    elif config.name == "folder" or (config.name in DATASETS and config.directory):
        source = _load_folder(config, split, seed)
    elif config.name in DATASETS:
        source = _load_tfds(config, split, seed)
    else:
        known = ", ".join(["synthetic", "folder", *DATASETS])
        raise DatasetError(f"config.dataset.name is {config.name!r}; choose one of {known}")
    if config.num_classes not in (0, len(source.class_names)):
        raise DatasetError(
            f"config.dataset.num_classes is {config.num_classes}, but the data have {len(source.class_names)} classes; "
            "set it to that number, or to 0 to take it from the data"
        )
    if not len(source):
        raise DatasetError(
            f"the {split} split has no images; increase config.dataset.validation_fraction "
            f"(now {config.validation_fraction}) or add images"
        )
    return source


class FolderSource(Source):
    """The images of a split's folder, one subfolder per class, sorted by class and file name."""

    def __init__(self, folder: Path, class_names: Sequence[str] | None = None):
        """Lists the images.

        Args:
            folder: the split's folder.
            class_names: the classes in label order, if already known; by default the subfolders, sorted.

        Raises:
            DatasetError: there are no classes, a class has no images, or a class is not in `class_names`.
        """
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        if odd := [name for name in found if not name.isprintable()]:
            raise DatasetError(f"config.dataset.directory: {folder} has a class folder called {odd[0]!r}; rename it")
        if not found:
            raise DatasetError(f"config.dataset.directory: {folder} has no class folders; {LAYOUT}")
        self.class_names = tuple(class_names or found)
        self.paths, labels, ignored = [], [], collections.Counter()
        for name in found:
            if name not in self.class_names:
                raise DatasetError(
                    f"config.dataset.directory: {folder / name} is not a class of the training set; "
                    "every class needs a folder of the same name in train/"
                )
            present = [file for file in os.listdir(folder / name) if not file.startswith(".")]
            files = sorted(filter(is_image_name, present))
            ignored.update(Path(file).suffix.lower() or "no suffix" for file in present if not is_image_name(file))
            if not files:
                raise DatasetError(
                    f"config.dataset.directory: {folder / name} has no images ({' '.join(EXTENSIONS)}); "
                    "add some or remove the folder"
                )
            self.paths += [os.path.join(folder, name, file) for file in files]
            labels += [self.class_names.index(name)] * len(files)
        self.labels = np.array(labels, np.int32)
        if ignored:
            kinds = ", ".join(f"{count} with {suffix}" for suffix, count in ignored.most_common(5))
            _warn_once(f"{folder}: ignoring files that are not images: {kinds}")

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        return Record(read_image(self.paths[i], reduction), int(self.labels[i]))

    def check(self, i: int) -> None:
        check_header(self.paths[i])

    def name(self, i: int) -> str:
        return self.paths[i]

    def key(self, i: int) -> str:
        return "/".join(self.paths[i].split(os.sep)[-2:])


class TfdsSource(Source):
    """A split that TensorFlow Datasets has prepared in its random-access format; reading needs no TensorFlow."""

    def __init__(self, name: str, split: str):
        """Opens the data; the first time, every label is read, see `cached_labels`.

        Args:
            name: the dataset's TFDS name, prepared in TFDS_DATA_DIR or ~/tensorflow_datasets.
            split: TFDS split expression, such as "train+validation".

        Raises:
            DatasetError: TFDS is not installed or the dataset has not been prepared.
        """
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise DatasetError(
                "TensorFlow Datasets is not installed; run: pip install 'vimd-jax[tfds]', "
                "or set config.dataset.directory to a folder of class folders"
            ) from None
        try:
            builder = tfds.builder(name, file_format="array_record")
            # Images stay encoded until decode_image, so that every source decodes alike.
            images = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
            decoders = {key: tfds.decode.SkipDecoding() for key in images}
            self._records = builder.as_data_source(split, decoders=decoders)
        except (KeyError, NotImplementedError, ValueError, OSError) as error:
            raise DatasetError(
                f"TensorFlow Datasets has not prepared {name}; run: tfds build {name} --file_format=array_record "
                "(needs tensorflow), or set config.dataset.directory to a folder of class folders"
            ) from error
        self.class_names = tuple(builder.info.features["label"].names)
        self.labels = cached_labels(self._records, f"{builder.info.full_name}-{split}")
        self._name = f"{name}[{split}]"

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        record = self._records[int(i)]
        return Record(decode_image(io.BytesIO(record["image"]), self.name(i), reduction), int(record["label"]))

    def check(self, i: int) -> None:
        decode_image(io.BytesIO(self._records[int(i)]["image"]), self.name(i), header_only=True)

    def name(self, i: int) -> str:
        return f"{self._name} record {i}"


class SyntheticSource(Source):
    """Birds drawn on demand and kept in memory (3 · side² bytes each); the classes are balanced.

    An image depends only on its split and index, so that all runs share one dataset, whatever their seed.
    """

    def __init__(self, config: ConfigDict, split: str):
        """Prepares the labels; nothing is drawn yet.

        Args:
            config: `config.dataset`; reads high_resolution (the side of the images), synthetic_classes,
                synthetic_train_size, synthetic_test_size and validation_fraction (of synthetic_train_size: the number
                of validation images, which are additional to the training images).
            split: "train", "validation" or "test".
        """
        size = config.synthetic_test_size if split == "test" else config.synthetic_train_size
        size = round(size * config.validation_fraction) if split == "validation" else size
        self._split, self._side = split, config.high_resolution
        self._markings = class_markings(config.synthetic_classes)
        self._images: dict[int, np.ndarray] = {}
        self.class_names = tuple(map(str, self._markings))
        self.labels = (np.arange(size) % len(self._markings)).astype(np.int32)

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        if i not in self._images:
            rng = np.random.default_rng((SPLITS.index(self._split), i))  # the splits share no image
            self._images[i] = np.asarray(draw_bird(self._markings[self.labels[i]], self._side, rng))
        return Record(Image.fromarray(self._images[i]), int(self.labels[i]))

    def name(self, i: int) -> str:
        return f"synthetic {self._split} image {i}"


class Subset(Source):
    """The images of another source at the given indices."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices
        self.class_names = source.class_names
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        return self._source.read(self._indices[i], reduction)

    def check(self, i: int) -> None:
        self._source.check(self._indices[i])

    def name(self, i: int) -> str:
        return self._source.name(self._indices[i])

    def key(self, i: int) -> str:
        return self._source.key(self._indices[i])


def _load_folder(config: ConfigDict, split: str, seed: int) -> Source:
    if not config.directory:
        raise DatasetError(f"config.dataset.directory is empty; set it to the dataset's folder ({LAYOUT})")
    root = Path(config.directory).expanduser()
    if not root.is_dir():
        raise DatasetError(f"config.dataset.directory: {root} is not a folder; {LAYOUT}")
    present = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if split == "test" and present in (["val"], ["test"]):  # evaluation does not need the training images
        return FolderSource(root / present[0])
    if "train" not in present or len(present) < 2:
        found = ", ".join(f"{name}/" for name in present) or "none of train/, val/, test/"
        raise DatasetError(f"config.dataset.directory: {root} contains {found}; {LAYOUT}")
    train = FolderSource(root / "train")
    # With only train/ and val/, the layout of the published experiments, val/ is the test set.
    test = FolderSource(root / present[-1], train.class_names)
    validation = FolderSource(root / "val", train.class_names) if len(present) == 3 else None
    if config.name in DATASETS:
        _check_complete(config, str(root), train, len(train) + len(validation or ()), len(test))
    if split == "test":
        return test
    if validation is not None:
        return train if split == "train" else validation
    return _hold_out(train, split, config.validation_fraction, seed)


def _load_tfds(config: ConfigDict, split: str, seed: int) -> Source:
    info = DATASETS[config.name]
    if info.tfds_name is None:
        raise DatasetError(
            f"TensorFlow Datasets does not have {info.title}; set config.dataset.directory to a folder ({LAYOUT})"
        )
    source = TfdsSource(info.tfds_name, info.tfds_test if split == "test" else info.tfds_train)
    sizes = (info.train_sizes[0], len(source)) if split == "test" else (len(source), info.test_size)
    _check_complete(config, f"TensorFlow Datasets' {info.tfds_name}", source, *sizes)
    return source if split == "test" else _hold_out(source, split, config.validation_fraction, seed)


def _check_complete(config: ConfigDict, place: str, source: Source, train_size: int, test_size: int) -> None:
    """Raises unless the data are the whole published dataset: a missing image or class would skew every comparison."""
    info, classes = DATASETS[config.name], len(source.class_names)
    if classes == info.num_classes and train_size in info.train_sizes and test_size == info.test_size:
        return
    expected = " or ".join(map(str, info.train_sizes))
    raise DatasetError(
        f"{place} contains {classes} classes, {train_size} training and {test_size} test images, but {info.title} "
        f"(config.dataset.name={config.name}) has {info.num_classes} classes, {expected} training and {info.test_size} "
        "test images; add what is missing, or use the data as they are with config.dataset.name=folder"
    )


def _hold_out(source: Source, split: str, fraction: float, seed: int) -> Source:
    """The training or validation part of a source, with about `fraction` of the images held out for validation.

    Whether an image is held out depends on its key and the seed alone, so it does not change when others come or go;
    only of a class that would have nothing left to train on, one image stays.
    """
    draws = np.array([_uniform(f"{seed}/{source.key(i)}") for i in range(len(source))])
    held_out = draws < fraction
    for label in range(len(source.class_names) if source.labels is not None else 0):
        of_class = np.flatnonzero(source.labels == label)
        if len(of_class) and held_out[of_class].all():
            held_out[of_class[draws[of_class].argmax()]] = False
    return Subset(source, np.flatnonzero(held_out if split == "validation" else ~held_out))


def _uniform(text: str) -> float:
    """A number in [0, 1) that a text always gives."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
