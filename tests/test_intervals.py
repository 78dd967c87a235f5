"""Confidence intervals against computations by hand."""

import numpy as np
import pytest
from scipy.stats import norm

from vimd_jax import intervals
from vimd_jax.tasks.classification import scores

Z = norm.ppf(0.975)


def shares(top1, loss=None) -> intervals.Shares:
    top1 = np.array(top1, np.float64)
    loss = np.ones(len(top1)) if loss is None else np.array(loss, np.float64)
    return {"top1": top1, "top5": np.ones(len(top1)), "loss": loss}


def test_wilson_by_hand():
    found = intervals.interval("top1", shares([1] * 15 + [0] * 5), scores)
    centre, reach = 0.75 + Z**2 / 40, Z * np.sqrt(0.75 * 0.25 / 20 + Z**2 / 1600)
    expected = [100 * x / (1 + Z**2 / 20) for x in (centre - reach, centre + reach)]
    assert [found.low, found.high] == pytest.approx(expected) and found.method == "Wilson"


def test_paired_proportions_by_hand():
    first = shares([1, 0, 0, 0] + [1] * 6)
    second = shares([0, 1, 1, 1] + [1] * 6)  # 3 that only the second has right, 1 that only the first has
    found = intervals.paired_interval("top1", first, second, scores)
    p, q = 4 / 12, 2 / 12
    reach = Z * np.sqrt((p + q - (p - q) ** 2) / 12)
    assert [found.low, found.high] == pytest.approx([100 * (p - q - reach), 100 * (p - q + reach)])
    assert "Bonett-Price" in found.method and intervals.wins_and_losses(first["top1"], second["top1"]) == (3, 1)


def test_the_bootstrap_of_a_mean_agrees_with_its_standard_error():
    loss = np.random.default_rng(0).exponential(size=400)
    found = intervals.interval("loss", shares(np.zeros(400), loss), scores)
    reach = Z * loss.std() / 20
    assert [found.low, found.high] == pytest.approx([loss.mean() - reach, loss.mean() + reach], abs=0.02)
    assert found.method == "bootstrap"


def test_pairing_takes_out_what_the_images_have_in_common():
    rng = np.random.default_rng(0)
    hard, small = rng.exponential(size=300), 0.01 * rng.normal(size=300)
    first, second = shares(np.zeros(300), hard), shares(np.zeros(300), hard + 0.1 + small)
    found = intervals.paired_interval("loss", first, second, scores)
    assert found.low < 0.1 + small.mean() < found.high and found.high - found.low < 0.01
