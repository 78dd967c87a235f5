"""Mixup and cutmix against their definition: weights, boxes, labels, and devices that share a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.tasks.mixing import check_groups, mix

HIGH, LOW = 32, 16


def batch(size=8):
    """Two views of flat images, image i of value i, with label i."""
    values = jnp.arange(size, dtype=jnp.uint8)[:, None, None, None]
    views = {"high": jnp.tile(values, (1, HIGH, HIGH, 3)), "low": jnp.tile(values, (1, LOW, LOW, 3))}
    return views, jnp.arange(size)


def many(count, size=2, **options):
    """The weights of image 0 in each view (count, h, w) and its soft labels, for `count` keys."""
    views, labels = batch(size)

    def one(key):
        mixed, targets = mix(key, views, labels, size, **options)
        last = size - 1  # the value of the partner of image 0, whose own value is 0
        return {name: 1 - view[0, :, :, 0] / last for name, view in mixed.items()}, targets[0]

    weights, targets = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), count))
    return jax.tree.map(np.asarray, weights), np.asarray(targets)


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    weights, targets = many(4000, mixup_alpha=alpha)
    for view in weights.values():
        np.testing.assert_allclose(view, np.broadcast_to(targets[:, :1, None], view.shape), atol=1e-6)
    share = targets[:, 0]
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    expected = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    np.testing.assert_allclose(share.mean(), 0.5, atol=0.025)
    np.testing.assert_allclose(share.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.05)
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert (share < np.quantile(expected, q)).mean() == pytest.approx(q, abs=0.03)


def test_cutmix_boxes():
    weights, targets = many(6000, cutmix_alpha=1.0)
    low, high = weights["low"], weights["high"]
    assert set(np.unique(low)) == {0, 1}
    np.testing.assert_array_equal(high, low.repeat(2, axis=1).repeat(2, axis=2))
    area = (low == 0).mean(axis=(1, 2))
    np.testing.assert_allclose(targets, np.stack([1 - area, area], axis=1), atol=1e-6)
    rows, columns = (low == 0).any(axis=2), (low == 0).any(axis=1)
    np.testing.assert_array_equal(low == 0, rows[:, :, None] & columns[:, None])
    for side in (rows, columns):
        assert (np.abs(np.diff(np.pad(side.astype(int), ((0, 0), (1, 1))))).sum(axis=1) <= 2).all()

    # timm's boxes, spelt out.
    rng = np.random.default_rng(0)
    side = (LOW * np.sqrt(1 - rng.beta(1, 1, 100_000))).astype(int)
    centre = rng.integers(LOW, size=(2, 100_000))
    edges = np.clip(centre - side // 2, 0, LOW), np.clip(centre + side // 2, 0, LOW)
    height, width = edges[1] - edges[0]
    expected = height * width / LOW**2
    np.testing.assert_allclose([area.mean(), area.std()], [expected.mean(), expected.std()], rtol=0.06)
    assert (area == 0).mean() == pytest.approx((expected == 0).mean(), abs=0.01)
    for size, sides in ((height, rows.sum(axis=1)), (width, columns.sum(axis=1))):
        frequencies = [np.bincount(x, minlength=LOW + 1) / len(x) for x in (size, np.where(area > 0, sides, 0))]
        frequencies = [f[1:] for f in frequencies]
        np.testing.assert_allclose(*frequencies, atol=0.02)
    inside = (edges[0][..., None] <= np.arange(LOW)) & (np.arange(LOW) < edges[1][..., None])
    covered = np.einsum("ni,nj->ij", *inside.astype(np.float32)) / 100_000
    np.testing.assert_allclose((low == 0).mean(axis=0), covered, atol=0.025)


def test_how_often_and_by_which():
    options = dict(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.7, switch_probability=0.2)
    weights, targets = many(6000, **options)
    boxes = np.array([len(np.unique(weight)) == 2 for weight in weights["low"]])
    untouched = (weights["low"] == 1).all(axis=(1, 2))
    empty_box = 0.2 * 0.7 * (many(6000, cutmix_alpha=1.0)[1][:, 0] == 1).mean()
    assert untouched.mean() == pytest.approx(0.3 + empty_box, abs=0.02)
    assert boxes.mean() == pytest.approx(0.7 * 0.2 - empty_box, abs=0.02)
    assert (targets[untouched] == (1, 0)).all()


def test_off_is_the_batch_itself():
    views, labels = batch()
    mixed, targets = mix(jax.random.key(0), views, labels, 8, mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.0)
    for name, view in views.items():
        np.testing.assert_array_equal(mixed[name], view)
    np.testing.assert_array_equal(targets, np.eye(8))


def test_the_partner_is_the_mirrored_image_of_the_batch():
    views, labels = batch()
    mixed, targets = mix(jax.random.key(0), views, labels, 8, mixup_alpha=0.8)
    share = float(targets[0, 0])
    assert 0.01 < share < 0.99
    expected = share * np.arange(8) + (1 - share) * np.arange(8)[::-1]
    np.testing.assert_allclose(mixed["high"][:, 3, 5, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(targets, share * np.eye(8) + (1 - share) * np.eye(8)[::-1], atol=1e-6)


def test_smoothed_labels_keep_their_mass():
    views, labels = batch(2)
    _, targets = mix(jax.random.key(0), views, labels, 5, mixup_alpha=0.8, smoothing=0.1)
    share = (float(targets[0, 0]) - 0.02) / 0.9
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets[0], [0.9 * share + 0.02, 0.9 * (1 - share) + 0.02, 0.02, 0.02, 0.02], atol=1e-6)


def test_a_view_that_is_no_multiple_of_the_other():
    views = {"high": jnp.zeros((2, 30, 30, 3)).at[1].set(1), "low": jnp.zeros((2, 7, 7, 3)).at[1].set(1)}
    for seed in range(20):
        mixed, _ = mix(jax.random.key(seed), views, jnp.arange(2), 2, cutmix_alpha=1.0)
        high, low = (np.asarray(mixed[name][0, :, :, 0]) for name in ("high", "low"))
        centre = [int((i + 0.5) * 7 / 30) for i in range(30)]
        np.testing.assert_array_equal(high, low[np.ix_(centre, centre)])


def test_each_group_has_a_draw_and_mirrors_of_its_own():
    views, labels = batch()
    mixed, targets = mix(jax.random.key(0), views, labels, 8, mixup_alpha=0.8, group_size=4)
    shares = np.diag(np.asarray(targets))
    np.testing.assert_array_equal(shares.reshape(2, 4), np.repeat(shares[::4, None], 4, axis=1))
    assert abs(shares[0] - shares[4]) > 0.01
    partner = np.array([3, 2, 1, 0, 7, 6, 5, 4])
    np.testing.assert_allclose(mixed["high"][:, 0, 0, 0], shares * np.arange(8) + (1 - shares) * partner, rtol=1e-5)


def test_a_batch_no_larger_than_a_group_is_one():
    views, labels = batch()
    whole, larger = (mix(jax.random.key(0), views, labels, 8, mixup_alpha=0.8, group_size=n) for n in (0, 128))
    jax.tree.map(np.testing.assert_array_equal, whole, larger)


def test_groups_that_do_not_fit_the_batch_or_the_devices():
    for batch_size, group_size, devices in ((1024, 128, 8), (1024, 128, 16), (64, 128, 1), (30, 0, 5), (32, 8, 2)):
        check_groups(batch_size, group_size, devices)
    for batch_size, group_size, devices in ((1000, 128, 1), (48, 16, 2), (24, 12, 3)):
        with pytest.raises(ValueError, match="^config.mixing.group_size is"):
            check_groups(batch_size, group_size, devices)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("group_size", [0, 1, 4])
@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}], ids=["mixup", "cutmix"])
def test_the_number_of_devices_changes_nothing(devices, group_size, alphas):
    views, labels = batch()
    key, alphas = jax.random.key(3), {"group_size": group_size, **alphas}
    whole = mix(key, views, labels, 8, smoothing=0.1, **alphas)
    shards = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), (views, labels))
    shared = jax.vmap(partial(mix, key, num_classes=8, smoothing=0.1, axis_name="i", **alphas), axis_name="i")(*shards)
    joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), shared)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), joined, whole)
