"""A dataset in a folder of class folders."""

import collections
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vimd_jax.data.catalog import DATASETS, check_complete
from vimd_jax.data.images import EXTENSIONS, list_folder
from vimd_jax.data.source import FileSource, Source, composed, hold_out, warn_once
from vimd_jax.errors import DatasetError

LAYOUT = "expected train/<class>/*.jpg and test/<class>/*.jpg, optionally val/<class>/*.jpg"
VALIDATION = ("val", "valid", "validation")  # names that the folder of the validation images may have


class FolderSource(FileSource):
    """The images of a split's folder, one subfolder per class, sorted by class and file name."""

    def __init__(self, folder: Path, class_names: Sequence[str] | None = None):
        """Lists the images.

        Args:
            folder: the split's folder.
            class_names: the classes in label order, if already known; by default the subfolders, sorted.

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
        super().__init__(folder, files, labels, names)
        if ignored:
            kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5))
            warn_once(f"{folder}: ignoring what is no image: {kinds}")


def _class_folders(folder: Path) -> dict[str, str]:
    """The subfolders by the names of their classes, sorted."""
    found: dict[str, str] = {}
    for subfolder in list_folder(folder).folders:
        name = composed(subfolder)
        if not subfolder.isprintable():
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
    validation = _validation_folder(root)
    present = [name for name in ("train", validation, "test") if (root / name).is_dir()]
    if split == "test" and present in ([validation], ["test"]):  # evaluation does not need the training images
        return FolderSource(root / present[0])
    if "train" not in present or len(present) < 2:
        found = ", ".join(f"{name}/" for name in present) or "none of train/, val/, test/"
        raise DatasetError(f"config.dataset.directory: {root} contains {found}; {LAYOUT}")
    train = FolderSource(root / "train")
    # With only train/ and val/, the layout of the published experiments, val/ is the test set.
    test = FolderSource(root / present[-1], train.class_names)
    held_out = FolderSource(root / validation, train.class_names) if len(present) == 3 else None
    if config.name in DATASETS:
        check_complete(config.name, root, len(train.class_names), len(train) + len(held_out or ()), len(test))
    if split == "test":
        return test
    if held_out is not None:
        return train if split == "train" else held_out
    return hold_out(train, split, config.validation_fraction, seed)


def _validation_folder(root: Path) -> str:
    present = [name for name in VALIDATION if (root / name).is_dir()]
    if len(present) > 1:
        raise DatasetError(
            f"config.dataset.directory: {root} contains {'/ and '.join(present)}/; keep one folder of validation images"
        )
    return present[0] if present else VALIDATION[0]
