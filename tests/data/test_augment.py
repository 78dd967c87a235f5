"""Augmentation against its definition: Pillow's result or the arithmetic of each operation, and the distributions."""

import dataclasses
import itertools
import math
from collections import Counter

import golden
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vimd_jax.config import default_config
from vimd_jax.data import augment, rand_augment
from vimd_jax.data.augment import check_augment
from vimd_jax.data.rand_augment import INCREASING_OPERATIONS, LOCAL_OPERATIONS, OPERATIONS, RandAugment
from vimd_jax.errors import DatasetError
from vimd_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD

BICUBIC, AFFINE = Image.Resampling.BICUBIC, Image.Transform.AFFINE
FILL = (124, 116, 104)


def photograph(width=40, height=30, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), BICUBIC)


def affine(*matrix):
    return lambda image: image.transform(image.size, AFFINE, matrix, BICUBIC, fillcolor=FILL)


def enhanced(enhancer, factor):
    return lambda image: enhancer(image).enhance(factor)


def pointwise(function):
    return lambda image: Image.fromarray(function(np.asarray(image, int)).astype(np.uint8))


# What timm's definition makes of magnitude 9, with sign 1: rand-m9 without noise.
COMMON = {
    "AutoContrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Invert": pointwise(lambda x: 255 - x),
    "Rotate": lambda image: image.rotate(27, BICUBIC, fillcolor=FILL),
    "SolarizeAdd": pointwise(lambda x: np.where(x < 128, np.minimum(255, x + 99), x)),
    "ShearX": affine(1, 0.27, 0, 0, 1, 0),
    "ShearY": affine(1, 0, 0, 0.27, 1, 0),
    "TranslateX": affine(1, 0, 0.405 * 40, 0, 1, 0),
    "TranslateY": affine(1, 0, 0, 0, 1, 0.405 * 30),
}
PLAIN = COMMON | {
    "Posterize": pointwise(lambda x: x & 0b11100000),
    "Solarize": pointwise(lambda x: np.where(x < 230, x, 255 - x)),
    "Color": enhanced(ImageEnhance.Color, 1.72),
    "Contrast": enhanced(ImageEnhance.Contrast, 1.72),
    "Brightness": enhanced(ImageEnhance.Brightness, 1.72),
    "Sharpness": enhanced(ImageEnhance.Sharpness, 1.72),
}
INCREASING = COMMON | {
    "Posterize": pointwise(lambda x: x & 0b10000000),
    "Solarize": pointwise(lambda x: np.where(x < 26, x, 255 - x)),
    "Color": enhanced(ImageEnhance.Color, 1.81),
    "Contrast": enhanced(ImageEnhance.Contrast, 1.81),
    "Brightness": enhanced(ImageEnhance.Brightness, 1.81),
    "Sharpness": enhanced(ImageEnhance.Sharpness, 1.81),
}


@pytest.mark.parametrize(
    ("operations", "expected"), [(OPERATIONS, PLAIN), (INCREASING_OPERATIONS, INCREASING)], ids=["plain", "increasing"]
)
def test_every_operation_at_magnitude_9(operations, expected):
    assert operations.keys() == expected.keys() and len(operations) == 15
    image = photograph()
    for name, operation in operations.items():
        result = np.asarray(operation(image, 0.9, 1))
        np.testing.assert_array_equal(result, expected[name](image), err_msg=name)
        assert not np.array_equal(result, image), name


@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("Rotate", 0.9, lambda image: image.rotate(-27, BICUBIC, fillcolor=FILL)),
        ("ShearX", 0.5, affine(1, -0.15, 0, 0, 1, 0)),
        ("ShearY", 0.5, affine(1, 0, 0, -0.15, 1, 0)),
        ("Color", 0.9, enhanced(ImageEnhance.Color, 1 - 0.9 * 0.9)),
        ("Contrast", 1.0, enhanced(ImageEnhance.Contrast, 0.1)),
        ("Brightness", 1.5, enhanced(ImageEnhance.Brightness, 0.1)),
        ("Sharpness", 0.0, lambda image: image),
    ],
)
def test_negative_direction(name, strength, expected):
    image = photograph()
    np.testing.assert_array_equal(INCREASING_OPERATIONS[name](image, strength, -1), expected(image))


