"""The formats of datasets, each a file of this folder and a line of FORMATS; `load_source` reads any of them."""

import importlib
from collections.abc import Callable

from ml_collections import ConfigDict

from vimd_jax.data import array_record, folder, hugging_face, image_list, label_maps, synthetic, tfds
from vimd_jax.data.catalog import DATASETS
from vimd_jax.data.source import SPLITS, Record, Source, Splits, check_readable
from vimd_jax.data.synthetic import SyntheticSource
from vimd_jax.errors import DatasetError, printable

__all__ = ["FORMATS", "SPLITS", "Record", "Source", "Splits", "SyntheticSource", "check_readable", "load_source"]

# Each is a function (config.dataset, split, seed) -> Source, which raises DatasetError where it cannot.
FORMATS: dict[str, Callable[[ConfigDict, str, int], Source]] = {
    "synthetic": synthetic.load,
    "folder": folder.load,
    "list": image_list.load,
    "label_maps": label_maps.load,
    "hugging_face": hugging_face.load,
    "array_record": array_record.load,
}


def load_source(config: ConfigDict, split: str, *, seed: int = 0) -> Source:
    """The images of one split of a dataset.

    Args:
        config: `config.dataset`; reads name, directory, num_classes, validation_fraction and what the format reads.
        split: "train", "validation" or "test". Unless the dataset has a validation split of its own,
            `validation_fraction` of each class's training images are held out.
        seed: selects which images are held out.

    Raises:
        DatasetError: the data are missing, empty, or not what the config says; one line that names the remedy.
    """
    if split not in SPLITS:
        raise DatasetError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    source = _format(config)(config, split, seed)
    if odd := [name for name in source.class_names if name != printable(name, None)]:
        raise DatasetError(f"config.dataset.name: in these data a class is called {odd[0]!r}; rename it")
    if len(set(source.class_names)) < len(source.class_names):
        twice = next(name for i, name in enumerate(source.class_names) if name in source.class_names[:i])
        raise DatasetError(f"config.dataset.name: in these data two classes are called {twice!r}; rename one")
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


def _format(config: ConfigDict) -> Callable[[ConfigDict, str, int], Source]:
    """The format of a dataset. Those of the catalog lie in a folder, if a directory is given, or else with TFDS.

    "module:function" is the user's own, a function like those of FORMATS; its module is imported.
    """
    if config.name in DATASETS:
        return folder.load if config.directory else tfds.load
    if config.name in FORMATS:
        return FORMATS[config.name]
    module, _, function = config.name.partition(":")
    if not function:
        known = ", ".join([*FORMATS, *DATASETS])
        raise DatasetError(
            f"config.dataset.name is {config.name!r}; choose one of {known}; or module:function, a source of your own"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DatasetError(f"config.dataset.name is {config.name!r}: {error}; is it on PYTHONPATH?") from error
