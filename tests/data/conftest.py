import ml_collections
import numpy as np
import pytest
from PIL import Image

from vimd_jax.config import default_config


@pytest.fixture
def dataset_config():
    """A `config.dataset` of small synthetic images, with the given fields changed."""

    def make(**changes):
        config = ml_collections.ConfigDict(
            dict(
                name="synthetic",
                directory="",
                value_range=(),
                num_classes=0,
                high_resolution=32,
                low_resolution=8,
                validation_fraction=0.1,
                crop_scale=(0.5, 1.0),
                flip=True,
                augment=default_config("classifier").dataset.augment.to_dict(),
                eval_crop=1.0,
                repeats=1,
                sampling="uniform",
                on_error="stop",
                reduced_decoding=False,
                num_workers=0,
                synthetic_classes=4,
                synthetic_train_size=40,
                synthetic_test_size=13,
            )
        )
        config.update(changes)
        return config

    return make


@pytest.fixture
def image_folder(tmp_path):
    """Writes random images, {"train/a": 3, …} → three files in train/a, and returns the folder."""

    def make(counts, side=12):
        rng = np.random.default_rng(0)
        for folder, count in counts.items():
            (tmp_path / folder).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (side, side + 4, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / f"{i:03d}.png")
        return tmp_path

    return make