def test_translation_by_whole_pixels_moves_them_and_fills_with_the_mean():
    image = photograph()
    pixels = np.asarray(image)
    moved = np.asarray(OPERATIONS["TranslateX"](image, 0.5, 1))  # 0.45 x 0.5 x 40 = 9 pixels
    np.testing.assert_array_equal(moved[:, 1:29], pixels[:, 10:38])  # bicubic interpolation needs two at the border
    assert (moved[:, 31:] == FILL).all()
    moved = np.asarray(OPERATIONS["TranslateY"](image, 2 / 3, -1))
    np.testing.assert_array_equal(moved[11:28], pixels[2:19])
    assert (moved[:9] == FILL).all()


def test_posterize_keeps_from_0_to_8_bits():
    image = photograph()
    for bits in range(1, 9):
        np.testing.assert_array_equal(rand_augment.posterize(image, bits), ImageOps.posterize(image, bits))
    np.testing.assert_array_equal(rand_augment.posterize(image, 12), image)
    assert not np.asarray(rand_augment.posterize(image, 0)).any()


def test_local_mambas_operations_equal_the_originals_to_the_pixel():
    recorded = golden.tensors("c05_randaugment_local")
    names = {"PosterizeTpu": "Posterize", "TranslateXRel": "TranslateX", "TranslateYRel": "TranslateY"}
    image = Image.fromarray(recorded.pop("in1/image"))
    tried = set()
    for key, expected in recorded.items():
        _, operation, magnitude, sign = key.split("/")
        name = names.get(operation, operation)
        result = LOCAL_OPERATIONS[name](image, float(magnitude) / 10, 1 if sign == "+" else -1)
        np.testing.assert_array_equal(np.asarray(result), expected, err_msg=key)
        tried.add(name)
    assert tried == LOCAL_OPERATIONS.keys() and len(tried) == 19


def test_local_mambas_magnitudes_have_no_upper_limit():
    drawn = []
    transform = dataclasses.replace(
        RandAugment.parse("local-m9-mstd0.5-p1.0"), operations=(lambda image, strength, sign: drawn.append(strength),)
    )
    for seed in range(500):
        transform(None, np.random.default_rng(seed))
    assert max(drawn) > 1 and np.mean(np.array(drawn) > 1) == pytest.approx(0.0228, abs=0.015)


@pytest.mark.parametrize("operations", [INCREASING_OPERATIONS, LOCAL_OPERATIONS], ids=["increasing", "local"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_every_operation_at_the_ends_of_the_range(operations, strength):
    image = photograph()
    for operation, sign in itertools.product(operations.values(), (1, -1)):
        result = operation(image, strength, sign)
        assert (result.size, result.mode) == (image.size, "RGB")


PLAIN_SET, INCREASING_SET = tuple(OPERATIONS.values()), tuple(INCREASING_OPERATIONS.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand", RandAugment(PLAIN_SET, 10, 2, 0, 10, 0.5)),
        ("rand-m9-mstd0.5-inc1", RandAugment(INCREASING_SET, 9, 2, 0.5, 10, 0.5)),
        ("rand-m9-mstd0.5", RandAugment(PLAIN_SET, 9, 2, 0.5, 10, 0.5)),
        ("rand-inc0-p1.0-n3-m12-mmax20", RandAugment(PLAIN_SET, 12, 3, 0, 20, 1.0)),
        ("local-m9-mstd0.5", RandAugment(tuple(LOCAL_OPERATIONS.values()), 9, 2, 0.5, math.inf, 0.5)),
    ],
)
def test_notation(text, expected):
    assert RandAugment.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["rnd-m9", "m9", "rand-x9", "rand-m", "rand-m9-", "rand-mstd", "rand-m-1", "rand-n0", "rand-inc2", "rand-w0", "9",
     "rand-p1.5", "rand_m9", "rand-m9-m8", "rand-mstd101", "rand-m9\n", "rand-mstdnan", "RAND-m9", "rand-m9 -n2",
     "local-m9-inc1"],
)  # fmt: skip
def test_malformed_notation_is_one_clear_line(text):
    config = default_config("classifier").dataset.augment
    config.rand_augment = text
    with pytest.raises(DatasetError) as error:
        check_augment(config)
    message = str(error.value)
    assert message.startswith(f"config.dataset.augment.rand_augment is {text!r}") and "rand-m9-mstd0.5-inc1" in message
    assert "\n" not in message


