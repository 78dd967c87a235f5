import numpy as np
import pytest

from vimd_jax.data.geometry import low_resolution_view
from vimd_jax.data.sources import load_source
from vimd_jax.data.synthetic import class_markings, draw_bird
from vimd_jax.errors import DatasetError


def test_images_depend_only_on_split_and_index(dataset_config):
    one, other = (load_source(dataset_config(), "train", seed=seed) for seed in (0, 1))
    other.read(7)  # the reading order does not matter
    for i in (3, 7, 8):
        np.testing.assert_array_equal(one.read(i).image, other.read(i).image)
    assert one.read(3).image.mode == "RGB" and one.read(3).image.size == (32, 32)


def test_images_are_distinct_within_and_across_splits(dataset_config):
    config = dataset_config(synthetic_train_size=60, synthetic_test_size=30, validation_fraction=0.5)
    images = [
        source.read(i).image.tobytes()
        for source in (load_source(config, split) for split in ("train", "validation", "test"))
        for i in range(len(source))
    ]
    assert len(images) == len(set(images)) == 60 + 30 + 30


def test_classes_are_balanced_and_named(dataset_config):
    config = dataset_config(synthetic_classes=7, synthetic_train_size=72)
    source = load_source(config, "train")
    counts = np.bincount(source.labels, minlength=7)
    assert counts.min() == 10 and counts.max() == 11
    assert len(set(source.class_names)) == 7
    with pytest.raises(DatasetError, match="synthetic_classes is 1"):
        load_source(dataset_config(synthetic_classes=1), "train")


def test_classes_differ_only_in_their_markings():
    """With the same random numbers, any two classes differ in a small part of the image."""
    markings = class_markings(10)
    for seed in range(5):
        birds = [np.asarray(draw_bird(m, 64, np.random.default_rng(seed)), int) for m in markings]
        for i in range(1, len(birds)):
            changed = (np.abs(birds[i] - birds[0]).max(-1) > 24).mean()
            assert 0.01 < changed < 0.25


@pytest.mark.parametrize("side", [64, 224])
def test_down_sampling_hides_patterns_at_any_size(side):
    """In the low-resolution view the difference between two wing patterns fades, except for the coarsest bars."""

    def difference(one, other):
        return np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()

    markings = class_markings(4)

    def kept(i, j):
        ratios = []
        for seed in range(6):
            high = [draw_bird(markings[k], side, np.random.default_rng(seed)) for k in (i, j)]
            low = [low_resolution_view(image, side // 4) for image in high]
            ratios.append(difference(*low) / difference(*high))
        return np.mean(ratios)

    barred, finely_barred, streaked, spotted = range(4)
    assert kept(finely_barred, streaked) < 0.5 and kept(streaked, spotted) < 0.6
    assert kept(barred, streaked) > 0.65
