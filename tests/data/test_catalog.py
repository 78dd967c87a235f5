import importlib
import re

import pytest

from vimd_jax.data.catalog import DATASETS


def test_catalog_has_the_published_numbers():
    published = {
        "cub": (200, 5994, 5794),
        "cars": (196, 8144, 8041),
        "dogs": (120, 12000, 8580),
        "pets": (37, 3680, 3669),
        "flowers": (102, 2040, 6149),
        "mit67": (67, 5360, 1340),
        "action": (40, 4000, 5532),
        "aircraft": (100, 6667, 3333),
        "imagenet": (1000, 1281167, 50000),
    }
    found = {name: (info.num_classes, info.train_sizes[0], info.test_size) for name, info in DATASETS.items()}
    assert found == published


@pytest.mark.parametrize("stage", ["teacher", "student"])
@pytest.mark.parametrize("name", [name for name in DATASETS if name != "imagenet"])
def test_config_docstrings_agree_with_the_catalog(name, stage):
    config, info = importlib.import_module(f"configs.{stage}_{name}"), DATASETS[name]
    assert config.get_config().dataset.name == name
    title = config.__doc__.splitlines()[0]
    sizes = rf"\({info.num_classes} [a-z ]+, {info.train_sizes[0]:,} training and {info.test_size:,} test images\)"
    assert info.title in title and re.search(sizes, title), title
    assert ("TFDS" in config.__doc__) == (info.tfds_name is not None)