def test_operations_are_drawn_as_defined():
    drawn = []

    def record(name):
        return lambda image, strength, sign: drawn.append((name, strength, sign)) or image

    transform = RandAugment(tuple(map(record, OPERATIONS)), 9, 3, 0.5, 10, 0.25)
    rng, images = np.random.default_rng(0), 8000
    counts = []
    for _ in range(images):
        before = len(drawn)
        transform(None, rng)
        counts.append(len(drawn) - before)
    # Each of three draws happens with probability 1/4, whichever operation it is: with replacement.
    binomial = [images * math.comb(3, k) * 0.25**k * 0.75 ** (3 - k) for k in range(4)]
    np.testing.assert_allclose(np.bincount(counts), binomial, rtol=0.15)
    assert chi_squared(Counter(name for name, *_ in drawn), 15) < 36  # 99.9 % of 14 degrees of freedom
    strength, sign = np.array([(strength, sign) for _, strength, sign in drawn]).T
    # Normal about 0.9 with deviation 0.05, what is above 1 clipped: beyond two deviations, 2.3 %.
    assert strength.max() == 1 and (strength == 1).mean() == pytest.approx(0.0228, abs=0.006)
    assert np.median(strength) == pytest.approx(0.9, abs=0.003)
    assert np.quantile(strength, 0.159) == pytest.approx(0.85, abs=0.004)
    assert set(sign) == {-1, 1} and abs(sign.mean()) < 0.04


def chi_squared(counts, cells):
    assert len(counts) == cells
    expected = sum(counts.values()) / cells
    return sum((count - expected) ** 2 / expected for count in counts.values())


def test_rand_augment_applies_one_operation_after_the_other():
    image = photograph()
    transform = RandAugment(INCREASING_SET, 9, 1, 0, 10, 1.0)
    ways = {np.asarray(f(image, 0.9, sign)).tobytes() for f in INCREASING_OPERATIONS.values() for sign in (1, -1)}
    results = {np.asarray(transform(image, np.random.default_rng(seed))).tobytes() for seed in range(300)}
    assert results == ways
    two = RandAugment(INCREASING_SET, 9, 2, 0, 10, 1.0)(image, np.random.default_rng(0))
    pairs = itertools.product(INCREASING_OPERATIONS.values(), (1, -1), INCREASING_OPERATIONS.values(), (1, -1))
    assert any(np.array_equal(two, g(f(image, 0.9, s), 0.9, t)) for f, s, g, t in pairs)


def test_three_augment_does_one_of_three():
    image = photograph()
    grey = np.asarray(image.convert("L").convert("RGB"))
    solarized = np.asarray(ImageOps.solarize(image, 128))
    kinds = []
    for seed in range(600):
        result = augment.three_augment(image, np.random.default_rng(seed))
        blurs = not np.array_equal(result, grey) and not np.array_equal(result, solarized)
        kinds.append("blur" if blurs else "grey" if np.array_equal(result, grey) else "solarized")
        if blurs and seed < 30:
            rng = np.random.default_rng(seed)
            rng.integers(3)
            blurred = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
            np.testing.assert_array_equal(result, blurred)
    assert chi_squared(Counter(kinds), 3) < 13.8


