"""Where pictures come from: a folder of class folders, TensorFlow Datasets, or the synthetic generator.

A source is a random-access list of labelled pictures with four members: `class_names` (tuple of str), `labels`
(np.int32, one per picture), `read(i)` (RGB PIL.Image; raises UnreadableImage) and `name(i)` (for messages).
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import ml_collections
import numpy as np
from PIL import Image

from vimd_jax.data.catalog import DATASETS, DatasetInfo
from vimd_jax.data.images import DatasetError, decode_image, read_image
from vimd_jax.data.synthetic import SyntheticSource

SPLITS = ("train", "validation", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LAYOUT = "expected train/<class>/*.jpg and test/<class>/*.jpg, optionally val/<class>/*.jpg"


class Source(Protocol):
    """A labelled list of pictures."""

    class_names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int: ...
    def read(self, i: int) -> Image.Image: ...
    def name(self, i: int) -> str: ...


def load_source(config: ml_collections.ConfigDict, split: str, *, seed: int = 0) -> Source:
    """The pictures of one split of a dataset.

    Args:
        config: `config.dataset`; read here are name, directory, num_classes, validation_fraction and, for the
            synthetic dataset, high_resolution and the synthetic_ fields.
        split: "train", "validation" or "test". Unless the data bring a validation split of their own,
            `validation_fraction` of each class' training pictures is held out.
        seed: chooses which pictures are held out.

    Raises:
        DatasetError: the data are missing, empty, or not what config says; one line that names the remedy.
    """
    if split not in SPLITS:
        raise DatasetError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if not 0 <= config.validation_fraction < 1:
        raise DatasetError(
            f"config.dataset.validation_fraction is {config.validation_fraction}; choose 0 ≤ fraction < 1"
        )
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
            f"config.dataset.num_classes is {config.num_classes} but the data have {len(source.class_names)} classes; "
            "set it to that, or to 0 to take it from the data"
        )
    if not len(source):
        raise DatasetError(
            f"no {split} pictures: raise config.dataset.validation_fraction ({config.validation_fraction}) or bring "
            "more pictures per class"
        )
    return source


class FolderSource:
    """The pictures of a split folder, one sub-folder per class, sorted by class and file name."""

    def __init__(self, folder: Path, class_names: Sequence[str] | None = None):
        """Lists the pictures.

        Args:
            folder: the split's folder.
            class_names: the classes and their order if already known; by default the sub-folders, sorted.

        Raises:
            DatasetError: there are no classes, a class without pictures, or a class not in `class_names`.
        """
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise DatasetError(f"config.dataset.directory: {folder} has no class folders; {LAYOUT}")
        self.class_names = tuple(class_names or found)
        if unknown := sorted(set(found) - set(self.class_names)):
            raise DatasetError(
                f"config.dataset.directory: {folder / unknown[0]} is not a class of the training pictures; "
                "every class needs a folder of the same name in train/"
            )
        files = {name: _picture_files(folder / name) for name in found}
        if empty := [name for name in found if not files[name]]:
            raise DatasetError(
                f"config.dataset.directory: {folder / empty[0]} has no pictures ({' '.join(EXTENSIONS)}); "
                "add some or remove the folder"
            )
        self.paths = [os.path.join(folder, name, file) for name in found for file in files[name]]
        classes = [self.class_names.index(name) for name in found]
        self.labels = np.repeat(np.array(classes, np.int32), [len(files[name]) for name in found])

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Image.Image:
        return read_image(self.paths[i])

    def name(self, i: int) -> str:
        return self.paths[i]


class TfdsSource:
    """A split of a dataset already prepared by TensorFlow Datasets in a random-access format; needs no TensorFlow."""

    def __init__(self, name: str, split: str):
        """Opens the data and reads every label once.

        Args:
            name: the dataset's TFDS name; it is looked for in TFDS_DATA_DIR or ~/tensorflow_datasets.
            split: TFDS split expression, such as "train+validation".

        Raises:
            DatasetError: TFDS is not installed or the dataset has not been prepared.
        """
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise DatasetError(
                "reading from TensorFlow Datasets needs the package: pip install 'vimd-jax[tfds]'; "
                "or set config.dataset.directory to a folder of class folders"
            ) from None
        try:
            builder = tfds.builder(name, file_format="array_record")
            # Encoded pictures are left to decode_image, so that all sources decode alike.
            images = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
            decoders = {key: tfds.decode.SkipDecoding() for key in images}
            self._records = builder.as_data_source(split, decoders=decoders)
        except (KeyError, NotImplementedError, ValueError, OSError) as error:
            raise DatasetError(
                f"{name} is not prepared in TensorFlow Datasets; run: tfds build {name} --file_format=array_record "
                f"(needs tensorflow), or set config.dataset.directory to a folder of class folders"
            ) from error
        self.class_names = tuple(builder.info.features["label"].names)
        self.labels = np.array([record["label"] for record in self._records], np.int32)
        self._name = f"{name}[{split}]"

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Image.Image:
        return decode_image(io.BytesIO(self._records[int(i)]["image"]), self.name(i))

    def name(self, i: int) -> str:
        return f"{self._name} record {i}"


class Subset:
    """Chosen records of another source, in the given order."""

    def __init__(self, source: Source, records: np.ndarray):
        self._source, self._records = source, records
        self.class_names = source.class_names
        self.labels = source.labels[records]

    def __len__(self) -> int:
        return len(self._records)

    def read(self, i: int) -> Image.Image:
        return self._source.read(self._records[i])

    def name(self, i: int) -> str:
        return self._source.name(self._records[i])


def _load_folder(config: ml_collections.ConfigDict, split: str, seed: int) -> Source:
    if not config.directory:
        raise DatasetError(f"config.dataset.directory is empty; name a folder ({LAYOUT})")
    root = Path(config.directory).expanduser()
    present = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if not root.is_dir():
        raise DatasetError(f"config.dataset.directory: {root} is not a folder; {LAYOUT}")
    if split == "test" and present in (["val"], ["test"]):  # to evaluate, the training pictures need not be there
        return FolderSource(root / present[0])
    if "train" not in present or len(present) < 2:
        found = ", ".join(f"{name}/" for name in present) or "none of train/, val/, test/"
        raise DatasetError(f"config.dataset.directory: {root} holds {found}; {LAYOUT}")
    train = FolderSource(root / "train")
    # With train/ and val/ alone, the layout of the published experiments, val/ is the test set.
    test = FolderSource(root / present[-1], train.class_names)
    validation = FolderSource(root / "val", train.class_names) if len(present) == 3 else None
    if config.name in DATASETS:
        _check(DATASETS[config.name], config, train, len(train) + len(validation or ()), len(test), str(root))
    if split == "test":
        return test
    if validation is not None:
        return train if split == "train" else validation
    return _hold_out(train, split, config.validation_fraction, seed)


def _load_tfds(config: ml_collections.ConfigDict, split: str, seed: int) -> Source:
    info = DATASETS[config.name]
    if info.tfds_name is None:
        raise DatasetError(
            f"TensorFlow Datasets does not have {info.title}; set config.dataset.directory to a folder ({LAYOUT})"
        )
    source = TfdsSource(info.tfds_name, info.tfds_test if split == "test" else info.tfds_train)
    sizes = (info.train_sizes[0], len(source)) if split == "test" else (len(source), info.test_size)
    _check(info, config, source, *sizes, f"TensorFlow Datasets' {info.tfds_name}")
    return source if split == "test" else _hold_out(source, split, config.validation_fraction, seed)


def _check(info: DatasetInfo, config, source: Source, train_size: int, test_size: int, place: str) -> None:
    """Raises unless the data are the published dataset: a missing file or class would spoil every comparison."""
    found = f"{len(source.class_names)} classes, {train_size} training and {test_size} test pictures"
    sizes = " or ".join(map(str, info.train_sizes))
    expected = f"{info.num_classes} classes, {sizes} training and {info.test_size} test pictures"
    complete = train_size in info.train_sizes and test_size == info.test_size
    if len(source.class_names) != info.num_classes or not complete:
        raise DatasetError(
            f"{place} holds {found}, but {info.title} (config.dataset.name={config.name}) has {expected}; "
            "complete it, or take it as it is with config.dataset.name=folder"
        )


def _hold_out(source: Source, split: str, fraction: float, seed: int) -> Source:
    """The training or the validation part of a source: `fraction` of every class, but at least one picture of those
    with two or more is held out, and at least one stays."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(source), bool)
    for label in range(len(source.class_names)) if fraction else ():
        records = rng.permutation(np.flatnonzero(source.labels == label))
        held_out[records[: min(len(records) - 1, max(1, round(fraction * len(records))))]] = True
    return Subset(source, np.flatnonzero(held_out if split == "validation" else ~held_out))


def _picture_files(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
    )
