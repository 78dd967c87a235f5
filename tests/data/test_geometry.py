import math

import golden
import numpy as np
import pytest
from PIL import Image

from vimd_jax.data.geometry import (
    NEAREST,
    View,
    central_view,
    crop_view,
    draw_corner,
    draw_scaled_view,
    draw_view,
    fitted_size,
    low_resolution_view,
    random_crop_box,
)


def eval_view(image, side, crop=1.0):
    return central_view(image.size, side, crop).apply(image)


def photograph(width, height, seed=0):
    """Smooth random colours, more like a photograph than noise."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def reference_eval_view(image, size):
    """torchvision's Resize(size) and CenterCrop(size), spelt out."""
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(size * width / height), size), Image.Resampling.BICUBIC)
    left, top = int(round((image.width - size) / 2.0)), int(round((image.height - size) / 2.0))
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("shape", [(500, 333), (333, 500), (64, 64), (40, 31), (250, 500), (90, 500), (224, 225)])
def test_eval_view_is_resize_then_centre_crop(shape):
    """Of noise, where the order of Pillow's two passes changes many pixels, by up to 20 levels."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8))
    np.testing.assert_array_equal(eval_view(image, 224), reference_eval_view(image, 224))


@pytest.mark.parametrize("shape", [(1000, 90), (17, 301)])
def test_of_an_elongated_image_only_what_is_seen_is_resampled(shape, monkeypatch):
    image, sizes, resize = photograph(*shape), [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: sizes.append(a[1]) or resize(*a, **k))
    view = np.asarray(eval_view(image, 64), int)
    assert sizes == [(64, 64)]
    difference = np.abs(view - np.asarray(reference_eval_view(image, 64), int))
    assert difference.max() <= 2 and difference.mean() < 0.1


def test_eval_view_can_keep_a_fraction_of_the_short_side():
    image = photograph(333, 500)
    expected = reference_eval_view(image, 73).crop((4, 4, 68, 68))
    np.testing.assert_array_equal(eval_view(image, 64, 0.875), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 60000), (60000, 1), (2, 3)])
def test_eval_view_of_extreme_shapes(shape):
    assert eval_view(Image.new("RGB", shape, (9, 8, 7)), 224).getpixel((100, 100)) == (9, 8, 7)


def test_low_resolution_view_is_pillows_bicubic():
    image = photograph(224, 224)
    expected = image.resize((56, 56), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(low_resolution_view(image, 56)), np.asarray(expected))


def test_train_view_is_crop_then_resize_then_flip():
    image = photograph(120, 90)
    flips = 0
    for seed in range(40):
        view = draw_view(image.size, 48, np.random.default_rng(seed), crop_scale=(0.08, 1.0), flip=True).apply(image)
        box = random_crop_box(120, 90, np.random.default_rng(seed), (0.08, 1.0))
        plain = np.asarray(image.crop(box).resize((48, 48), Image.Resampling.BICUBIC))
        flipped = np.array_equal(np.asarray(view), plain[:, ::-1])
        assert flipped or np.array_equal(np.asarray(view), plain)
        flips += flipped
    assert 10 < flips < 30


def test_a_map_beside_an_image_is_cut_alike_whatever_its_scale():
    """Corner pixels tell where the box lies and whether it is mirrored; a view moves no label off its image."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(128, 0))
    for _ in range(20):
        view = draw_view(image.size, 16, rng, crop_scale=(0.3, 1.0), flip=True)
        expected = np.asarray(view.apply(image, NEAREST), int)
        for factor in (0.5, 2, 4):
            scaled = image.resize((int(256 * factor), int(128 * factor)), NEAREST)
            assert np.abs(np.asarray(view.apply(scaled, NEAREST), int) - expected).max() <= 2
        assert (np.diff(expected[0]) < 0).all() == view.mirrored


@pytest.mark.parametrize("box, factor", [((0, 0, 64, 80), 2), ((0, 0, 31, 90), 1), ((8, 8, 136, 144), 4)])
def test_decoding_is_reduced_no_further_than_the_result(box, factor):
    assert View((200, 200), box, (32, 32)).reduction == factor


def test_no_flip_when_switched_off():
    image = photograph(50, 50)
    for seed in range(20):
        view = draw_view(image.size, 50, np.random.default_rng(seed), crop_scale=(1.0, 1.0), flip=False).apply(image)
        box = random_crop_box(50, 50, np.random.default_rng(seed), (1.0, 1.0))
        np.testing.assert_array_equal(view, image.crop(box).resize((50, 50), Image.Resampling.BICUBIC))