def test_color_jitter(monkeypatch):
    image = photograph()
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    rng = np.random.default_rng(5)
    expected = image
    for i in rng.permutation(3):
        expected = enhancers[i](expected).enhance(rng.uniform(0.7, 1.3))
    np.testing.assert_array_equal(augment.color_jitter(image, 0.3, np.random.default_rng(5)), expected)

    applied = []
    for enhancer in enhancers:
        monkeypatch.setattr(enhancer, "__init__", lambda self, image: None)
        monkeypatch.setattr(
            enhancer, "enhance", lambda self, factor: applied.append((type(self).__name__, factor)), raising=False
        )
    rng = np.random.default_rng(0)
    for _ in range(2000):
        augment.color_jitter(image, 0.3, rng)
    orders = Counter(tuple(name for name, _ in applied[i : i + 3]) for i in range(0, len(applied), 3))
    assert chi_squared(orders, 6) < 20.5
    factors = np.array([factor for _, factor in applied])
    assert 0.7 <= factors.min() < 0.705 and 1.295 < factors.max() <= 1.3
    np.testing.assert_allclose([factors.mean(), factors.std()], [1, 0.6 / 12**0.5], rtol=0.03)
    applied.clear()
    for _ in range(300):
        augment.color_jitter(image, 1.5, rng)
    assert 0 <= min(factor for _, factor in applied) < 0.05 and max(factor for _, factor in applied) > 2.4


def test_erased_boxes_are_distributed_as_defined():
    rng = np.random.default_rng(0)
    top, left, height, width = np.array([augment.erased_box(1000, 1000, rng) for _ in range(20000)], float).T
    area, log_ratio = height * width / 1e6, np.log(height / width)
    limit = math.log(1 / 0.3)
    # Where even the largest area fits at any aspect ratio, area and logarithm of the ratio are uniform.
    small = area < 0.3
    assert 0.0199 < area.min() < 0.0205 and 0.327 < area.max() < 0.335
    np.testing.assert_allclose([area[small].mean(), area[small].std()], [0.16, 0.28 / 12**0.5], rtol=0.02)
    np.testing.assert_allclose([log_ratio.min(), log_ratio.max()], [-limit, limit], atol=0.02)
    np.testing.assert_allclose(log_ratio[small].std(), 2 * limit / 12**0.5, rtol=0.02)
    assert abs(log_ratio.mean()) < 0.02
    for place in (top / (1000 - height), left / (1000 - width)):
        np.testing.assert_allclose([place.mean(), place.std()], [0.5, 1 / 12**0.5], rtol=0.02)
        assert place.min() == 0 and place.max() == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (3, 2)])
def test_a_box_that_does_not_fit_is_empty(shape):
    for seed in range(50):
        top, left, height, width = augment.erased_box(*shape, np.random.default_rng(seed))
        assert 0 <= top <= top + height <= shape[0] and 0 <= left <= left + width <= shape[1]
        assert height < shape[0] or height * width == 0


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_fills_one_box(mode):
    black = Image.new("RGB", (60, 50))
    erased, inside = 0, []
    for seed in range(400):
        image = augment.random_erasing(black, np.random.default_rng(seed), 0.25, mode=mode)
        changed = np.asarray(image).any(axis=-1)
        if not changed.any():
            continue
        erased += 1
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        box = np.asarray(image)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert 0.015 < box[..., 0].size / 3000 < 0.35
        assert changed.sum() > 0.99 * box[..., 0].size
        inside.append(box.reshape(-1, 3))
    assert erased == pytest.approx(100, abs=30)
    colours = [len(np.unique(box, axis=0)) for box in inside]
    assert min(colours) > 30 if mode == "pixel" else set(colours) == {1}
    if mode == "const":
        assert (inside[0] == FILL).all()
    if mode == "pixel":
        pixels = np.concatenate(inside)
        np.testing.assert_allclose(pixels.mean(axis=0), 255 * np.array(IMAGENET_MEAN), rtol=0.02)
        np.testing.assert_allclose(pixels.std(axis=0), 255 * np.array(IMAGENET_STD), rtol=0.04)  # a little is clipped
    assert not np.asarray(black).any()


