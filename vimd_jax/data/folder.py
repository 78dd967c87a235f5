"""A dataset in a folder of class folders."""

import collections
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vimd_jax.data.catalog import DATASETS, check_complete
from vimd_jax.data.images import EXTENSIONS, ValueRange, list_folder
from vimd_jax.data.source import SPLIT_NAMES, FileSource, Source, choose, composed
from vimd_jax.errors import DatasetError, printable
from vimd_jax.log import warn_once

LAYOUT = "expected train/<class>/*.jpg and test/<class>/*.jpg, optionally val/<class>/*.jpg"


class FolderSource(FileSource):
    """The images of a split's folder, one subfolder per class, sorted by class and file name."""

    def __init__(self, folder: Path, class_names: Sequence[str] | None = None, value_range: ValueRange = ()):
        """Lists the images.

        Args:
            folder: the split's folder.
            class_names: the classes in label order, if already known; by default the subfolders, sorted.
            value_range: see `read_image`.

        Raises:
            DatasetError: there are no classes, a class has no images, or a class is not in `class_names`.
        """
        found = _class_folders(folder)
        names = tuple(class_names or found)
        files, labels, ignored = [], [], collections.Counter()
        for name, subfolder in found.items():
            if name not in names:
                raise DatasetError(
                    f"config.dataset.directory: {folder / subfolder} is not a class of the training set; "
                    "every class needs a folder of the same name in train/"
                )
            listed = list_folder(folder / subfolder)
            ignored.update(listed.others + ["that are folders"] * len(listed.folders))
            if not listed.images:
                raise DatasetError(
                    f"config.dataset.directory: {folder / subfolder} has no images ({' '.join(EXTENSIONS)}); "
                    "add some or remove the folder"
                )
            files += [f"{subfolder}/{file}" for file in listed.images]
            labels += [names.index(name)] * len(listed.images)
        super().__init__(folder, files, labels, names, value_range)
        if ignored:
            kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5))
            warn_once(f"{folder}: ignoring what is no image: {kinds}")


def _class_folders(folder: Path) -> dict[str, str]:
    """The subfolders by the names of their classes, sorted."""
    found: dict[str, str] = {}
    for subfolder in list_folder(folder).folders:
        name = composed(subfolder)
        if subfolder != printable(subfolder, None):
            raise DatasetError(f"config.dataset.directory: {folder} has a class folder called {subfolder!r}; rename it")
        if name in found:
            raise DatasetError(
                f"config.dataset.directory: {folder} has two class folders called {name!r}, one with composed and one "
                "with decomposed accents; move the images of both into one"
            )
        found[name] = subfolder
    if not found:
        raise DatasetError(f"config.dataset.directory: {folder} has no class folders; {LAYOUT}")
    return dict(sorted(found.items()))


def load(config: ConfigDict, split: str, seed: int) -> Source:
    """A split of the dataset in config.directory: see `load_source`."""
    if not config.directory:
        raise DatasetError(f"config.dataset.directory is empty; set it to the dataset's folder ({LAYOUT})")
    root = Path(config.directory).expanduser()
    if not root.is_dir():
        raise DatasetError(f"config.dataset.directory: {root} is not a folder; {LAYOUT}")
    folders = _split_folders(root)
    if "test" not in folders and "validation" not in folders or (split != "test" and "train" not in folders):
        present = ", ".join(f"{folder}/" for folder in folders.values()) or "none of train/, val/, test/"
        raise DatasetError(f"config.dataset.directory: {root} contains {present}; {LAYOUT}")
    found: dict[str, Source] = {}
    for name, folder in folders.items():  # those of training first
        class_names = found["train"].class_names if "train" in found else None
        found[name] = FolderSource(root / folder, class_names, tuple(config.value_range))
    if config.name in DATASETS and "train" in found:
        *training, test = map(len, found.values())
        check_complete(config.name, root, len(found["train"].class_names), sum(training), test)
    return choose(found, split, config, seed, str(root))


def _split_folders(root: Path) -> dict[str, str]:
    """The folders of the splits that there are, training first and the test set last."""
    folders: dict[str, str] = {}
    for name, split in SPLIT_NAMES.items():
        if not (root / name).is_dir():
            continue
        if split in folders:
            raise DatasetError(f"config.dataset.directory: {root} contains {folders[split]}/ and {name}/; keep one")
        folders[split] = name
    return folders
