"""Explanations: evidence is found where the answer comes from, for a network whose answer is known."""

import numpy as np
import pytest

from vimd_jax import explain


def looks_at_a_corner(images: np.ndarray) -> np.ndarray:
    """Probabilities of two classes: how bright, and how dark, the upper left quarter is."""
    bright = images[:, : images.shape[1] // 2, : images.shape[2] // 2].mean(axis=(1, 2, 3))
    return np.stack([bright, 1 - bright], axis=1)


@pytest.mark.parametrize("size", [(16, 16), (18, 29)])
def test_only_cells_that_the_network_looks_at_have_evidence(size):
    image = np.zeros((*size, 3), np.float32)
    image[: size[0] // 2, : size[1] // 2] = 0.8
    values = explain.evidence(looks_at_a_corner, image, label=0, grid=(4, 4), batch_size=3)
    assert (values[:2, :2] > 0.05).all() and values[2:, 3] == pytest.approx(0, abs=1e-6)
    marked = explain.strongest(values, 0.25)
    assert marked.sum() == 4 and marked[:2, :2].all()
    by_hand = np.log(
        looks_at_a_corner(image[None])[0, 0] / looks_at_a_corner(explain.without(image, marked)[None])[0, 0]
    )
    assert by_hand > values.max()


def test_removed_cells_have_the_mean_colour_and_cover_the_image_once():
    image = np.random.default_rng(0).random((10, 7, 3), np.float32)
    each = np.eye(6, dtype=bool).reshape(-1, 3, 2)
    covered = sum(explain.covered(cell, (10, 7)).astype(int) for cell in each)
    assert (covered == 1).all()
    everything = explain.without(image, np.ones((3, 2), bool))
    np.testing.assert_allclose(everything, np.broadcast_to(image.mean((0, 1)), image.shape), rtol=1e-6)


def test_a_picture_is_the_image_beside_the_marked_one():
    image = np.full((8, 12, 3), 0.5, np.float32)
    picture = explain.draw(image, np.eye(4), side=80)
    assert picture.size == (2 * 120 + 8, 80)
    red, green, _ = picture.getpixel((128 + 20, 12))  # in the first cell, which has evidence
    assert red > green and picture.getpixel((128 + 110, 12)) == (128, 128, 128)


def test_an_image_smaller_than_the_grid_is_refused():
    with pytest.raises(ValueError, match="4x8 pixels"):
        explain.evidence(looks_at_a_corner, np.zeros((8, 4, 3), np.float32), 0)