def test_crop_distribution_on_a_large_image():
    rng = np.random.default_rng(0)
    width, height = 4000, 4000
    boxes = np.array([random_crop_box(width, height, rng, (0.08, 0.5)) for _ in range(4000)], float)
    left, top, right, bottom = boxes.T
    area_fraction = (right - left) * (bottom - top) / (width * height)
    log_ratio = np.log((right - left) / (bottom - top))
    # Half the area at 4:3 always fits, so both distributions are uniform: mean, spread and range.
    limits = math.log(4 / 3)
    assert 0.0799 < area_fraction.min() < 0.085 and 0.495 < area_fraction.max() < 0.5001
    np.testing.assert_allclose([area_fraction.mean(), area_fraction.std()], [0.29, 0.42 / 12**0.5], rtol=0.03)
    np.testing.assert_allclose([log_ratio.min(), log_ratio.max()], [-limits, limits], atol=2e-3)
    np.testing.assert_allclose(log_ratio.std(), 2 * limits / 12**0.5, rtol=0.03)
    assert abs(log_ratio.mean()) < 0.01
    # The position is uniform over all places where the box fits, including the corners.
    place = left / (width - (right - left))
    np.testing.assert_allclose([place.mean(), place.std()], [0.5, 1 / 12**0.5], rtol=0.04)
    assert (top >= 0).all() and (bottom <= height).all() and (left >= 0).all() and (right <= width).all()


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((1000, 10), (493, 0, 506, 10)),  # too wide: 4:3 in the middle
        ((10, 1000), (0, 493, 10, 506)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 5000), (0, 2499, 1, 2500)),
    ],
)
def test_crop_falls_back_to_the_centre(shape, expected):
    # No box with at least 90 % of the area and a ratio of at most 4:3 fits into these.
    assert random_crop_box(*shape, np.random.default_rng(0), (0.9, 1.0)) == expected


def test_whole_image_when_its_shape_is_allowed_but_no_draw_fits():
    assert random_crop_box(120, 100, np.random.default_rng(0), (1.5, 1.6)) == (0, 0, 120, 100)


def test_recorded_sizes_of_fitted_images():
    meta = golden.meta("c10_pipeline")
    for width, height, long, short, *expected in meta["rescale_size[w,h,scale0,scale1,new_w,new_h]"]:
        assert fitted_size((width, height), (long, short)) == tuple(expected)


class Recorded:
    """The draws of NumPy's old generator, in the way that a new one is asked for them."""

    def __init__(self, seed):
        self._state = np.random.RandomState(seed)

    def integers(self, high):
        return self._state.randint(0, high)


def test_recorded_crops_of_label_maps():
    labels, meta = golden.tensors("c10_pipeline")["crop_label"], golden.meta("c10_pipeline")
    key = next(key for key in meta if key.startswith("random_crop"))
    for seed, top, bottom, left, right in meta[key]:
        assert draw_corner(labels, (24, 30), Recorded(seed), 0.75, 255) == (left, top)
        assert (bottom - top, right - left) == (24, 30)


def test_a_crop_of_a_scaled_image_is_filled_up():
    image = photograph(60, 40)
    view = crop_view(image.size, (30, 20), (4, 0), 24)
    applied = view.apply(image)
    assert applied.size == (24, 20)
    padded = np.asarray(view.pad(applied, (1, 2, 3)))
    np.testing.assert_array_equal(padded[:20], np.asarray(applied))
    assert padded.shape == (24, 24, 3) and (padded[20:] == (1, 2, 3)).all()


def test_a_map_and_its_image_are_cropped_alike():
    pixels = np.zeros((50, 70), np.uint8)
    pixels[20:, 30:] = 1
    labels = Image.fromarray(pixels)
    image = Image.fromarray(np.stack([255 * pixels] * 3, axis=-1))
    for seed in range(20):
        view = draw_scaled_view(
            labels, 32, np.random.default_rng(seed), limits=(0, 0), scale=(0.5, 2.0), largest_class=0.75,
            ignored=255, flip=True,
        )  # fmt: skip
        seen = np.asarray(view.pad(view.apply(image), (0, 0, 0)))[..., 0] > 127
        expected = np.asarray(view.pad(view.apply(labels, NEAREST), 0)) == 1
        assert seen.shape == (32, 32) and np.mean(seen != expected) < 0.06