def test_several_boxes_share_the_area(monkeypatch):
    counts = []
    box = augment.erased_box
    monkeypatch.setattr(augment, "erased_box", lambda *args: counts.append(args[-1]) or box(*args))
    shares = []
    for seed in range(500):
        image = augment.random_erasing(Image.new("RGB", (100, 100)), np.random.default_rng(seed), 1.0, count=3)
        shares.append(np.asarray(image).any(axis=-1).mean())
    assert max(shares) < 0.35 and np.mean(shares) == pytest.approx(0.165, abs=0.02)
    images = {boxes: counts.count(boxes) / boxes for boxes in (1, 2, 3)}
    assert sum(images.values()) == 500 and min(images.values()) > 130


def test_everything_off_draws_nothing():
    image, rng = photograph(), np.random.default_rng(0)
    assert augment.augment(image, default_config("classifier").dataset.augment, rng) is image
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rand_augment": "rand-m9-mstd0.5-inc1"}, ["RandAugment", "random_erasing"]),
        ({"three_augment": True, "color_jitter": 0.3}, ["three_augment", "color_jitter", "random_erasing"]),
    ],
)
def test_published_order(monkeypatch, changes, expected):
    called = []
    for name in ("three_augment", "color_jitter", "random_erasing"):
        monkeypatch.setattr(augment, name, lambda image, *args, name=name, **options: called.append(name) or image)
    monkeypatch.setattr(RandAugment, "__call__", lambda *_: called.append("RandAugment"))
    config = default_config("classifier").dataset.augment
    config.update(changes | {"erasing_probability": 0.25})
    check_augment(config)
    augment.augment(photograph(), config, np.random.default_rng(0))
    assert called == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rand_augment": "rand-m9", "color_jitter": 0.3}, "rand_augment is 'rand-m9'; RandAugment replaces colour"),
        ({"rand_augment": "rand-m9", "three_augment": True}, "rand_augment is 'rand-m9'; RandAugment replaces colour"),
    ],
)
def test_settings_that_cannot_be_followed(changes, message):
    config = default_config("classifier").dataset.augment
    config.update(changes)
    with pytest.raises(DatasetError, match=f"^config.dataset.augment.{message}"):
        check_augment(config)


def test_the_mean_is_that_of_the_networks():
    np.testing.assert_array_equal(augment.MEAN, 255 * np.array(IMAGENET_MEAN))
    np.testing.assert_array_equal(augment.STD, 255 * np.array(IMAGENET_STD))


class Script:
    """A generator whose draws are those that were recorded."""

    def __init__(self, draws):
        self._draws = iter(draws)

    def integers(self, *bounds):
        kind, recorded, value = next(self._draws)
        assert (kind, recorded) == ("randint", list(bounds))
        return value

    def uniform(self, *bounds):
        kind, recorded, value = next(self._draws)
        assert (kind, recorded) == ("uniform", list(bounds))
        return value


@pytest.mark.parametrize("number", range(6))
def test_recorded_photometric_distortions(number):
    tensors, meta = golden.tensors("c10_pipeline"), golden.meta("c10_pipeline")
    draws = Script(meta[f"pmd{number}_draws_in_order"])
    image = Image.fromarray(np.ascontiguousarray(tensors["image_bgr"][..., ::-1]))
    actual = np.asarray(augment.photometric_distortion(image, draws), int)
    difference = np.abs(actual - tensors[f"pmd{number}"][..., ::-1])
    assert next(draws._draws, None) is None
    # OpenCV rounds hue through tables of its own: where that differs by one, so does a saturated colour by more.
    assert difference.max() <= 12 and difference.mean() < 0.35, (difference.max(), difference.mean())
